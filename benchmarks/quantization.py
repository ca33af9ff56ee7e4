"""What quantized trunks change of memorizing, and how much memory they take.

    python benchmarks/quantization.py losses --data nqswap.json --samples 100
    python benchmarks/quantization.py memory --shape 70b --kind bnb-4bit --limit-gb 80     # on a GPU
    python benchmarks/quantization.py memory --shape 8b --kind bnb-4bit bnb-8bit --limit-gb 12
    python benchmarks/quantization.py render                                # prints what the files say

losses: the contexts of NQ-Swap are memorized and their questions answered greedily by the demo model (or
--backbone) with every trunk. Differences are paired, context by context; "bf16-true" against "32-true" is
what rounding alone does. Only the trunk differs: the trained network and the head are in bfloat16 in all ways
but "32-true".

memory: Llama 3 of a shape with random weights, which are made and quantized one by one on the device, through
the loader that real checkpoints go through. One batch is memorized and answered. PyTorch gets no more than
--limit-gb (10^9 bytes): on a card of that size the driver's own memory comes on top, which is less than what
a card has beyond its name.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from speed import _8B, _70B, _TINY, device_slug, provenance, random_samples, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fastmem_pl import Backbone, FastMemDataModule, FastMemError, Memorizer, answer
from fastmem_pl.backbone import usable_bytes
from fastmem_pl.backbone.quantization import (
    KINDS,
    check_quantization,
    loading_options,
    make_plain,
    stored_tensors,
)
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import ContextSample
from fastmem_pl.memory import MemorizationSettings, footprint_of
from fastmem_pl.metrics import normalize_answer

RESULTS = Path(__file__).parent / "results"
SHAPES = {"8b": _8B, "70b": _70B, "tiny": _TINY}
STEPS, CONTEXT_TOKENS, NEW_TOKENS = 10, 160, 20
LEARNING_RATE = 1e-5
REPEATS = 3
# What the others are compared with.
EXACT, PLAIN = "32-true", "bf16-true"

Row = dict[str, Any]


class Way:
    """One way to hold the trunk, and what it makes of the contexts.

    Attributes:
        losses: cross-entropy of every context at every step.
        answers: greedy, with the context in the prompt and memorized.
        right: whether each holds a reference answer.
    """

    def __init__(self, backbone: Backbone, samples: Sequence[ContextSample], batch: int, steps: int) -> None:
        memorizer = Memorizer(backbone, steps=steps, learning_rate=LEARNING_RATE)
        self.losses: list[list[float]] = []
        self.answers: list[str] = []
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            contexts = [sample.context for sample in part]
            memory = memorizer(contexts)
            self.losses += [curve.cross_entropy for curve in memory.curves]
            questions = [sample.question for sample in part]
            self.answers += answer(
                backbone,
                questions,
                contexts,
                memory,
                max_new_tokens=NEW_TOKENS,
                answer_prefix="The answer is:",
            )
        self.right = [
            any(normalize_answer(name) in normalize_answer(text) for name in sample.references)
            for sample, text in zip(samples, self.answers, strict=True)
        ]

    def falls(self) -> list[float]:
        """How far the cross-entropy of each context falls."""
        return [losses[0] - losses[-1] for losses in self.losses]


def loss_rows(name: str, way: Way, ways: dict[str, Way]) -> Iterator[Row]:
    """What a way gives, alone and against the others that were measured before."""

    def row(quantity: str, values: Sequence[float], against: str = "", step: int | str = "") -> Row:
        spread = stdev(values) if len(values) > 1 else float("nan")
        return {
            "way": name,
            "quantity": quantity,
            "step": step,
            "against": against,
            "samples": len(values),
            "mean": f"{mean(values):.5f}",
            "standard_deviation": f"{spread:.5f}",
            "standard_error": f"{spread / len(values) ** 0.5:.5f}",
        }

    for step, losses in enumerate(zip(*way.losses, strict=True)):
        yield row("cross_entropy", losses, step=step)
    yield row("fall", way.falls())
    yield row("right", [float(hit) for hit in way.right])
    for against in (EXACT, PLAIN):
        if against not in ways or against == name:
            continue
        other = ways[against]
        for step in range(len(way.losses[0])):
            pairs = zip(way.losses, other.losses, strict=True)
            yield row("cross_entropy_difference", [a[step] - b[step] for a, b in pairs], against, step)
        pairs = zip(way.falls(), other.falls(), strict=True)
        yield row("fall_difference", [a - b for a, b in pairs], against)
        same = [float(a == b) for a, b in zip(way.answers, other.answers, strict=True)]
        yield row("same_answer", same, against)


def measure_losses(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Every way on the same contexts."""
    data = FastMemDataModule("nqswap", str(options.data), limit=options.samples)
    data.setup()
    ways: dict[str, Way] = {}
    rows: list[Row] = []
    for name in (EXACT, PLAIN, *options.kind):
        kind = name if name in KINDS else None
        precision = PLAIN if kind else name
        try:
            backbone = Backbone.load(options.backbone, precision, device, quantization=kind)
        except FastMemError as error:
            if name not in KINDS:
                raise
            print(f"left out: {error}", flush=True)
            continue
        ways[name] = Way(backbone, data.samples, options.batch_size or 8, options.steps)
        made = list(loss_rows(name, ways[name], ways))
        rows += [{"backbone": backbone.public_name, "precision": precision, **row} for row in made]
        falls, right = ways[name].falls(), ways[name].right
        print(f"{name}: fall {mean(falls):.4f}, right {mean(right):.3f}", flush=True)
        del backbone
        free(device)
    return rows


class RandomWeight:
    """A weight of a checkpoint that is not there: made when the loader reads it, as a file's slices are."""

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.is_norm, self.shape, self.dtype, self.device = "norm" in name, shape, dtype, device

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.is_norm:
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device).normal_(std=0.02)


def random_backbone(shape: str, kind: str | None, precision: str, device: torch.device) -> Backbone:
    """A model of random weights through transformers' loader, quantized as ``Backbone.load`` does it."""
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    if kind:
        check_quantization(kind, precision, device)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    state = {name: RandomWeight(name, size, dtype, device) for name, size in shapes.items()}
    further = loading_options(kind, config, dtype, 1) if kind else {}
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map={"": device}, **further
    )
    if kind:
        make_plain(model, dtype, 1)
    return Backbone(model, word_tokenizer(SHAPES[shape]), precision, name=shape)


def memory_row(options: argparse.Namespace, kind: str, device: torch.device) -> Row:
    """Load, memorize and answer one batch; what it took."""
    row: Row = {
        "shape": options.shape,
        "kind": kind,
        "precision": options.precision,
        "limit_gb": options.limit_gb or "",
        "context_tokens": CONTEXT_TOKENS,
        "steps": options.steps,
        "new_tokens": NEW_TOKENS,
    }
    try:
        load, backbone = timed(
            lambda: random_backbone(
                options.shape, None if kind == "none" else kind, options.precision, device
            ),
            device,
        )
        row |= {"load_seconds": f"{load:.1f}", "peak_load_gib": peak(device)}
        parts = [t for p in backbone.model.parameters() for t in stored_tensors(p)]
        row["weights_gib"] = f"{sum(t.nbytes for t in parts) / 2**30:.2f}"
        memorizer = Memorizer(backbone, steps=options.steps, learning_rate=LEARNING_RATE)
        samples = batch_of(options, backbone, memorizer.settings, device)
        row["batch"] = len(samples)
        contexts, questions = [s.context for s in samples], [s.question for s in samples]
        memorizing, answering = [], []
        for _ in range(REPEATS + 1):
            memory = None
            seconds, memory = timed(lambda: memorizer(contexts), device)
            memorizing.append(seconds / len(samples))
            seconds, _ = timed(
                lambda memory=memory: answer(
                    backbone, questions, contexts, memory, max_new_tokens=NEW_TOKENS
                ),
                device,
            )
            answering.append(seconds / len(samples))
        losses = [curve.cross_entropy for curve in memory.curves]
        row |= {
            # The first includes what is compiled and recorded once.
            "memorize_seconds": f"{median(memorizing[1:]):.4f}",
            "answer_seconds": f"{median(answering[1:]):.4f}",
            "first_loss": f"{mean(curve[0] for curve in losses):.4f}",
            "last_loss": f"{mean(curve[-1] for curve in losses):.4f}",
            "fits": "yes",
        }
    except (RuntimeError, MemoryError, FastMemError) as error:
        if not (is_out_of_memory(error) or isinstance(error.__cause__, torch.OutOfMemoryError)):
            raise
        row["fits"] = "no"
    return {**row, "peak_gib": peak(device)}


def batch_of(
    options: argparse.Namespace, backbone: Backbone, settings: MemorizationSettings, device: torch.device
) -> list[ContextSample]:
    """As many samples as asked for, or as the package itself would take together, 8 at most."""
    count = options.batch_size
    if count is None:
        tokens = CONTEXT_TOKENS + 64 + NEW_TOKENS
        fitting = footprint_of(backbone, settings).samples_in(usable_bytes(device), tokens)
        count = max(1, min(8, fitting))
    return random_samples(SHAPES[options.shape], count, CONTEXT_TOKENS)


def measure_memory(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Every kind on its own."""
    if options.limit_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_gb * 1e9 / total), device)
    rows = []
    for kind in options.kind:
        free(device)
        rows.append(memory_row(options, kind, device))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that work takes, to the last kernel, and what it returns."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def peak(device: torch.device) -> str:
    """Most memory that PyTorch has held since :func:`free`, GiB."""
    return f"{torch.cuda.max_memory_reserved(device) / 2**30:.2f}" if device.type == "cuda" else ""


def free(device: torch.device) -> None:
    """Give back what nothing holds any more, and count anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def write(rows: list[Row], options: argparse.Namespace, device: torch.device) -> Path:
    """Write the CSV with where it comes from; rows of other shapes and limits that it has stay."""
    where = provenance(device, options.commit or os.environ.get("FASTMEM_COMMIT"))
    for package in ("bitsandbytes", "torchao"):
        try:
            where[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            where[package] = "not installed"
    slug = device_slug(where["device"], device)
    path = options.out or RESULTS / f"quantization_{options.command}_{slug}.csv"
    rows = [{**row, **where} for row in rows]
    if options.command == "memory" and path.exists():
        key = ("shape", "kind", "limit_gb")
        made = {tuple(str(row[name]) for name in key) for row in rows}
        rows = [row for row in read(path) if tuple(row[name] for name in key) not in made] + rows
    fields = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def show(path: Path) -> None:
    """Print what a file says."""
    rows = read(path)
    for row in rows:
        if "quantity" not in row:
            memorize = f"{row['memorize_seconds']} + {row['answer_seconds']} s a sample"
            print(
                f"{row['shape']:5} {row['kind']:13} of {row['limit_gb'] or 'all'} GB: fits {row['fits']}, "
                f"weights {row['weights_gib']}, peak {row['peak_gib']} GiB, batch {row['batch']}, {memorize}"
            )
        elif row["step"] in ("", "0"):
            against = f" against {row['against']}" if row["against"] else ""
            step = ", step 0" if row["step"] else ""
            print(
                f"{row['way']:13} {row['quantity']}{step}{against}: {row['mean']} ± {row['standard_error']} "
                f"(sd {row['standard_deviation']}, {row['samples']} contexts)"
            )
    last = rows[-1]
    print(f"{path.name}: {last['device']}, torch {last['torch']}, commit {last['commit']}, {last['date']}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    losses = commands.add_parser("losses", help="memorizing and answering with quantized trunks")
    losses.add_argument("--data", type=Path, required=True, help="NQ-Swap records in the published format")
    losses.add_argument("--backbone", default="demo")
    losses.add_argument("--samples", type=int, default=100, help="contexts")
    memory = commands.add_parser("memory", help="memory and time of large shapes")
    memory.add_argument("--shape", choices=SHAPES, required=True)
    memory.add_argument("--limit-gb", type=float, help="memory that PyTorch gets, 10^9 bytes")
    memory.add_argument("--precision", choices=("bf16-true", "32-true"), default="bf16-true")
    for command in (losses, memory):
        kinds = (*KINDS, "none") if command is memory else tuple(KINDS)
        command.add_argument("--kind", nargs="+", choices=kinds, default=list(KINDS))
        command.add_argument("--steps", type=int, default=STEPS)
        command.add_argument("--batch-size", type=int)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--out", type=Path, help="CSV file")
        command.add_argument("--commit", help="to state, where there is no git")
    commands.add_parser("render", help="print the committed results")
    options = parser.parse_args()
    if options.command == "render":
        for path in sorted(RESULTS.glob("quantization_*.csv")):
            show(path)
        return
    # With its number, which is what loaders take.
    device = torch.empty(0, device=options.device).device
    rows = (measure_losses if options.command == "losses" else measure_memory)(options, device)
    show(write(rows, options, device))


if __name__ == "__main__":
    main()
