"""The paper's 60-point search against 60 separate runs: time, losses and answers.

    python benchmarks/search.py measure --data nqswap.json     # writes results/search_cpu.csv
    python benchmarks/search.py render                             # prints what it says

`fastmem search` runs on 20 records (every fifth of those whose context is at most `--max-words` long), then
`fastmem fit-predict` at some of the points, each a process of its own as a user would start it. The time of
60 separate runs is that of the checked points with 10, 20 and 50 steps, times 20 each: learning rate and KL
weight do not change how long a run takes. Losses and answers of the checked points are compared one by one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fastmem_pl.base.environment import environment
from fastmem_pl.search import SearchSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVERY = 5
# (learning rate, KL weight) of the checked points: an end of the grid, and the paper's.
CHECKED = ((3e-5, 0.01), (1e-5, 0.1))


def choose(source: Path, max_words: int, count: int, folder: Path) -> Path:
    """Write the records that are searched on."""
    records = json.loads(source.read_text())
    short = [record for record in records if len(record["sub_context"].split()) <= max_words]
    path = folder / "records.json"
    path.write_text(json.dumps(short[: count * EVERY : EVERY]))
    return path


def run(command: str, data: Path, folder: Path, options: Sequence[str]) -> float:
    """Run a command of the package as a user would; returns its seconds."""
    arguments = [sys.executable, "-m", "fastmem_pl", command, "--config"]
    arguments += ["smollm2,nqswap" + (",search" if command == "search" else ""), "--data.path", str(data)]
    start = time.perf_counter()
    subprocess.run([*arguments, "--run_dir", str(folder), *options], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().split(b"\n")[:-1]]


def compare(
    search: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, Any]], point: Mapping[str, float]
):
    """Largest difference of a loss (nats a token), and answers that are token by token the same."""
    expected = {record["index"]: record for record in single if record["method"] == "fastmem"}
    found = [record for record in search if record["point"] == point]
    assert {record["index"] for record in found} == expected.keys()
    differences = [
        abs(a - b)
        for record in found
        for name in ("cross_entropy", "kl")
        for a, b in zip(record["curve"][name], expected[record["index"]]["curve"][name], strict=True)
    ]
    equal = sum(record["token_ids"] == expected[record["index"]]["token_ids"] for record in found)
    return max(differences), equal


def measure(arguments: argparse.Namespace) -> None:
    """Search, run the checked points, and write the CSV file."""
    device = torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")
    common = ["--trainer.accelerator", arguments.accelerator, "--model.methods", "[zero-shot, fastmem]"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = choose(arguments.data, arguments.max_words, arguments.count, folder)
        seconds = run("search", data, folder / "search", ["--search.every", "1", *common])
        found = records_of(folder / "search")
        summary = json.loads((folder / "search" / "search.json").read_text())
        samples = {record["index"]: record["n_context_tokens"] for record in found}
        shared = {
            "samples": len(samples),
            "context_tokens": sum(samples.values()),
            "device": environment(device)["device"]["name"],
            "threads": torch.get_num_threads(),
            "torch": environment(device)["packages"]["torch"],
            "transformers": environment(device)["packages"]["transformers"],
            "commit": os.environ.get("FASTMEM_COMMIT") or commit(),
        }
        rows.append(
            {"run": "search", "points": summary["num_points"], "seconds": round(seconds, 1), **shared}
        )
        print(rows[-1], flush=True)
        for rate, kl in CHECKED[: arguments.checks]:
            for steps in SearchSettings().grid["steps"]:
                point = {"learning_rate": rate, "steps": steps, "kl_coeff": kl}
                options = [
                    part for name, value in point.items() for part in (f"--model.memorize.{name}", str(value))
                ]
                path = folder / f"{rate}-{steps}-{kl}"
                seconds = run("fit-predict", data, path, [*common, *options])
                error, equal = compare(found, records_of(path), point)
                row = {"run": "fit-predict", "points": 1, **point, "seconds": round(seconds, 1)}
                rows.append({**row, "loss_difference": f"{error:.1e}", "equal_answers": equal, **shared})
                print(rows[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    with open(arguments.out / f"search_{arguments.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)
    render(arguments)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def render(arguments: argparse.Namespace) -> None:
    """Print the comparison as Markdown."""
    with open(arguments.out / f"search_{arguments.name}.csv", newline="") as file:
        search, *singles = csv.DictReader(file)
    points = int(search["points"])
    by_steps: dict[str, list[float]] = {}
    for row in singles:
        by_steps.setdefault(row["steps"], []).append(float(row["seconds"]))
    separate = sum(mean(seconds) * points / len(by_steps) for seconds in by_steps.values())
    print(
        f"{search['samples']} samples, {search['context_tokens']} tokens of context, {search['device']}, ",
        end="",
    )
    print(f"{search['threads']} threads, torch {search['torch']}, commit {search['commit']}\n")
    print("| run | steps | learning rate | kl | seconds | largest loss difference | same answers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| search, {points} points | | | | {search['seconds']} | | |")
    for row in singles:
        cells = (row[name] for name in ("steps", "learning_rate", "kl_coeff", "seconds", "loss_difference"))
        print(f"| fit-predict | {' | '.join(cells)} | {row['equal_answers']} of {row['samples']} |")
    share = float(search["seconds"]) / separate
    print(f"\n{points} separate runs would take {separate:.0f} s: the search takes {share:.3f} of it.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("measure", "render"))
    parser.add_argument("--data", type=Path, default=Path("nqswap.json"), help="NQ-Swap records")
    parser.add_argument("--max-words", type=int, default=150, help="leave out longer contexts (tables)")
    parser.add_argument("--count", type=int, default=20, help="records")
    parser.add_argument(
        "--checks", type=int, default=len(CHECKED), help="pairs of rate and KL weight to check"
    )
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--name", default="cpu", help="of the CSV file: search_NAME.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    arguments = parser.parse_args()
    {"measure": measure, "render": render}[arguments.action](arguments)


if __name__ == "__main__":
    main()
