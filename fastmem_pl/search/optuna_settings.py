"""What is asked of Optuna: ranges, how many trials, how they are chosen, and where they are kept."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastmem_pl.base.errors import FastMemError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_LOGARITHMIC = ("learning_rate", "kl_coeff", "steps")
_WHOLE = ("steps", "top_k")


@dataclass(frozen=True)
class OptunaSettings:
    """A search by Optuna: trials in ranges instead of a grid (pip install "fastmem-pl[optuna]").

    Args:
        space: lowest and highest value by axis, such as {learning_rate: [1e-6, 1e-3], alpha: [0, 1]};
            learning_rate, kl_coeff and steps are searched on a logarithmic scale.
        trials: of the study, all workers together; a higher number goes on with a study that was complete.
        sampler: tpe, random or qmc.
        pruner: median gives trials up that fall behind the median of the others, from a quarter of the
            samples on; none gives up none.
        parallel: trials that this worker runs at once, as rows of a batch.
        storage: of the study, as a URL (sqlite:////shared/study.db, postgresql://...); left out, optuna.db
            in the run folder. Several workers share a study when each has the same storage and a run_dir
            of its own; the last one to end, or the same command once more, ranks the trials of all.
        study: name of the study.
        seed: of the sampler.
    """

    space: dict[str, list[float]] = field(default_factory=dict)
    trials: int = 40
    sampler: Literal["tpe", "random", "qmc"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    parallel: int = 8
    storage: str | None = None
    study: str = "fastmem"
    seed: int = 0

    def check(self, check_value: Callable[[str, float], None]) -> None:
        """Refuse a missing package, ranges that are none, and values out of range.

        Args:
            check_value: refuses a value that an axis does not take.

        Raises:
            FastMemError: naming the setting.
        """
        if importlib.util.find_spec("optuna") is None:
            raise FastMemError(
                'search.optuna: the package optuna is not installed; pip install "fastmem-pl[optuna]"'
            )
        if not self.space:
            raise FastMemError(
                "search.optuna.space: empty; give lowest and highest value of one axis or more, such as "
                "--search.optuna.space '{learning_rate: [1e-6, 1e-3], steps: [5, 50]}'"
            )
        for name, values in self.space.items():
            self._check_range(name, values, check_value)
        for name, least in (("trials", 1), ("parallel", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise FastMemError(
                    f"search.optuna.{name}: {getattr(self, name)} is out of range; allowed: at least {least}"
                )
        if self.storage is not None:
            self._check_storage(self.storage)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The ranges as Optuna takes them."""
        from optuna.distributions import FloatDistribution, IntDistribution

        return {
            name: IntDistribution(int(low), int(high), log=name in _LOGARITHMIC)
            if name in _WHOLE
            else FloatDistribution(low, high, log=name in _LOGARITHMIC)
            for name, (low, high) in self.space.items()
        }

    def scales(self) -> dict[str, tuple[float, float, bool]]:
        """Lowest and highest value of every axis, and whether its scale is logarithmic."""
        return {name: (*values, name in _LOGARITHMIC) for name, values in self.space.items()}

    @staticmethod
    def _check_storage(storage: str) -> None:
        # Comes with Optuna.
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            make_url(storage)
        except (SQLAlchemyError, ValueError):
            example = "sqlite:///study.db" if "://" in storage else f"sqlite:///{storage}"
            raise FastMemError(f"search.optuna.storage: {storage!r} is no URL; such as {example}") from None

    @staticmethod
    def _check_range(name: str, values: list[float], check_value: Callable[[str, float], None]) -> None:
        where = f"search.optuna.space.{name}"
        if len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]:
            raise FastMemError(f"{where}: {values} is no range; give the lowest and the highest value")
        for value in values:
            check_value(name, value)
        if name in _LOGARITHMIC and values[0] <= 0:
            raise FastMemError(
                f"{where}: starts at {values[0]:g}, but its scale is logarithmic; give a lowest value above 0"
            )
