"""Optuna's side of a search: what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fastmem_pl.errors import FastMemError


@dataclass(frozen=True)
class OptunaSettings:
    """A search by Optuna: trials in ranges instead of a grid (pip install "fastmem-pl[optuna]").

    Args:
        space: lowest and highest value by axis, such as {learning_rate: [1e-6, 1e-3], alpha: [0, 1]};
            learning_rate, kl_coeff and steps are searched on a logarithmic scale.
        trials: of the study, all workers together.
        sampler: tpe, random or qmc.
        pruner: median gives trials up that fall behind the median of the others; none gives up none.
        parallel: trials that this worker runs at once, as rows of a batch.
        storage: of the study, as Optuna writes it (sqlite:///study.db, postgresql://...); left out, a file in
            the run folder.
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
        """Refuse ranges that are none, and values out of range.

        Raises:
            FastMemError: naming the axis.
        """
        if not self.space:
            raise FastMemError(
                "search.optuna.space: empty; give lowest and highest value of one axis or more"
            )
        for name, values in self.space.items():
            if len(values) != 2 or not values[0] < values[1]:
                raise FastMemError(
                    f"search.optuna.space.{name}: {list(values)}; give the lowest and the highest value"
                )
            for value in values:
                check_value(name, value)
        for name in ("trials", "parallel"):
            if getattr(self, name) < 1:
                raise FastMemError(
                    f"search.optuna.{name}: {getattr(self, name)} is out of range; allowed: at least 1"
                )
