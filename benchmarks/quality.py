"""Answers of the demo model on real data, by every method, with the paper's settings and with searched ones.

    python benchmarks/quality.py measure --data FOLDER --device cuda     # writes the CSV files
    python benchmarks/quality.py render                                  # writes docs/quality.md

The folder has `nqswap.json` and `memotrap.json`. The first 100 records of each are answered. The searched
settings are those with which FastMem answers the *next* 100 records best (accuracy), so they have not seen
the records of the table.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastmem_pl import (
    Backbone,
    DecodingSettings,
    FastMemDataModule,
    FastMemModule,
    FastMemTrainer,
    MemorizationSettings,
)
from fastmem_pl.decoding import BASELINE, METHODS
from fastmem_pl.run.provenance import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("nqswap", "memotrap")
COUNT = 100
PAPER = {"learning_rate": 1e-5, "steps": 10, "kl_coeff": 0.1, "max_new_tokens": 100, "answer_prefix": ""}
# Opening the answer keeps a small model in the format that is scored; then 40 tokens do.
SEARCHED = {"max_new_tokens": 40, "answer_prefix": "The answer is:"}
GRID = {"learning_rate": (3e-5, 1e-4, 3e-4), "steps": (10, 20), "kl_coeff": (0.1, 1.0)}
SCORES = ("accuracy", "contained", "exact_match", "format_failure", "original")


class Runner:
    """Runs the product on parts of a data file with one loaded model."""

    def __init__(self, data: Path, device: str, batch_size: int, folder: Path) -> None:
        self.data, self.batch_size, self.folder = data, batch_size, folder
        accelerator = "gpu" if device == "cuda" else device
        self.trainer = FastMemTrainer(accelerator=accelerator, enable_progress_bar=False)
        self.backbone = Backbone.load("demo", "32-true", self.trainer.strategy.root_device)
        self.runs = 0

    def run(
        self, task: str, part: slice, methods: Iterable[str], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Metrics of one run by method."""
        self.runs += 1
        records = json.loads((self.data / f"{task}.json").read_text())[part]
        path = self.folder / f"{task}{self.runs}.json"
        path.write_text(json.dumps(records))
        decode = DecodingSettings(max_new_tokens=settings["max_new_tokens"])
        memorize = MemorizationSettings(**{name: settings[name] for name in GRID})
        module = FastMemModule(methods=list(methods), memorize=memorize, decode=decode)
        module.load_backbone("32-true", self.backbone.device, self.backbone)
        data = FastMemDataModule(
            task, str(path), batch_size=self.batch_size, answer_prefix=settings["answer_prefix"]
        )
        result = self.trainer.fit_predict(module, data, str(self.folder / f"run{self.runs}"))
        return result.metrics["groups"]["all"]


def search(runner: Runner, task: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The point of the grid with which FastMem answers the validation records best, and all points."""
    rows = []
    for point in itertools.product(*GRID.values()):
        settings = dict(zip(GRID, point, strict=True))
        found = runner.run(task, slice(COUNT, 2 * COUNT), [BASELINE, "fastmem"], {**SEARCHED, **settings})
        rows.append({"task": task, **settings})
        for method, entry in found.items():
            rows[-1][method] = round(entry["metrics"]["accuracy"]["value"], 4)
        print(rows[-1], flush=True)
    best = max(rows, key=lambda row: row["fastmem"])
    return {name: best[name] for name in GRID}, rows


def measure(arguments: argparse.Namespace) -> None:
    """Search, answer, and write both CSV files."""
    rows, points = [], []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(arguments.data, arguments.device, arguments.batch_size, Path(folder))
        where = environment(runner.backbone.device)
        for task in arguments.tasks:
            best, found = search(runner, task)
            points += found
            for name, settings in (("paper", PAPER), ("searched", {**SEARCHED, **best})):
                groups = runner.run(task, slice(COUNT), METHODS, settings)
                for method, entry in groups.items():
                    row = {"task": task, "settings": name, "method": method, "samples": entry["n"]}
                    row |= {key: settings[key] for key in GRID}
                    for score in SCORES:
                        value = entry["metrics"][score]
                        row[score] = round(value["value"], 4)
                        row[f"{score}_error"] = round(value["standard_error"], 4)
                    test = entry["against_zero_shot"].get("accuracy")
                    row["p_value"] = f"{test['p_value']:.4f}" if test else ""
                    row["words"] = round(entry["metrics"]["output_words"]["value"], 2)
                    row["device"] = where["device"]["name"]
                    row["torch"] = where["packages"]["torch"]
                    row["transformers"] = where["packages"]["transformers"]
                    rows.append(row)
                    print(task, name, method, row["accuracy"], row["p_value"], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "quality.csv", rows)
    write_csv(arguments.out / "quality_search.csv", points)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def render(arguments: argparse.Namespace) -> None:
    """Write docs/quality.md from the CSV files."""
    rows = read_csv(arguments.out / "quality.csv")
    points = read_csv(arguments.out / "quality_search.csv")
    first = rows[0]
    lines = [
        "# What the demo model shows on real data",
        "",
        "<!-- written by: python benchmarks/quality.py render -->",
        "",
        f"SmolLM2-135M-Instruct, float32, the first {COUNT} records each of the project's samples of NQ-Swap "
        f"and MemoTrap, on {first['device']} with torch {first['torch']} and transformers "
        f"{first['transformers']} (`python benchmarks/quality.py measure`). Values are percentages ± "
        "standard error; p is the exact McNemar test of accuracy against zero-shot on the same records, not "
        "corrected for the number of methods.",
        "",
        '*accuracy*: the reference follows "The answer is:", the paper\'s score; *contained*: it occurs '
        'anywhere; *format failure*: "The answer is:" is missing; *original*: the answer that the context '
        "contradicts occurs.",
        "",
        "MemoTrap's context is the instruction that names the word to end in, so memorizing it makes that "
        "word likely: it shows that the mechanism works, less how useful it is. *words* does not count the "
        "prefix.",
    ]
    for task, settings in dict.fromkeys((row["task"], row["settings"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["settings"]) == (task, settings)]
        values = ", ".join(f"{name} {chosen[0][name]}" for name in GRID)
        what = {
            "paper": f"the paper's settings ({values}; no answer prefix, 100 new tokens)",
            "searched": f'searched settings ({values}; answer prefix "The answer is:", 40 new tokens)',
        }[settings]
        lines += ["", f"## {task}, {what}", ""]
        lines += ["| method | " + " | ".join((*SCORES, "words", "p")).replace("_", " ") + " |"]
        lines += ["| --- |" + " --- |" * (len(SCORES) + 2)]
        for row in chosen:
            cells = [f"{100 * float(row[s]):.1f} ± {100 * float(row[s + '_error']):.1f}" for s in SCORES]
            p_value = "< 0.0001" if row["p_value"] == "0.0000" else row["p_value"]
            lines.append(f"| {row['method']} | {' | '.join(cells)} | {row['words']} | {p_value} |")
    lines += [
        "",
        "## The search",
        "",
        f"Accuracy on records {COUNT} to {2 * COUNT - 1} by setting; FastMem's first best one was taken.",
        "",
    ]
    lines += ["| " + " | ".join(points[0]).replace("_", " ") + " |", "|" + " --- |" * len(points[0])]
    lines += ["| " + " | ".join(point.values()) + " |" for point in points]
    (ROOT / "docs" / "quality.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("measure", "render"))
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="folder of nqswap.json and memotrap.json"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    arguments = parser.parse_args()
    {"measure": measure, "render": render}[arguments.action](arguments)


if __name__ == "__main__":
    main()
