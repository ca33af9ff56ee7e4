"""From the records of a search to a ranking of its points, and what to doubt in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import format_score, lower_is_better
from fastmem_pl.search.grid import AXES, Point, key_of

# A value nearer to the end of a range than this share of it is at the end.
_NEAR = 0.02
_MORE_SAMPLES = "lower search.every or give more data"

Range = tuple[float, float, bool]
"""Lowest and highest value of an axis, and whether its scale is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Results of zero-shot on the samples of the search.

    Attributes:
        n: samples with the objective.
        value: mean of the objective.
        standard_error: of ``value``; ``None`` below two samples.
        scores: mean of every score, and of ``output_words``.
        seconds: mean time of memorizing and decoding a sample.
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
        point: setting of every axis.
        gain: mean difference to zero-shot on the same samples; a negative one is good where lower is better.
        gain_error: standard error of ``gain``, of the paired differences; ``None`` below two samples.
        failed: samples that could not be memorized and were answered by the base model.
    """

    point: dict[str, float]
    gain: float
    gain_error: float | None
    failed: int


@dataclass(frozen=True)
class Ranking:
    """All points, best first; ``axes`` holds the values that occur, ascending.

    ``ranges`` are those of a search by trials.
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

    Args:
        records: of points and of zero-shot; a sample counts where zero-shot has answered it as well.
        objective: name of a score.
        points: to rank. Records of others, as of an earlier and larger grid, are left out.
        ranges: of a search by trials, which gives up points before their last sample; ``None`` for a grid.

    Raises:
        FastMemError: when no point has a sample with the objective in common with zero-shot.
    """
    scored = [record for record in records if objective in record["scores"]]
    by_key = {key_of(point): dict(point) for point in points}
    zero_shot = _table([record for record in scored if record["point"] is None], objective)
    table = _table([record for record in scored if key_of(record["point"]) in by_key], objective)
    pairs = table.merge(zero_shot[["index", "value"]], on="index", suffixes=("", "_before"))
    if pairs.empty:
        raise FastMemError(f"search.objective: zero-shot and the search share no sample with {objective!r}")
    pairs["gain"] = pairs["value"] - pairs["value_before"]
    ranked = [
        RankedPoint(
            point=by_key[key],
            gain=_mean(rows["gain"]),
            gain_error=_error(rows["gain"]),
            failed=int(rows["failed"].sum()),
            **_results(rows),
        )
        for key, rows in pairs.groupby("key", sort=False)
    ]
    sign = 1 if lower_is_better(objective) else -1
    ranked.sort(key=lambda p: (-p.n, p.failed > 0, sign * p.value, _precedence(p.point)))
    axes = {name: sorted({p.point[name] for p in ranked}) for name in points[0]}
    baseline = Baseline(**_results(zero_shot))
    warnings = _warnings(objective, axes, ranked, ranges)
    return Ranking(objective, axes, baseline, ranked, warnings, dict(ranges) if ranges else None)


def format_setting(value: float, digits: int = 10) -> str:
    """Return a setting without the noise of its last binary digits."""
    return f"{value:.{digits}g}"


def _table(records: Iterable[Mapping[str, Any]], objective: str) -> pd.DataFrame:
    """One row a record, in the order of the data."""
    rows = [
        (
            record["index"],
            key_of(record["point"]),
            record["scores"][objective],
            {**record["scores"], "output_words": record["output_words"]},
            record["status"] != "ok",
            sum(record["seconds"].values()),
        )
        for record in records
    ]
    return pd.DataFrame(rows, columns=["index", "key", "value", "scores", "failed", "seconds"]).sort_values(
        "index"
    )


def _results(rows: pd.DataFrame) -> dict[str, Any]:
    scores = pd.DataFrame(list(rows["scores"]))
    return {
        "n": len(rows),
        "value": _mean(rows["value"]),
        "standard_error": _error(rows["value"]),
        "scores": {name: _mean(scores[name]) for name in scores},
        "seconds": _mean(rows["seconds"]),
    }


def _mean(values: pd.Series) -> float:
    # Rounded, as the same scores summed in another order are the same value, and tie.
    return round(float(values.mean()), 12)


def _error(values: pd.Series) -> float | None:
    return float(values.sem()) if len(values) > 1 else None


def _precedence(point: Point) -> list[float]:
    names = ("steps", "learning_rate", "kl_coeff", *sorted(point))
    return [-point[name] if name == "kl_coeff" else point[name] for name in names]


def _warnings(
    objective: str,
    axes: Mapping[str, list[float]],
    points: Sequence[RankedPoint],
    ranges: Mapping[str, Range] | None,
) -> list[str]:
    best = points[0]
    tied = [p for p in points if p.n == best.n and p.value == best.value]
    lines = _at_an_end(tied, axes, ranges)
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


def _at_an_end(
    tied: Sequence[RankedPoint], axes: Mapping[str, list[float]], ranges: Mapping[str, Range] | None
) -> list[str]:
    """Axes on whose end the best point lies; of a grid, where no other value does as well."""
    lines = []
    for name, values in axes.items() if ranges is None else ranges.items():
        low, high = values[0], values[1 if ranges else -1]
        best = tied[0].point[name]
        near = _NEAR if ranges else 0.0
        scale = math.log if ranges and values[2] else float
        share = (scale(best) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        alone = ranges is not None or all(point.point[name] == best for point in tied)
        bound, end, further = (low, "lower", "smaller") if share < 0.5 else (high, "upper", "larger")
        if alone and not near < share < 1 - near and bound != AXES[name].bound:
            lines.append(
                f"the best {name}, {format_setting(best, 4)}, is at the {end} end; the optimum may lie "
                f"beyond {format_setting(bound)}: search {further} values, too"
            )
    return lines
