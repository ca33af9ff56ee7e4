"""The tables of a report as rows of texts, for the page, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fastmem_pl.data import TASKS
from fastmem_pl.decoding.methods import BASELINE
from fastmem_pl.metrics import SCORES, format_score, lower_is_better
from fastmem_pl.metrics.statistics import Estimate, Paired, estimate, format_p, paired
from fastmem_pl.report.collect import Comparison, Variant
from fastmem_pl.report.page import Cell, PageTable
from fastmem_pl.report.paper import published
from fastmem_pl.run.records import Record

_QUESTION_SCORES = ("accuracy", "contained", "exact_match", "f1", "format_failure", "original")
_SUMMARY_SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bert_precision", "factkb")
# The one score of a data set where there is room for one; the first that the records have.
_PRIMARY = ("accuracy", "factkb", "bert_precision", "rougeL")
LEGEND = (
    "Mean ± standard error, and the change against zero-shot on the same samples (samples gained and lost, "
    "exact McNemar test; of scores that are not 0 or 1 the mean difference, paired bootstrap). The p-values "
    "are not corrected for the number of comparisons. Where the settings are the paper's, its value stands "
    "beside, on its own data."
)


@dataclass(frozen=True)
class Result:
    """One method's score on one data set.

    Attributes:
        estimate: mean over samples.
        against: zero-shot on the same samples; ``None`` for zero-shot itself, or where nobody ran it.
        published: the paper's value, where settings are the paper's.
    """

    estimate: Estimate
    against: Paired | None = None
    published: float | None = None


def result(comparison: Comparison, variant: Variant, dataset: int, score: str) -> Result | None:
    """Value, test and published value of one cell; ``None`` where no sample has the score."""
    key = (variant.system, variant.method, dataset, score)
    if key not in comparison.results:
        comparison.results[key] = _result(comparison, variant, dataset, score)
    return comparison.results[key]


def _result(comparison: Comparison, variant: Variant, dataset: int, score: str) -> Result | None:
    values = _values(variant.records.get(dataset, {}), score)
    if not values:
        return None
    against = None
    if variant.method != BASELINE:
        base = _values(comparison.baseline(variant, dataset), score)
        both = [index for index in values if index in base]
        if both:
            binary = score in SCORES and SCORES[score].binary
            against = paired([base[i] for i in both], [values[i] for i in both], binary)
    task = comparison.datasets[dataset].task
    known = (published(run, task, variant.method, score) for run in comparison.runs_of(variant, dataset))
    paper = next((value for value in known if value is not None), None)
    return Result(estimate(list(values.values())), against, paper)


def _values(records: Mapping[int, Record], score: str) -> dict[int, float]:
    """A score of the samples that have it; some lack references."""
    return {i: record["scores"][score] for i, record in records.items() if score in record["scores"]}


def scores_of(comparison: Comparison, dataset: int) -> list[str]:
    """Scores that records of a data set have, in the order of tables."""
    found = {
        name for v in comparison.variants for r in v.records.get(dataset, {}).values() for name in r["scores"]
    }
    known = [name for name in (*_QUESTION_SCORES, *_SUMMARY_SCORES) if name in found]
    return [*known, *sorted(found - set(known))]


def primary_score(comparison: Comparison, dataset: int) -> str | None:
    """The score that stands for a data set: the paper's, where records have it."""
    scores = scores_of(comparison, dataset)
    return next((name for name in (*_PRIMARY, *scores) if name in scores), None)


def overview(comparison: Comparison) -> PageTable | None:
    """Method by data set, one score each; ``None`` where there is one data set only."""
    if len(comparison.datasets) < 2:
        return None
    chosen = [(place, primary_score(comparison, place)) for place in comparison.order]
    columns = [(place, score) for place, score in chosen if score]
    header = ["method", *(f"{comparison.datasets[place].label}: {_label(score)}" for place, score in columns)]
    return _score_table("All data sets", header, comparison, comparison.variants, columns)


def dataset_table(comparison: Comparison, dataset: int) -> PageTable:
    """All scores of one data set, length and seconds of the answers."""
    variants = [variant for variant in comparison.variants if dataset in variant.records]
    scores = scores_of(comparison, dataset)
    table = _score_table(
        _title(comparison, dataset, variants),
        ["method", *map(_label, scores), "words", "s/sample"],
        comparison,
        variants,
        [(dataset, score) for score in scores],
    )
    for variant, row in zip(variants, table.rows, strict=True):
        records = list(variant.records[dataset].values())
        words = estimate([record["output_words"] for record in records])
        row += [Cell(format_score("output_words", words.value, words.error)), Cell(_seconds(records))]
    return table


def _score_table(
    title: str,
    header: list[str],
    comparison: Comparison,
    variants: Sequence[Variant],
    columns: Sequence[tuple[int, str]],
) -> PageTable:
    found = {(v.label, c): result(comparison, v, *c) for v in variants for c in columns}
    best = {column: _best(column[1], (found[v.label, column] for v in variants)) for column in columns}
    rows = []
    for variant in variants:
        row = [Cell(variant.label)]
        for column in columns:
            total = len(variant.records.get(column[0], ()))
            row.append(_cell(column[1], found[variant.label, column], best[column], total))
        rows.append(row)
    return PageTable(title, header, rows, LEGEND)


def _best(score: str, results: Iterable[Result | None]) -> float | None:
    """The best value of a column, unless half of its rows or more have it."""
    values = [one.estimate.value for one in results if one]
    best = (min if lower_is_better(score) else max)(values, default=None)
    return best if 2 * values.count(best) < len(values) or len(set(values)) == len(values) > 1 else None


def _cell(score: str, found: Result | None, best: float | None, total: int) -> Cell:
    if found is None:
        return Cell("–")
    notes = [f"n = {found.estimate.n}"] if found.estimate.n < total else []
    if found.against and found.against.gained + found.against.lost:
        notes.append(_change(score, found.against))
    if found.published is not None:
        notes.append(f"paper {format_score(score, found.published)}")
    text = format_score(score, found.estimate.value, found.estimate.error)
    return Cell(text, "; ".join(notes), found.estimate.value == best)


def _change(score: str, against: Paired) -> str:
    """``+11 −1, p = 0.006`` or ``+1.2, p = 0.300``."""
    if against.test == "exact McNemar":
        change = f"+{against.gained} −{against.lost}"
    else:
        change = format_score(score, against.difference, sign="+").rstrip("%").replace("-", "−")
    return f"{change}, {format_p(against.p_value)}"


def _title(comparison: Comparison, dataset: int, variants: Sequence[Variant]) -> str:
    counts = sorted({len(variant.records[dataset]) for variant in variants})
    shown = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    found = comparison.datasets[dataset]
    about = TASKS[found.task].description if found.task in TASKS else ""
    return f"{found.label}: {shown} sample{'' if shown == '1' else 's'}" + (f" ({about})" if about else "")


def _label(score: str) -> str:
    return SCORES[score].label if score in SCORES else score


def _seconds(records: Sequence[Record]) -> str:
    return f"{sum(sum(record['seconds'].values()) for record in records) / len(records):.2f}"


def cost_table(comparison: Comparison) -> PageTable:
    """Seconds a sample for memorizing and decoding, by method and data set."""
    header = ["method", "data", "memorize, s", "decode, s", "sum, s", "tokens of the answer"]
    header += ["decode, ms a token"]
    rows = []
    for place in comparison.tasks:
        dataset = comparison.datasets[place]
        for variant in comparison.variants:
            records = list(variant.records.get(place, {}).values())
            if not records:
                continue
            seconds = {n: sum(r["seconds"].get(n, 0.0) for r in records) for n in ("memorize", "decode")}
            tokens = sum(len(record.get("token_ids") or ()) for record in records)
            cells = [variant.label, dataset.label]
            cells += [f"{seconds[name] / len(records):.3f}" for name in ("memorize", "decode")]
            cells += [f"{sum(seconds.values()) / len(records):.3f}", f"{tokens / len(records):.1f}"]
            cells += [f"{1000 * seconds['decode'] / tokens:.1f}" if tokens else "–"]
            rows.append([Cell(cell) for cell in cells])
    caption = (
        "Means over samples; a batch's seconds are shared out among its samples. Every method that memorizes "
        "counts the memorizing that all of them share, and decoding counts the prompt's pass, "
        "in its milliseconds a token, too."
    )
    return PageTable("Seconds a sample", header, rows, caption)


def memory_table(comparison: Comparison) -> PageTable | None:
    """Peak memory by phase and run; ``None`` where no run measured it."""
    runs = [run for run in comparison.runs if run.metrics.get("peak_memory_gib")]
    phases = list(dict.fromkeys(phase for run in runs for phase in run.metrics["peak_memory_gib"]))
    rows = []
    for run in runs:
        device = (run.metrics.get("environment") or {}).get("device") or {}
        peaks = run.metrics["peak_memory_gib"]
        cells = [run.label, str(device.get("name") or device.get("type") or "–")]
        rows.append([Cell(c) for c in (*cells, *(f"{peaks[p]:.2f}" if p in peaks else "–" for p in phases))])
    caption = "GiB, the weights included: allocated on a GPU, resident on a CPU."
    return PageTable("Peak memory", ["run", "device", *phases], rows, caption) if rows else None


def curve_table(comparison: Comparison) -> PageTable | None:
    """What memorizing did to the loss, by data set and system; ``None`` where nothing was memorized."""
    header = ["data", "samples", "steps", "cross-entropy, first step", "last step", "KL, last step"]
    rows = []
    for label, curves in curves_of(comparison).items():
        steps = max(len(curve["cross_entropy"]) for curve in curves)
        ends = {
            "before": median(c["cross_entropy"][0] for c in curves),
            "after": median(c["cross_entropy"][-1] for c in curves),
            "kl": median(c["kl"][-1] for c in curves),
        }
        cells = [label, str(len(curves)), str(steps)]
        cells += [f"{ends['before']:.3f}", f"{ends['after']:.3f}", f"{ends['kl']:.4f}"]
        rows.append([Cell(cell) for cell in cells])
    caption = (
        "Medians over samples, nats a token; each value is from before its step's update, so "
        "that the last update shows in none."
    )
    return PageTable("Memorizing", header, rows, caption) if rows else None


def curves_of(comparison: Comparison) -> dict[str, list[Mapping[str, Sequence[float]]]]:
    """Loss curves of all memorized samples by data set, and by system where there are several."""
    found: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for place in comparison.tasks:
        dataset = comparison.datasets[place]
        systems: dict[int, Variant] = {}
        for variant in comparison.variants:
            if variant.memory and place in variant.records:
                # All methods of a system share the memory.
                systems.setdefault(variant.system, variant)
        for variant in systems.values():
            system = variant.label.partition(" · ")[2]
            curves = [
                record["curve"]
                for record in variant.records[place].values()
                if record.get("curve")
                and record["curve"].get("cross_entropy")
                and record.get("status") == "ok"
            ]
            if curves:
                found[f"{dataset.label} · {system}" if system else dataset.label] = curves
    return found
