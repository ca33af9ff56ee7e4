"""All methods on real data: settings searched with one budget, answers to other records, paired tests.

    python benchmarks/quality.py --data FOLDER      # writes the CSV files and docs/quality.md
    python benchmarks/quality.py --data FOLDER --model Qwen/Qwen2.5-7B-Instruct \\
        --learning-rates 1e-5 1e-6 3e-5
    python benchmarks/quality.py --render           # docs/quality.md from the CSV files

The folder has `nqswap.json`, `memotrap.json`, `squad.json` and `hotpotqa.json`. Of each, the first records
validate: every method that has settings is tried with twelve points of them, and keeps the one of the best
accuracy. The records after them are the test, which no choice has seen. A task that is run again takes the
place of its rows, so that parts of the comparison can be run one by one (`--tasks`, `--model`).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastmem_pl import Backbone, DecodingSettings, FastMemModule, MemorizationSettings, Memorizer
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.data.reader import read_samples
from fastmem_pl.decoding import BASELINE, DECODERS, METHODS, Method
from fastmem_pl.metrics import estimate, score_answer
from fastmem_pl.metrics.statistics import paired
from fastmem_pl.run.provenance import environment

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "quality.md"
# File and test records of each task.
DATA = {
    "nqswap": ("nqswap", 400),
    "memotrap": ("memotrap", 300),
    "qa": ("squad", 300),
    "hotpotqa": ("hotpotqa", 300),
}
BUDGET = 12
# Opening the answer keeps a small model in the format that is scored; then 40 tokens do.
PREFIX, NEW_TOKENS = "The answer is:", 40
MEMORIZE = {"learning_rate": 1e-4, "steps": 10, "kl_coeff": 0.1}
# What is tried beside the learning rates and 10 or 20 steps of methods with a memory: two values each.
WITH_MEMORY = {
    "fastmem": {"kl_coeff": (0.1, 1.0)},
    "fastmem+cd": {"alpha": (0.5, 1.0)},
    "fastmem+adacd": {"alpha": (1.0, 10.0)},
    "fastmem+cad": {"alpha": (0.5, 1.0)},
    "fastmem+adacad": {"alpha": (1.0, 2.0)},
    "fastmem+coiecd": {"entropy_bound": (0.25, 0.1)},
    "fastmem+dola": {"relative_top": (0.1, 0.01)},
}
WITHOUT_MEMORY = {
    BASELINE: {},
    "one-shot": {},
    "cad": {"alpha": (0.5, 0.1, 0.25, 1.0, 1.5, 2.0), "relative_top": (0.0, 0.1)},
    "adacad": {"alpha": (1.0, 0.5, 2.0), "alpha_min": (0.0, 0.3), "relative_top": (0.0, 0.1)},
    "coiecd": {"alpha": (1.0, 0.5, 2.0), "entropy_bound": (0.25, 0.1), "relative_top": (0.0, 0.1)},
    "cocoa": {"gap_weight": (1.0, 0.5, 2.0), "peak_weight": (5.0, 2.0), "renyi_order": (0.5, 0.3)},
    "ck-plug": {"alpha": (None, 0.0, 0.1, 0.25, 0.5, 0.75), "relative_top": (0.01, 0.1)},
    "dola": {"relative_top": (0.1, 0.01, 0.3, 0.6), "repetition_penalty": (1.2, 1.1, 1.0)},
}
SCORES = ("accuracy", "contained", "exact_match", "f1", "format_failure")
SETUP = ("model", "task")

Point = Mapping[str, float | None]


def grid(method: str, learning_rates: Sequence[float]) -> list[Point]:
    """The points of a method, its papers' settings first; one without settings has a single empty one."""
    axes: Mapping[str, Sequence[float | None]] = WITHOUT_MEMORY.get(method, {})
    if method in WITH_MEMORY:
        axes = {"learning_rate": learning_rates, "steps": (10, 20), **WITH_MEMORY[method]}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def split(
    path: Path, task: str, validation: int, test: int
) -> tuple[list[ContextSample], list[ContextSample]]:
    """Validation and test samples: no record is in both, or twice in one."""
    records = json.loads(path.read_text())
    records = list({json.dumps(record, sort_keys=True): record for record in records}.values())
    if len(records) < validation + test:
        raise SystemExit(
            f"{path}: {len(records)} different records, wanted: {validation} + {test}; give more, or lower "
            "--validation or --test"
        )
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "records.json"
        chosen.write_text(json.dumps(records[: validation + test]))
        samples = read_samples(chosen, task, None, PREFIX, None)
    return samples[:validation], samples[validation:]


def answer_scores(
    module: FastMemModule,
    samples: Sequence[ContextSample],
    points: Mapping[str, Sequence[Point]],
    batch_size: int,
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Scores by sample of every method's points, ``(method, place of the point)``."""
    groups: dict[Any, list[tuple[Method, int, Point]]] = defaultdict(list)
    for name, own in points.items():
        for place, point in enumerate(own):
            settings = {key: point.get(key, value) for key, value in MEMORIZE.items()}
            # Points that memorize alike share the memory; a group's recorded steps are kept while it lasts.
            key = tuple(settings.items()) if METHODS[name].memory else name
            groups[key].append((METHODS[name], place, point))
    found = defaultdict(list)
    for key, asked in groups.items():
        for start in range(0, len(samples), batch_size):
            batch = list(samples[start : start + batch_size])
            encoded = module.encode(batch)
            prefills, memory = module.prefills(encoded), None
            if asked[0][0].memory:
                memorizer = Memorizer(module.backbone, MemorizationSettings(**dict(key)))
                memory = memorizer.fit([one.context for one in encoded]).to(module.backbone.compute_dtype)
            for method, place, point in asked:
                decoding = replace(module.decoding, **{k: v for k, v in point.items() if k not in MEMORIZE})
                answers, _ = module.answer(batch, method, memory, prefills, decoding)
                found[method.name, place] += [
                    score_answer(TASKS[s.task].scores, PREFIX + answer.text, s.references, s.originals)
                    for s, answer in zip(batch, answers, strict=True)
                ]
        module.graphs.clear()
    return found


def compare(
    module: FastMemModule, validation: Sequence[ContextSample], test: Sequence[ContextSample], options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Search every method's settings on the validation samples, and answer the test samples with the best."""
    grids = {method: grid(method, options.learning_rates) for method in options.methods}
    # A single point needs no search.
    searched = answer_scores(
        module, validation, {m: own for m, own in grids.items() if len(own) > 1}, options.batch_size
    )
    points, best = [], {method: own[0] for method, own in grids.items()}
    means = {
        key: tuple(estimate([one[score] for one in scores]).value for score in ("accuracy", "f1"))
        for key, scores in searched.items()
    }
    for (method, place), (accuracy, f1) in means.items():
        points.append({"method": method, "settings": shown(grids[method][place])})
        points[-1] |= {"accuracy": round(accuracy, 4), "f1": round(f1, 4)}
    for method, own in grids.items():
        if len(own) > 1:
            # Of those that tie in both scores the first, which is nearest to the papers.
            best[method] = own[max(range(len(own)), key=lambda place: means[method, place])]
    answered = answer_scores(
        module, test, {method: [point] for method, point in best.items()}, options.batch_size
    )
    accuracy = {method: [one["accuracy"] for one in scores] for (method, _), scores in answered.items()}
    top = max(accuracy, key=lambda method: estimate(accuracy[method]).value)
    against = {
        base: holm(
            {m: paired(accuracy[base], own, binary=True).p_value for m, own in accuracy.items() if m != base}
        )
        for base in (BASELINE, top)
    }
    rows = []
    for method in grids:
        scores = answered[method, 0]
        row = {"method": method, "settings": shown(best[method]), "samples": len(scores)}
        for score in SCORES:
            value = estimate([one[score] for one in scores])
            row |= {score: round(value.value, 4), f"{score}_error": round(value.error or 0.0, 4)}
        change = paired(accuracy[BASELINE], accuracy[method], binary=True)
        row |= {"gained": change.gained, "lost": change.lost}
        row |= {"p_holm": against[BASELINE].get(method, ""), "p_holm_best": against[top].get(method, "")}
        rows.append(row)
    return rows, points


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values (Holm, 1979), by name.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = round(largest, 6)
    return adjusted


def shown(point: Point) -> str:
    return ", ".join(f"{name} {'own' if value is None else f'{value:g}'}" for name, value in point.items())


def measure(options: argparse.Namespace) -> None:
    """Compare on every task with every model, and write both CSV files after each."""
    device, done = (
        torch.device(options.device),
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True),
    )
    where = environment(device)
    for source in options.model:
        backbone = Backbone.load(source, options.precision, device)
        module = FastMemModule(
            backbone=source, methods=options.methods, decode=DecodingSettings(max_new_tokens=NEW_TOKENS)
        )
        module.load_backbone(options.precision, device, backbone)
        for task in options.tasks:
            file, count = DATA[task]
            sides = split(options.data / f"{file}.json", task, options.validation, options.test or count)
            # Validation and test are read together, so that their samples keep indices of their own.
            rows, points = compare(module, *sides, options)
            setup = {"model": source.rstrip("/").split("/")[-1], "task": task}
            about = {
                "validation": options.validation,
                "precision": options.precision,
                "batch_size": options.batch_size,
                "device": where["device"]["name"],
                **{name: where["packages"][name] for name in ("torch", "transformers")},
                "commit": os.environ.get("FASTMEM_COMMIT") or done.stdout.strip(),
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
            }
            options.out.mkdir(parents=True, exist_ok=True)
            update(options.out / "quality.csv", [{**setup, **row, **about} for row in rows])
            update(options.out / "quality_search.csv", [{**setup, **point} for point in points])
            for row in rows:
                print(*setup.values(), row["method"], row["accuracy"], row["p_holm"], flush=True)


def update(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows in the place of those of the same model and task."""
    new = {tuple(row[name] for name in SETUP) for row in rows}
    kept = [row for row in read_csv(path) if row.keys() == rows[0].keys()] if path.exists() else []
    kept = [row for row in kept if tuple(row[name] for name in SETUP) not in new]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cost(method: str) -> int:
    """Rough order of what an answer takes: nothing more, a second prompt, a memory, or both."""
    made_by = DECODERS[METHODS[method].decoder]
    return 2 * METHODS[method].memory + getattr(made_by, "needs_without_context", False)


COSTS = ("nothing beside the prompt", "a second prompt", "a memory", "a memory and a second prompt")


def page(rows: Sequence[Mapping[str, str]], chart: str) -> Iterator[str]:
    """The lines of docs/quality.md."""
    first, methods = rows[0], len({row["method"] for row in rows})
    yield "# All methods on real data"
    yield ""
    yield "<!-- written by: python benchmarks/quality.py -->"
    yield ""
    yield (
        f"{methods} methods, each with settings of its own: those of {BUDGET} points that answered "
        f"{first['validation']} validation records best (accuracy, then F1; zero-shot and one-shot have "
        "nothing to search). The tables are of other records, which no choice has seen. Answers open with "
        f'"{PREFIX}" and have {NEW_TOKENS} tokens at most. All validation points are in '
        "`benchmarks/results/quality_search.csv`."
    )
    yield ""
    yield (
        f"{first['precision']}, batches of {first['batch_size']}, on {first['device']} with torch "
        f"{first['torch']} and transformers {first['transformers']} (`python benchmarks/quality.py`, commit "
        f"{first['commit']}, {first['date']})."
    )
    yield ""
    yield (
        "Values are percentages ± standard error. *gained* and *lost* are test records against zero-shot; p "
        "is the exact McNemar test of accuracy on them, with Holm's correction over the methods of a table. "
        '*accuracy*: the reference follows "The answer is:"; *contained*: it occurs anywhere; *format '
        'failure*: "The answer is:" is missing.'
    )
    yield ""
    yield (
        "MemoTrap's context is the instruction that names the word to end in, so memorizing it makes that "
        "word likely: it shows that the mechanism works, less how useful it is."
    )
    yield ""
    yield f"![Accuracy by method and task]({chart})"
    tables: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        tables[row["model"], row["task"]].append(row)
    for (model, task), own in tables.items():
        yield ""
        yield f"## {task}, {model} ({own[0]['samples']} test records)"
        yield ""
        heads = ("method", *SCORES, "gained", "lost", "p", "settings")
        yield "| " + " | ".join(heads).replace("_", " ") + " |"
        yield "| --- |" + " --- |" * (len(heads) - 1)
        for row in own:
            cells = [f"{100 * float(row[s]):.1f} ± {100 * float(row[s + '_error']):.1f}" for s in SCORES]
            p_value = row["p_holm"] and (
                f"{float(row['p_holm']):.3f}" if float(row["p_holm"]) >= 5e-4 else "< 0.001"
            )
            cells += [row["gained"], row["lost"], p_value, row["settings"]]
            yield f"| {row['method']} | {' | '.join(cells)} |"
    yield ""
    yield "## Which method when"
    yield ""
    yield (
        "By the tables above: the best method of each, those that its test records cannot tell from the best "
        "(exact McNemar, Holm, p at least 0.05), and of all these the first that costs least."
    )
    yield ""
    yield "| model | task | best | not told from it | costs least |"
    yield "| --- | --- | --- | --- | --- |"
    for (model, task), own in tables.items():
        best = next(row["method"] for row in own if not row["p_holm_best"])
        alike = [row["method"] for row in own if row["p_holm_best"] and float(row["p_holm_best"]) >= 0.05]
        cheapest = min([best, *alike], key=cost)
        advice = f"{cheapest} ({COSTS[cost(cheapest)]})"
        yield f"| {model} | {task} | {best} | {', '.join(alike) or 'none'} | {advice} |"


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Accuracy with standard errors: a panel for each model and task, a bar for each method."""
    # Slow to import, and only this needs it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    # The same numbers give the same file.
    with rc_context({"svg.hashsalt": "fastmem-quality"}):
        figure = Figure(figsize=(2 + 2.5 * len(places), 4.5), layout="constrained")
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, place in zip(panels, places, strict=True):
            own = [row for row in rows if (row["model"], row["task"]) == place][::-1]
            values, errors = ([100 * float(row[n]) for row in own] for n in ("accuracy", "accuracy_error"))
            colors = ["tab:orange" if METHODS[row["method"]].memory else "tab:blue" for row in own]
            axes.barh([row["method"] for row in own], values, xerr=errors, color=colors)
            axes.set(title=", ".join(reversed(place)), xlabel="accuracy, %", xlim=(0, 100))
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def render(options: argparse.Namespace) -> None:
    """Write the page and its chart from the CSV files."""
    rows = read_csv(options.out / "quality.csv")
    chart = options.page.parent / "assets" / "quality.svg"
    chart.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, chart)
    options.page.write_text("\n".join(page(rows, "assets/quality.svg")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of the data files")
    parser.add_argument("--model", nargs="+", default=["demo"], help="Hub ids or folders")
    parser.add_argument("--tasks", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--learning-rates",
        nargs=3,
        type=float,
        default=(1e-4, 3e-5, 3e-4),
        help="larger models need smaller ones",
    )
    parser.add_argument("--validation", type=int, default=100, help="records to search on")
    parser.add_argument("--test", type=int, help="records to compare on: by default 300, of NQ-Swap 400")
    parser.add_argument("--batch-size", type=int, default=20, help="bfloat16 answers depend on it a little")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes, and assets/ beside it")
    parser.add_argument("--render", action="store_true", help="write the page only")
    options = parser.parse_args()
    if BASELINE not in options.methods:
        parser.error(f"--methods: {BASELINE} is what the others are compared with; add it")
    if not options.render:
        measure(options)
    render(options)


if __name__ == "__main__":
    main()
