"""From the records of a search to a ranking of its points, and what to doubt in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import estimate, format_score, lower_is_better

# Nothing lies beyond these, so the best value being there does not ask for a larger grid.
_BOUNDS = {"steps": 1, "kl_coeff": 0, "alpha": 0, "temperature": 0, "top_k": 0, "top_p": 1, "relative_top": 1}
# So near to the end of a range, as a share of it, a value is at the end.
_NEAR = 0.02
_MORE_SAMPLES = "lower search.every or give more data"


Range = tuple[float, float, bool]


@dataclass(frozen=True)
class Baseline:
    """Zero-shot on the samples of the search; attributes as those of :class:`RankedPoint`."""

    n: int
    value: float
    standard_error: float | None
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class RankedPoint:
    """One point of the grid.

    Attributes:
        point: setting of every axis.
        n: samples with the objective.
        value: mean of the objective.
        standard_error: of ``value``; ``None`` below two samples.
        gain: mean difference to zero-shot on the same samples; a negative one is good where lower is better.
        gain_error: standard error of ``gain``, of the paired differences; ``None`` below two samples.
        scores: mean of every score, and of ``output_words``.
        failed: samples that could not be memorized and were answered by the base model.
        seconds: mean time of memorizing and decoding a sample.
    """

    point: dict[str, float]
    n: int
    value: float
    standard_error: float | None
    gain: float
    gain_error: float | None
    scores: dict[str, float]
    failed: int
    seconds: float


@dataclass(frozen=True)
class Ranking:
    """All points, best first; ``axes`` holds the values that occur, ascending.

    ``ranges`` are those of a search by trials: lowest and highest value, and whether logarithmic.
    """

    objective: str
    axes: dict[str, list[float]]
    baseline: Baseline
    points: list[RankedPoint]
    warnings: list[str]
    ranges: dict[str, Range] | None = None

    @property
    def best(self) -> RankedPoint:
        """The first point."""
        return self.points[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the best point once more by its own name."""
        return {**asdict(self), "best": asdict(self.best)}


def rank(
    records: Sequence[Mapping[str, Any]],
    objective: str,
    axes: Mapping[str, Sequence[float]],
    ranges: Mapping[str, Range] | None = None,
) -> Ranking:
    """Rank points by the mean of the objective, those of fewer samples last.

    Before them come points that failed on a sample: it is the base model's answer that was scored there.

    Ties go to fewer steps, then smaller learning rates, then larger KL weights: nearest to the model.

    Args:
        records: of points and of zero-shot; a sample counts where zero-shot has answered it as well.
        objective: name of a score.
        axes: values of every axis. Other points, as of an earlier and larger grid, are left out.
        ranges: of a search by trials, which gives up points before their last sample; ``None`` for a grid.

    Raises:
        FastMemError: when no point has a sample with the objective in common with zero-shot.
    """
    zero_shot = {r["index"]: r for r in records if r["point"] is None and objective in r["scores"]}
    found: dict[tuple[float, ...], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        point = record["point"]
        paired = record["index"] in zero_shot and objective in record["scores"]
        if point and paired and point.keys() == axes.keys() and all(point[a] in axes[a] for a in axes):
            found.setdefault(tuple(point[a] for a in axes), {})[record["index"]] = record
    if not found:
        raise FastMemError(f"search.objective: zero-shot and the grid share no sample with {objective!r}")
    points = []
    for values, answers in found.items():
        own = [answers[index] for index in sorted(answers)]
        before = [zero_shot[index]["scores"][objective] for index in sorted(answers)]
        gain, error = _mean([r["scores"][objective] - b for r, b in zip(own, before, strict=True)])
        point, failed = dict(zip(axes, values, strict=True)), sum(r["status"] != "ok" for r in own)
        points.append(
            RankedPoint(point=point, gain=gain, gain_error=error, failed=failed, **_means(own, objective))
        )
    sign = 1 if lower_is_better(objective) else -1
    points.sort(key=lambda p: (-p.n, p.failed > 0, sign * p.value, _precedence(p.point)))
    occurring = {name: sorted({p.point[name] for p in points}) for name in axes}
    baseline = Baseline(**_means([zero_shot[index] for index in sorted(zero_shot)], objective))
    warnings = _warnings(objective, occurring, points, ranges)
    return Ranking(objective, occurring, baseline, points, warnings, dict(ranges) if ranges else None)


def format_setting(value: float, digits: int = 10) -> str:
    """Return a setting without the noise of its last binary digits."""
    return f"{value:.{digits}g}"


def _warnings(
    objective: str,
    axes: Mapping[str, list[float]],
    points: Sequence[RankedPoint],
    ranges: Mapping[str, Range] | None,
) -> list[str]:
    best = points[0]
    tied = [p for p in points if p.n == best.n and p.value == best.value]
    lines = _at_the_end(tied, axes) if ranges is None else _near_the_end(best, ranges)
    if best.n < 2:
        lines.append(f"a single sample gives no standard error and no ranking to rely on: {_MORE_SAMPLES}")
    if (-best.gain if lower_is_better(objective) else best.gain) <= (best.gain_error or 0.0):
        gain = format_score(objective, best.gain, best.gain_error, sign="+")
        lines.append(
            f"the search does not show a gain: the best {objective} differs from zero-shot's by {gain} on "
            f"{best.n} samples, which is no improvement by more than one standard error: {_MORE_SAMPLES}"
        )
    if ties := len(tied) - 1:
        lines.append(
            f"{ties} more point{'s tie' if ties > 1 else ' ties'} with the best; first is the one of fewest "
            f"steps, then of smallest learning_rate and largest kl_coeff: to tell them apart, {_MORE_SAMPLES}"
        )
    short = [p for p in points if p.n < best.n]
    if short and ranges is not None:
        lines.append(
            f"{len(short)} of {len(points)} points were given up before the last sample and are ranked last"
        )
    elif short:
        named = ["/".join(map(format_setting, p.point.values())) + f" ({p.n})" for p in short[:3]]
        lines.append(
            f"{len(short)} of {len(points)} points lack some of the {best.n} samples and are ranked last, "
            f"{'/'.join(axes)} {', '.join(named)}{', ...' if len(short) > 3 else ''}: "
            "run the same command again to complete them"
        )
    if failed := [p for p in points if p.failed]:
        lines.append(
            f"the loss was not finite in {len(failed)} of {len(points)} points, where the base model gave "
            f"{sum(p.failed for p in failed)} answers (see 'status'): leave out the largest learning rates"
        )
    return lines


def _at_the_end(tied: Sequence[RankedPoint], axes: Mapping[str, list[float]]) -> list[str]:
    """Axes on whose end the best point lies; nothing where another value does as well."""
    lines = []
    for name, values in axes.items():
        value = tied[0].point[name]
        alone = all(point.point[name] == value for point in tied)
        if alone and len(values) > 1 and value in (values[0], values[-1]) and value != _BOUNDS.get(name):
            end, more = ("smallest", "smaller") if value == values[0] else ("largest", "larger")
            lines.append(
                f"the best {name}, {format_setting(value)}, is the {end} of the grid; "
                f"the optimum may lie beyond it: add {more} values"
            )
    return lines


def _near_the_end(best: RankedPoint, ranges: Mapping[str, Range]) -> list[str]:
    lines = []
    for name, (low, high, logarithmic) in ranges.items():
        ends = (low, best.point[name], high)
        start, value, end = map(math.log, ends) if logarithmic else ends
        place = (value - start) / (end - start)
        if not _NEAR < place < 1 - _NEAR:
            near, bound, change = ("lower", low, "lower") if place < 0.5 else ("upper", high, "raise")
            if bound != _BOUNDS.get(name):
                lines.append(
                    f"the best {name}, {format_setting(ends[1], 4)}, is at the {near} end of the range; "
                    f"the optimum may lie beyond it: {change} {format_setting(bound)}"
                )
    return lines


def _means(records: Sequence[Mapping[str, Any]], objective: str) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in (*record["scores"].items(), ("output_words", record["output_words"])):
            columns.setdefault(name, []).append(value)
    value, error = _mean(columns[objective])
    seconds = _mean([r["seconds"]["memorize"] + r["seconds"]["decode"] for r in records])[0]
    scores = {name: _mean(values)[0] for name, values in columns.items()}
    return {"n": len(records), "value": value, "standard_error": error, "scores": scores, "seconds": seconds}


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    found = estimate(values)
    # Rounded, for the same scores summed in another order are the same value, and tie.
    return round(found.value, 12), found.error


def _precedence(point: Mapping[str, float]) -> list[float]:
    first = ("steps", "learning_rate", "kl_coeff")
    names = [*(name for name in first if name in point), *sorted(point.keys() - set(first))]
    return [-point[name] if name == "kl_coeff" else point[name] for name in names]
