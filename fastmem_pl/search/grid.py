"""What a search looks at: axes and their values, the points that they make, and which answers are missing."""

import importlib.util
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import METHODS, Method, decoders_using
from fastmem_pl.metrics import METRIC_MODELS, SCORES
from fastmem_pl.run.predict import FastMemModule

Point = Mapping[str, float]
"""Value of every axis by name."""

Todo = dict[int, list[Point | None]]
"""Points to evaluate by index of the sample; ``None`` stands for zero-shot."""


@dataclass(frozen=True)
class Axis:
    """A setting under ``model`` that a search may vary."""

    group: Literal["memorize", "decode"]
    whole: bool = False
    logarithmic: bool = False
    bounds: tuple[float, ...] = ()  # nothing lies beyond: the best value there asks for no larger search

    def tidy(self, value: float) -> float:
        """The value in the type that the setting takes."""
        return int(value) if self.whole else float(value)


AXES = {
    "learning_rate": Axis("memorize", logarithmic=True),
    "steps": Axis("memorize", whole=True, logarithmic=True, bounds=(1,)),
    "kl_coeff": Axis("memorize", logarithmic=True, bounds=(0,)),
    "alpha": Axis("decode", bounds=(0,)),
    "alpha_min": Axis("decode", bounds=(0,)),
    "temperature": Axis("decode", bounds=(0,)),
    "top_p": Axis("decode", bounds=(1,)),
    "top_k": Axis("decode", whole=True, bounds=(0,)),
    "repetition_penalty": Axis("decode"),
    "relative_top": Axis("decode", bounds=(0, 1)),
    "entropy_bound": Axis("decode", bounds=(1,)),
    "renyi_order": Axis("decode"),
    "gap_weight": Axis("decode", bounds=(0,)),
    "peak_weight": Axis("decode", bounds=(0,)),
}
MEMORY_AXES = tuple(name for name, axis in AXES.items() if axis.group == "memorize")


_PAPER_GRID = {
    "learning_rate": [1e-6, 3e-6, 1e-5, 3e-5],
    "steps": [10, 20, 50],
    "kl_coeff": [0.01, 0.03, 0.1, 0.3, 1.0],
}


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

    def check(self) -> None:
        """Refuse a missing package, ranges that are none, and numbers out of range."""
        if importlib.util.find_spec("optuna") is None:
            raise FastMemError(
                'search.optuna: the package optuna is not installed; pip install "fastmem-pl[optuna]"'
            )
        for name, values in self.space.items():
            where = f"search.optuna.space.{name}"
            if len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]:
                raise FastMemError(f"{where}: {values} is no range; give the lowest and the highest value")
            # Other axes of this scale refuse 0 themselves.
            if name == "kl_coeff" and values[0] == 0:
                raise FastMemError(f"{where}: 0 has no place on its logarithmic scale; allowed: above 0")
        for name, least in (("trials", 1), ("parallel", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise FastMemError(f"search.optuna.{name}: {value} is out of range; allowed: {least} or more")


@dataclass(frozen=True)
class SearchSettings:
    """What to search, and by what to judge; defaults are the paper's (arXiv 2406.16069, appendix).

    Args:
        grid: values of each axis; every combination is a point. Axes: learning_rate, steps, kl_coeff, and of
            the decoder temperature, top_p, top_k, repetition_penalty and those of its own: alpha, alpha_min,
            relative_top, entropy_bound, renyi_order, gap_weight, peak_weight. What has no axis keeps its
            value under model.
        objective: score to judge by: accuracy, contained, exact_match, f1, format_failure, original, rouge1,
            rouge2, rougeL, rougeLsum, bert_precision or factkb.
        every: search on every fifth (5) sample of the data, so that the others remain to test on.
        method: memory method to search for; left out, fastmem, or fastmem+cd where alpha is an axis.
        optuna: search a larger space by trials of Optuna instead of the grid.
    """

    grid: dict[str, list[float]] = field(default_factory=lambda: dict(_PAPER_GRID))
    objective: str = "accuracy"
    every: int = 5
    method: str | None = None
    optuna: OptunaSettings | None = None

    @property
    def values(self) -> dict[str, list[float]]:
        """Values of every axis of the grid, or both ends of the range of every axis of the trials."""
        return self.optuna.space if self.optuna else self.grid

    def chosen_method(self) -> Method:
        """The method that is searched for."""
        method = METHODS[self.method or ("fastmem+cd" if "alpha" in self.values else "fastmem")]
        if not method.memory:
            allowed = ", ".join(name for name, other in METHODS.items() if other.memory)
            raise FastMemError(f"search.method: {method.name!r} memorizes nothing; allowed: {allowed}")
        return method

    def check(self, model: FastMemModule, samples: Sequence[ContextSample]) -> None:
        """Refuse a search that cannot be done, before anything is."""
        where = "search.optuna.space" if self.optuna else "search.grid"
        if not self.values:
            raise FastMemError(f"{where}: empty; such as --{where} '{{learning_rate: [1e-5, 1e-4]}}'")
        for name in self.values:
            self._check_axis(name, model, where)
        if self.optuna:
            self.optuna.check()
        for name, values in self.values.items():
            if not values:
                raise FastMemError(f"{where}.{name}: empty; give one value or more, or leave the axis out")
            for value in values:
                if AXES[name].whole and not float(value).is_integer():
                    raise FastMemError(f"{where}.{name}: {value} is no whole number")
                if name == "steps" and value < 1:
                    raise FastMemError(f"{where}.steps: {int(value)} is out of range; allowed: at least 1")
                settings = model.memorization if AXES[name].group == "memorize" else model.decoding
                try:
                    replace(settings, **{name: AXES[name].tidy(value)})
                except FastMemError as error:
                    # Its message begins with the setting's path under model.
                    raise FastMemError(f"{where}.{str(error).split('.', 2)[-1]}") from None
            if len(set(values)) < len(values):
                raise FastMemError(f"{where}.{name}: a value stands twice in {list(values)}")
        _check_objective(self.objective, model, samples)

    def point(self, model: FastMemModule, values: Point) -> dict[str, float]:
        """Every axis of memorizing and all that vary: with the value given, else with the model's."""
        fixed = {name: getattr(model.memorization, name) for name in MEMORY_AXES}
        return fixed | {name: AXES[name].tidy(values[name]) for name in self.values}

    def points(self, model: FastMemModule) -> list[dict[str, float]]:
        """All points of the grid."""
        combinations = itertools.product(*self.grid.values())
        return [self.point(model, dict(zip(self.grid, values, strict=True))) for values in combinations]

    def _check_axis(self, name: str, model: FastMemModule, where: str) -> None:
        if name not in AXES:
            raise unknown(where, name, AXES)
        method, concerned = self.chosen_method(), decoders_using(name)
        if concerned and method.decoder not in concerned:
            raise FastMemError(
                f"{where}: {method.name!r} does not depend on {name}; leave it out, or set a search.method "
                f"with one of: {', '.join(concerned)}"
            )
        temperatures = self.values.get("temperature") or [model.decoding.temperature]
        if name in ("top_p", "top_k") and not min(temperatures) > 0:
            raise FastMemError(
                f"{where}.{name}: has no effect without drawing; set --model.decode.temperature above 0"
            )


def key_of(point: Point | None) -> Any:
    """A point as a key of dictionaries; ``None`` for zero-shot."""
    return None if point is None else tuple(sorted(point.items()))


def missing(
    points: Iterable[Point], samples: Iterable[ContextSample], records: Iterable[Mapping[str, Any]]
) -> Todo:
    """Points, and zero-shot, that have no record yet."""
    done: dict[int, set[Any]] = defaultdict(set)
    for record in records:
        done[record["index"]].add(key_of(record["point"]))
    wanted = [None, *points]
    todo = {s.index: [point for point in wanted if key_of(point) not in done[s.index]] for s in samples}
    return {index: left for index, left in todo.items() if left}


def _check_objective(objective: str, model: FastMemModule, samples: Sequence[ContextSample]) -> None:
    if objective not in SCORES:
        raise unknown("search.objective", objective, SCORES)
    where = f"search.objective: {objective!r}"
    for task in sorted({sample.task for sample in samples}):
        if objective not in TASKS[task].scores:
            allowed = ", ".join(TASKS[task].scores)
            raise FastMemError(f"{where} is no score of task {task}; allowed: {allowed}")
    setting = METRIC_MODELS[objective].setting if objective in METRIC_MODELS else None
    if setting and not model.metric_models[setting.removeprefix("model.")]:
        raise FastMemError(f"{where} needs a model of its own; set --{setting}")
    function = SCORES[objective].function or (lambda *texts: 0.0)
    if all(not s.references or function("", s.references, s.originals) is None for s in samples):
        raise FastMemError(f"{where}: no sample has an answer to score against; add some to the data")
