"""What answering on Ray costs: seconds of a worker for a sample, beside those of one process.

    python benchmarks/random_model.py /tmp/tiny --shape tiny
    python benchmarks/ray_pool.py measure /tmp/tiny --samples 1000 --workers 2
    python benchmarks/ray_pool.py render benchmarks/results/ray_pool_cpu.csv

In turn, ``--repeats`` times: one process alone, as many processes at once as there are workers, each with all
samples and nothing between them, and the workers on Ray. Time counts from the first records to the last,
without start and loading, for a sample of one process. Every process has one thread. Processes at once share
the machine's memory and caches, so Ray's own cost is what its workers take beyond them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from speed import device_slug, provenance

from fastmem_pl import FastMemDataModule, FastMemModule, FastMemTrainer
from fastmem_pl.decoding import DecodingSettings
from fastmem_pl.memory import MemorizationSettings

RESULTS = Path(__file__).parent / "results"
_SHARE = 16
_WORDS = ["tower", "river", "stone", "house", "garden", "letter", "winter", "silver", "morning", "captain"]


class Clock(Callback):
    """Notes when records come, and of how many samples."""

    def __init__(self) -> None:
        self.noted: list[tuple[float, int]] = []

    def on_predict_batch_end(self, trainer, module, outputs, batch, *args, **kwargs) -> None:
        self.noted.append((time.perf_counter(), len({record["index"] for record in outputs})))

    def seconds(self, workers: int) -> float:
        """For each sample after the first batch of each worker."""
        start, rest = self.noted[workers - 1][0], self.noted[workers:]
        return workers * (rest[-1][0] - start) / sum(count for _, count in rest)


def run(model: str, data: Path, folder: Path, workers: int) -> float:
    """Seconds of a worker for a sample; ``workers`` 0 is this process."""
    torch.set_num_threads(1)
    clock = Clock()
    pooled = {"ray": True, "ray_workers": workers} if workers else {}
    trainer = FastMemTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[clock], **pooled
    )
    module = FastMemModule(
        model, ["fastmem"], MemorizationSettings(steps=10), DecodingSettings(max_new_tokens=20)
    )
    trainer.fit_predict(module, FastMemDataModule("qa", str(data), batch_size=_SHARE), str(folder))
    return clock.seconds(workers or 1)


def run_at_once(model: str, data: Path, folder: Path, count: int) -> float:
    """Mean over ``count`` processes that run at the same time."""
    with ProcessPoolExecutor(count, get_context("spawn")) as processes:
        tasks = [processes.submit(run, model, data, folder / str(number), 0) for number in range(count)]
        return statistics.fmean(task.result() for task in tasks)


def measure(options: argparse.Namespace) -> None:
    """Run all ways in turn, and write their medians and spread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    drawn = random.Random(0)
    records = [
        {"context": " ".join(drawn.choices(_WORDS, k=40)), "question": "Where?", "answers": ["tower"]}
        for _ in range(options.samples)
    ]
    ways = {
        "one process": lambda folder: run(options.model, data, folder, 0),
        "processes at once": lambda folder: run_at_once(options.model, data, folder, options.workers),
        "workers on Ray": lambda folder: run(options.model, data, folder, options.workers),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        data.write_text(json.dumps(records))
        for repeat in range(options.repeats):
            for name, way in ways.items():
                found[name].append(way(Path(folder) / f"{name}-{repeat}"))
                print(f"{name}: {1000 * found[name][-1]:.1f} ms a sample", flush=True)
    device = torch.device("cpu")
    out = options.out or RESULTS / f"ray_pool_{device_slug(str(device), device)}.csv"
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "processes": 1 if name == "one process" else options.workers,
            "samples": options.samples,
            "seconds": round(statistics.median(seconds), 6),
            "least": round(min(seconds), 6),
            "most": round(max(seconds), 6),
            "repeats": options.repeats,
            **provenance(device, None),
        }
        for name, seconds in found.items()
    ]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    render([out])


def render(paths: list[Path]) -> None:
    """Print the table of docs/scaling.md."""
    print("| | processes | ms of one for a sample | least to most |\n| --- | --- | --- | --- |")
    for path in paths:
        for row in csv.DictReader(path.open()):
            values = [f"{1000 * float(row[key]):.1f}" for key in ("seconds", "least", "most")]
            print(f"| {row['way']} | {row['processes']} | {values[0]} | {values[1]} to {values[2]} |")


def main() -> None:
    """Measure, or render what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--samples", type=int, default=1000)
    measuring.add_argument("--workers", type=int, default=2)
    measuring.add_argument("--repeats", type=int, default=3)
    measuring.add_argument("--out", type=Path)
    measuring.set_defaults(run=measure)
    rendering = commands.add_parser("render")
    rendering.add_argument("paths", type=Path, nargs="+")
    rendering.set_defaults(run=lambda options: render(options.paths))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
