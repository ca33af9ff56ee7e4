"""From the records of a search to a ranking of its points, and what to doubt in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import estimate, find_score, format_score
from fastmem_pl.search.grid import AXES, MEMORY_AXES, Point, key_of

# A value nearer to the end of a range than this share of it is at the end.
_NEAR = 0.02
_MORE_SAMPLES = "lower search.every or give more data"

Range = tuple[float, float, bool]  # lowest and highest value, and whether the scale is logarithmic


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Results of zero-shot: means over the ``n`` samples of the search that have the objective.

    ``value`` is that of the objective; standard errors are ``None`` below two samples.
    """

    n: int
    value: float
    standard_error: float | None
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RankedPoint(Baseline):
    """Results of one point.

    Attributes:
        gain: mean of the paired differences to zero-shot; a negative one is good where lower is better.
        failed: samples that could not be memorized and were answered by the base model.
    """

    point: dict[str, float]
    gain: float
    gain_error: float | None
    failed: int


@dataclass(frozen=True)
class Ranking:
    """All points, best first; ``axes`` are the values that occur, ascending, ``ranges`` those of trials."""

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
        """Plain values for JSON, the best point once more under its own name."""
        return {**asdict(self), "best": asdict(self.best)}


def rank(
    records: Sequence[Mapping[str, Any]],
    objective: str,
    points: Sequence[Point],
    ranges: Mapping[str, Range] | None = None,
) -> Ranking:
    """Rank points by the mean of the objective, those of fewer samples last.

    Before them come points that failed on a sample: it is the base model's answer that was scored there.
    Ties go to fewer steps, then smaller learning rates, then larger KL weights: nearest to the model.

    A sample counts where zero-shot has answered it as well. Records of other points, as of an earlier and
    larger grid, are left out. ``ranges`` are those of a search by trials.
    """
    by_key = {key_of(point): dict(point) for point in points}
    rows = []
    for record in (record for record in records if objective in record["scores"]):
        scores = {**record["scores"], "output_words": record["output_words"]}
        about = record["index"], key_of(record["point"]), scores[objective], scores
        rows.append((*about, record["status"] != "ok", sum(record["seconds"].values())))
    columns = ["index", "key", "value", "scores", "failed", "seconds"]
    table = pd.DataFrame(rows, columns=columns).sort_values("index")
    zero_shot = table[table["key"].isna()].set_index("index")
    pairs = table[table["key"].isin(by_key) & table["index"].isin(zero_shot.index)]
    if pairs.empty:
        raise FastMemError(f"search.objective: zero-shot and the search share no sample with {objective!r}")
    ranked = []
    for key, rows in pairs.groupby("key", sort=False):
        gain = estimate(rows["value"] - rows["index"].map(zero_shot["value"]))
        own = {"point": by_key[key], "failed": int(rows["failed"].sum())}
        ranked.append(RankedPoint(**own, gain=gain.value, gain_error=gain.error, **_results(rows)))
    sign = 1 if find_score(objective).lower_is_better else -1

    def precedence(entry: RankedPoint) -> tuple[Any, ...]:
        point = entry.point
        nearest = [point["steps"], point["learning_rate"], -point["kl_coeff"]]
        nearest += [value for name, value in sorted(point.items()) if name not in MEMORY_AXES]
        return -entry.n, entry.failed > 0, sign * entry.value, nearest

    ranked.sort(key=precedence)
    axes = {name: sorted({p.point[name] for p in ranked}) for name in points[0]}
    ranges = dict(ranges) if ranges else None
    warnings = _warnings(objective, axes, ranked, ranges)
    return Ranking(objective, axes, Baseline(**_results(zero_shot)), ranked, warnings, ranges)


def _results(rows: pd.DataFrame) -> dict[str, Any]:
    mean, seconds = estimate(rows["value"]), float(rows["seconds"].mean())
    scores = pd.DataFrame(list(rows["scores"])).mean().to_dict()
    found = {"n": mean.n, "value": mean.value, "standard_error": mean.error}
    return {**found, "scores": scores, "seconds": seconds}


def _warnings(
    objective: str,
    axes: Mapping[str, list[float]],
    points: Sequence[RankedPoint],
    ranges: Mapping[str, Range] | None,
) -> list[str]:
    best, total = points[0], len(points)
    tied = [p for p in points if p.n == best.n and p.value == best.value]
    lines = [_end_warning(name, tied, values, ranges) for name, values in (ranges or axes).items()]
    if best.n < 2:
        lines.append(f"a single sample gives no standard error and no ranking to rely on: {_MORE_SAMPLES}")
    if (-best.gain if find_score(objective).lower_is_better else best.gain) <= (best.gain_error or 0.0):
        gain = format_score(objective, best.gain, best.gain_error, sign="+")
        lines.append(
            f"the search does not show a gain: the best {objective} differs from zero-shot's by {gain} on "
            f"{best.n} samples, no more than one standard error: {_MORE_SAMPLES}"
        )
    if ties := len(tied) - 1:
        tie = "points tie" if ties > 1 else "point ties"
        lines.append(f"{ties} more {tie} with the best, which is nearest to the model: {_MORE_SAMPLES}")
    if short := sum(p.n < best.n for p in points):
        lines.append(f"{short} of {total} points were given up before the last sample and are ranked last")
    if failed := [p.failed for p in points if p.failed]:
        lines.append(
            f"the loss was not finite in {len(failed)} of {total} points, where the base model gave "
            f"{sum(failed)} answers: leave out the largest learning rates"
        )
    return list(filter(None, lines))


def _end_warning(
    name: str, tied: Sequence[RankedPoint], values: Sequence[float], ranges: Mapping[str, Range] | None
) -> str | None:
    """Where the best value of an axis lies at an end of what was searched, and, in a grid, no other ties."""
    best, low, high = tied[0].point[name], values[0], values[1 if ranges else -1]
    if high <= low or (ranges is None and any(point.point[name] != best for point in tied)):
        return None
    near = _NEAR if ranges else 0.0
    scale = math.log if ranges and values[2] else float
    share = (scale(best) - scale(low)) / (scale(high) - scale(low))
    bound, end, further = (low, "lower", "smaller") if share < 0.5 else (high, "upper", "larger")
    if near < share < 1 - near or bound in AXES[name].bounds:
        return None
    return (
        f"the best {name}, {best:g}, is at the {end} end; the optimum may lie beyond {bound:g}: search "
        f"{further} values, too"
    )
