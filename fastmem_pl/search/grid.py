"""What a search looks at: settings by name, their values, and the points that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import METHODS, Method
from fastmem_pl.metrics import METRIC_MODELS, SCORES
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.search.optuna_settings import OptunaSettings

MEMORY_AXES = ("learning_rate", "steps", "kl_coeff")
DECODER_AXES = ("alpha", "temperature", "top_p", "top_k", "repetition_penalty", "relative_top")
# Axes that only some decoders look at; the others concern all.
_OWN_AXES = {"alpha": ("cd", "cad"), "relative_top": ("dola",)}
_WHOLE = ("steps", "top_k")

Point = Mapping[str, float]
"""Value of every axis by name."""


def _paper_grid() -> dict[str, list[float]]:
    return {
        "learning_rate": [1e-6, 3e-6, 1e-5, 3e-5],
        "steps": [10, 20, 50],
        "kl_coeff": [0.01, 0.03, 0.1, 0.3, 1.0],
    }


@dataclass(frozen=True)
class SearchSettings:
    """What to search, and by what to judge.

    Defaults are the paper's (arXiv 2406.16069, appendix).

    Args:
        grid: values of each axis; every combination is a point. Axes: learning_rate, steps, kl_coeff, and of
            the decoder alpha, temperature, top_p, top_k, repetition_penalty, relative_top. What has no axis
            keeps its value under model.
        objective: score to judge by: accuracy, contained, exact_match, f1, format_failure, original, rouge1,
            rouge2, rougeL, rougeLsum, bert_precision or factkb.
        every: search on every fifth (5) sample of the data, so that the others remain to test on.
        method: memory method to search for; left out, fastmem, or fastmem+cd where alpha is an axis.
        exact: compute losses from the whole vocabulary. Left off, a CPU in float32 estimates them from a
            sample of it, which is faster, and keeps the largest error that it finds (docs/search.md).
        optuna: search a larger space by trials of Optuna instead of the grid.
    """

    grid: dict[str, list[float]] = field(default_factory=_paper_grid)
    objective: str = "accuracy"
    every: int = 5
    method: str | None = None
    exact: bool = False
    optuna: OptunaSettings | None = None

    @property
    def axes(self) -> list[str]:
        """Names of the axes."""
        return list(self.optuna.space if self.optuna else self.grid)

    def chosen_method(self) -> Method:
        """The method that is searched for.

        Raises:
            FastMemError: for an unknown one, or one without a memory.
        """
        if self.method is None:
            return METHODS["fastmem+cd" if "alpha" in self.axes else "fastmem"]
        method = METHODS[self.method]
        if not method.memory:
            allowed = [name for name, other in METHODS.items() if other.memory]
            raise FastMemError(
                f"search.method: {method.name!r} memorizes nothing; allowed: {', '.join(allowed)}"
            )
        return method

    def check(self, model: FastMemModule, samples: Sequence[ContextSample]) -> None:
        """Refuse a search that cannot be done, before anything is.

        Raises:
            FastMemError: naming the setting.
        """
        method = self.chosen_method()
        where = "search.optuna.space" if self.optuna else "search.grid"
        for name in self.axes:
            if name not in (*MEMORY_AXES, *DECODER_AXES):
                raise unknown(where, name, (*MEMORY_AXES, *DECODER_AXES))
            if name in _OWN_AXES and method.decoder not in _OWN_AXES[name]:
                fitting = [m.name for m in METHODS.values() if m.memory and m.decoder in _OWN_AXES[name]]
                raise FastMemError(
                    f"{where}: {method.name!r} does not depend on {name}; leave {name} out, or set "
                    f"search.method to one of: {', '.join(fitting)}"
                )
            if name in ("top_p", "top_k") and not self._draws(model):
                where = "search.optuna.space" if self.optuna else "search.grid"
                raise FastMemError(
                    f"{where}.{name} is of no account where the best token is taken; set "
                    "--model.decode.temperature above 0"
                )
        if self.optuna:
            self.optuna.check(lambda name, value: check_value(model, name, value, where))
        else:
            _check_grid(self.grid, model)
        _check_objective(self.objective, model, samples)

    def _draws(self, model: FastMemModule) -> bool:
        values = (self.optuna.space if self.optuna else self.grid).get("temperature")
        return min(values or [model.decoding.temperature]) > 0

    def points(self, model: FastMemModule) -> list[dict[str, float]]:
        """All points of the grid, with the model's value for an axis of memorizing that is left out."""
        given = {name: [getattr(model.memorization, name)] for name in MEMORY_AXES} | {
            name: [tidy(name, value) for value in values] for name, values in self.grid.items()
        }
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


def check_every(every: int) -> None:
    """Refuse a stride below 1.

    Raises:
        FastMemError: for it.
    """
    if every < 1:
        raise FastMemError(f"search.every: {every} is out of range; allowed: at least 1")


def tidy(name: str, value: float) -> float:
    """A whole number where the setting takes one."""
    return int(value) if name in _WHOLE else float(value)


def check_value(model: FastMemModule, name: str, value: float, where: str = "search.grid") -> None:
    """Refuse a value that the setting does not take.

    Args:
        model: whose settings take it.
        name: of the axis.
        value: of it.
        where: it was given, for the message.

    Raises:
        FastMemError: naming the axis and what is allowed.
    """
    if name in _WHOLE and (not math.isfinite(value) or value != int(value)):
        raise FastMemError(f"{where}.{name}: {value} is no whole number")
    if name == "steps" and value < 1:
        raise FastMemError(
            f"{where}.steps: {tidy(name, value)} is out of range; allowed: at least 1 (zero-shot is "
            "answered anyway)"
        )
    settings = model.memorization if name in MEMORY_AXES else model.decoding
    try:
        replace(settings, **{name: tidy(name, value)})
    except FastMemError as error:
        raise FastMemError(f"{where}.{str(error).split('.', 2)[-1]}") from None


def _check_grid(grid: Mapping[str, Sequence[float]], model: FastMemModule) -> None:
    if not grid:
        raise FastMemError(
            "search.grid: empty; give values of one axis or more, such as "
            "--search.grid '{learning_rate: [1e-5, 1e-4], steps: [10, 20]}'"
        )
    for name, values in grid.items():
        if not values:
            raise FastMemError(f"search.grid.{name}: empty; give one value or more, or leave the axis out")
        for value in values:
            check_value(model, name, value)
        if len(set(values)) < len(values):
            raise FastMemError(f"search.grid.{name}: a value stands twice in {list(values)}")


def _check_objective(objective: str, model: FastMemModule, samples: Iterable[ContextSample]) -> None:
    if objective not in SCORES:
        raise unknown("search.objective", objective, SCORES)
    for task in sorted({sample.task for sample in samples}):
        if objective not in TASKS[task].scores:
            raise FastMemError(
                f"search.objective: {objective!r} is no score of task {task}; "
                f"allowed: {', '.join(TASKS[task].scores)}"
            )
    if objective in METRIC_MODELS and not model.metric_models[METRIC_MODELS[objective].setting[6:]]:
        setting = METRIC_MODELS[objective].setting
        raise FastMemError(f"search.objective: {objective!r} needs a model of its own; set --{setting}")
    function = SCORES[objective].function
    if not any(
        sample.references and (not function or function("", sample.references, sample.originals) is not None)
        for sample in samples
    ):
        raise FastMemError(
            f"search.objective: no sample has an answer to score {objective!r} against; add some to the data"
        )
