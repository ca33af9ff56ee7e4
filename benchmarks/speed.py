"""Speed and memory of FastMem against the published loop and plain ``generate``, and against the hardware.

    python benchmarks/speed.py                               # the whole table on the machine at hand
    python benchmarks/speed.py --rows memorize,decode --repeats 9
    python benchmarks/speed.py --shape tiny --device cpu     # every row in a minute, to try the program
    python benchmarks/speed.py render benchmarks/results/speed_*.csv    # tables for docs/performance.md

On a GPU the model has Llama-3-8B's shapes, random bfloat16 weights made on the device and a word
tokenizer made here (nothing is downloaded); expect minutes. On a CPU it is the packaged demo model in float32
and bfloat16; 16 samples and 5 repeats take the better part of an hour on 2 cores, so mind --repeats,
--samples and --seconds-budget.

Before anything is timed, the published loop (benchmarks/published.py) and the package memorize and answer
the same sample in float32. If their losses or tokens differ, the run goes on without ratios and exits with
1. So it does when a row failed, which is noted in its place.

What is compared is timed in turns, in the same run, after two warm-up calls; values are medians, with the
25th and 75th percentiles beside them. No answer ends early: stop tokens are switched off for all.

*ratio* is the value over the baseline's, so below 1 is faster or smaller. *roofline* is the least time that
the hardware allows: for every phase the larger of bytes / copy bandwidth and operations / matmul rate, both
measured here, summed over the phases (class ``Counts``). *overlapped* is the same with all phases running
side by side: the larger of all bytes and all operations. Targets are those of the project's issue on speed,
set for an H100 or for 2 CPU cores, and hold there only.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import random
import re
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import CHECKED, Mismatch, check, decode, edited, memorize
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fastmem_pl import (
    Backbone,
    ContextSample,
    DecodingSettings,
    FastMemDataModule,
    FastMemModule,
    MemorizationSettings,
    Memorizer,
)
from fastmem_pl.backbone import pad
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.base.phases import PhaseMeter, is_out_of_memory
from fastmem_pl.decoding import DECODERS, Decoding, Prefill
from fastmem_pl.run.encoding import EncodedSample
from fastmem_pl.run.provenance import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 10
# What PyTorch may have of a 24 GB card: the CUDA context takes the rest.
CARD_GIB = 23.3
WARM_UPS = 2
# With --seconds-budget, a row that was begun is repeated at least so often.
LEAST_REPEATS = 3
# A decode step is timed as the difference of two runs of these many tokens, so that what a run does once
# cancels out.
FEW_TOKENS, MANY_TOKENS = 16, 48
GIB = 2**30

_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_70B = {
    **_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_TINY = {
    **_8B,
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Workload:
    """A model, and what is asked of it.

    Attributes:
        config: of a random Llama; ``None`` is the packaged demo model.
        precisions: that are measured, one after the other.
        batches: batch sizes by row.
        new_tokens: tokens of every answer.
        samples: least number of samples that a row takes, in batches.
        label_tokens: tokens with a loss in a random context (its end of turn is one of them).
        long_tokens: the same of the long context of row ``memory``.
        hardware: that the targets were set for.
        rows: that are measured unless others are asked for; none named means all.
    """

    config: Mapping[str, Any] | None
    precisions: tuple[str, ...]
    batches: Mapping[str, tuple[int, ...]]
    new_tokens: int
    samples: int = 1
    label_tokens: int = 160
    long_tokens: int = 7501
    hardware: str = "an H100"
    rows: tuple[str, ...] = ()


_SHAPE_BATCHES = {
    "memorize": (1, 8, 16, 32),
    "decode": (1, 16, 32),
    "fit-predict": (1, 16, 32),
    "contrast": (16,),
    "memory": (1, 16),
}
WORKLOADS = {
    "8b": Workload(_8B, ("bf16-true",), _SHAPE_BATCHES, new_tokens=20),
    "tiny": Workload(_TINY, ("32-true",), _SHAPE_BATCHES, new_tokens=20, long_tokens=501),
    "demo": Workload(
        None,
        ("32-true", "bf16-true"),
        {"memorize": (1, 4, 8, 16), "decode": (1, 8, 16), "fit-predict": (1, 4, 8, 16), "contrast": (8,)},
        new_tokens=40,
        samples=16,
        hardware="2 CPU cores",
        rows=("fit-predict",),
    ),
}

# Largest value in its unit by (shape, row, batch, what), and largest ratio by (shape, row, batch, baseline).
TARGETS = {
    **{("8b", "memorize", batch, "fastmem"): 20 for batch in (8, 16, 32)},
    ("8b", "decode", 1, "fastmem"): 8,
    ("8b", "decode", 16, "fastmem"): 13,
    ("8b", "decode", 32, "fastmem"): 18,
    ("8b", "fit-predict", 1, "fastmem"): 330,
    ("8b", "fit-predict", 16, "fastmem"): 48,
    ("8b", "fit-predict", 32, "fastmem"): 40,
    ("8b", "memory", 1, "peak, long context"): 24,
    ("8b", "memory", 16, "peak without weights, a sample"): 2,
    **{("demo", "fit-predict", batch, "fastmem"): 2300 for batch in (1, 4, 8, 16)},
}
RATIO_TARGETS = {
    ("8b", "fit-predict", 16, "generate"): 1,
    ("8b", "contrast", 16, "fastmem"): 1.15,
}


class Endless(Backbone):
    """A backbone whose answers never end before ``max_new_tokens``: no token has this id."""

    @property
    def stop_ids(self) -> list[int]:
        """An id that is never produced."""
        return [-1]


def random_model(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        made = LlamaConfig(**config, bos_token_id=None, eos_token_id=None)
        return AutoModelForCausalLM.from_config(made, dtype=dtype)


def word_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the model has tokens, with a chat template like Llama 3's."""
    controls = ["<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = controls + [f"w{number}" for number in range(len(controls), config["vocab_size"])]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        additional_special_tokens=controls[1:3],
        model_max_length=config["max_position_embeddings"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    return tokenizer


def random_samples(config: Mapping[str, Any], count: int, label_tokens: int) -> list[ContextSample]:
    """Contexts of random words, all of one length; the end of turn is the last token with a loss."""
    generator = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{generator.randrange(4, config['vocab_size'])}" for _ in range(words))

    return [ContextSample(i, str(i), "qa", text(label_tokens - 1), text(8), ("w4",)) for i in range(count)]


def demo_samples(count: int, tokens_of: Callable[[str], int]) -> list[ContextSample]:
    """Packaged questions, each with the contexts of two or three: 60 to 160 tokens, the longest first.

    They are evenly spaced among 16 by length, so that rows with fewer samples have the same mean.
    """
    data = FastMemDataModule()
    data.setup()
    left = [sample for sample in data.samples if sample.task == "nqswap"]
    samples: list[ContextSample] = []
    size = 2
    while len(samples) < max(count, 16):
        part, left = left[:size], left[size:] + left[:size]
        context = " ".join(sample.context for sample in part)
        if 60 <= tokens_of(context) <= 160:
            samples.append(replace(part[0], index=len(samples), context=context))
        size = 5 - size
    samples.sort(key=lambda sample: -len(sample.context))
    return [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)]


@dataclass(frozen=True)
class Item:
    """A sample with its token ids."""

    sample: ContextSample
    encoded: EncodedSample

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.encoded.prompts["prompt"]


Group = list[Item]
Way = Callable[[list[Group]], Mapping[str, float] | None]
"""Does the work for groups of samples, one batch each; may return seconds of its parts by name."""


@dataclass(frozen=True)
class Phase:
    """Least bytes that a phase moves through memory, and operations that it does."""

    bytes: float
    operations: float

    def times(self, count: float) -> Phase:
        """The phase done several times."""
        return Phase(self.bytes * count, self.operations * count)


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes a second of a large copy (read + written), operations a second
    of a large matrix product.
    """

    bandwidth: float
    rate: float

    def milliseconds(self, phases: Iterable[Phase]) -> float:
        """Least time of phases one after the other."""
        return 1e3 * sum(max(p.bytes / self.bandwidth, p.operations / self.rate) for p in phases)

    def overlapped(self, phases: Sequence[Phase]) -> float:
        """Least time of phases that run side by side."""
        total = Phase(sum(p.bytes for p in phases), sum(p.operations for p in phases))
        return self.milliseconds([total])


class Counts:
    """Bytes and operations of each phase, counted from the shapes: what no implementation can avoid.

    Weights are read once a pass, for all rows of a batch. A product with a weight takes 2 operations a
    number and token. Activations, logits, norms and padding are not counted, and the clipping norm is free
    (from small Gram matrices), so these are lower bounds. A delta and its first moment have the model's
    type, the second moment is float32.

    Args:
        config: of a Llama-like model.
        dtype: of its weights.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        heads, hidden = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or hidden // heads
        self.blocks, self.width = config.num_hidden_layers, dtype.itemsize
        self.queries, self.keys = heads * head, config.num_key_value_heads * head
        self.attention = 2 * hidden * (self.queries + self.keys)
        self.projection = hidden * config.intermediate_size
        self.ffn = 3 * self.projection
        self.head = hidden * config.vocab_size
        self.states = 2 * self.width + 4

    def memorize(self, batch: int, tokens: float, labels: float, steps: int) -> list[Phase]:
        """One fit of ``batch`` contexts of ``tokens`` tokens, ``labels`` of them with a loss.

        1. Trunk: all blocks once, with the base products of the last FFN.
        2. Head: forward and backward in every step, two products and two reads of its weight each.
        3. FFN forward: in all steps but the first, whose deltas are zero, products with the three deltas and
           of the base down projection with the change of its input.
        4. FFN backward and update: the weight gradients of three projections, the input gradient through
           the down projection, and the optimizer: delta and both moments read and written (not read in the
           first step, the moments not written in the last), the base weights read for their decay.
        """
        trunk = self.blocks * (self.attention + self.ffn)
        positions, later = batch * labels, steps - 1
        update = 2 * steps * self.states - self.states - (self.states - self.width)
        return [
            Phase(trunk * self.width, 2 * trunk * batch * tokens + self._attend(batch, tokens, tokens / 2)),
            Phase(2 * self.head * self.width, 4 * self.head * positions).times(steps),
            Phase((self.ffn * batch + self.projection) * self.width, 8 * self.projection * positions).times(
                later
            ),
            Phase(
                self.ffn * batch * update
                + self.projection * self.width * (batch * later + steps)
                + self.ffn * self.width * steps,
                self.projection * positions * (6 * steps + 2 * steps + 2 * later),
            ),
        ]

    def prefill(self, batch: int, tokens: float) -> list[Phase]:
        """One pass over ``batch`` prompts; last FFN and head at the last position only."""
        trunk = self.blocks * (self.attention + self.ffn) - self.ffn
        last = self.ffn + self.head
        operations = 2 * batch * (trunk * tokens + last) + self._attend(batch, tokens, tokens / 2)
        return [Phase((trunk + last) * self.width, operations)]

    def decode_step(self, batch: int, past: float, memory: bool = True) -> list[Phase]:
        """One token of ``batch`` rows: all weights, the row's own deltas, and its keys and values."""
        weights = self.blocks * (self.attention + self.ffn) + self.head
        deltas = self.ffn * batch if memory else 0
        cache = 2 * self.blocks * self.keys * batch * past
        operations = 2 * (weights * batch + deltas) + self._attend(batch, 1, past)
        return [Phase((weights + deltas + cache) * self.width, operations)]

    def answer(self, batch: int, prompt: float, new_tokens: int, memory: bool = True) -> list[Phase]:
        """A prompt and ``new_tokens`` tokens, the first of which the prompt's pass gives."""
        step = self.decode_step(batch, prompt + new_tokens / 2, memory)
        return self.prefill(batch, prompt) + [phase.times(new_tokens - 1) for phase in step]

    def _attend(self, batch: int, queries: float, keys: float) -> float:
        return 4 * batch * self.blocks * self.queries * queries * keys


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth and matmul rate of a device, medians of 10."""
    large = device.type == "cuda"
    source = torch.randn((1 << 30 if large else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    copy = median(timed(device, lambda: target.copy_(source), 10))
    bandwidth = 2 * source.nbytes / copy
    size = 8192 if large else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = median(timed(device, lambda: left @ right, 10))
    return Ceilings(bandwidth, 2 * size**3 / product)


def timed(device: torch.device, work: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after warm-up."""
    for _ in range(WARM_UPS):
        work()
    seconds = []
    for _ in range(count):
        start = clock(device)
        work()
        seconds.append(clock(device) - start)
    return seconds


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


COLUMNS = (
    *("shape", "precision", "row", "batch", "what", "median", "low", "high", "unit", "repeats"),
    *("baseline", "baseline_value", "ratio", "target", "met", "roofline", "ratio_to_roofline", "overlapped"),
    *("note", "device", "threads", "torch", "transformers", "lightning", "triton", "commit", "date"),
)
READABLE = (
    *("row", "batch", "what", "median", "25-75%", "runs", "baseline", "ratio", "roofline", "x roofline"),
    "target",
)


@dataclass
class Report:
    """Measurements, written to a CSV file one by one and shown as a table.

    Attributes:
        path: of the CSV file, which is written anew.
        provenance: columns that all rows share.
        comparable: whether ratios may be given.
    """

    path: Path
    provenance: dict[str, str]
    comparable: bool = True
    rows: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()

    def add(
        self,
        where: Mapping[str, str],
        row: str,
        batch: int,
        what: str,
        values: Sequence[float] = (),
        unit: str = "ms",
        baseline: tuple[str, Sequence[float]] | None = None,
        bounds: tuple[float, float] | None = None,
        hardware: str = "",
        note: str = "",
    ) -> None:
        """Add one measurement; ``bounds`` are its roofline and the overlapped one, in its unit."""
        line = {**self.provenance, **where, "row": row, "batch": batch, "what": what, "note": note}
        if len(values):
            low, middle, high = np.percentile(values, (25, 50, 75))
            numbers = {"median": middle, "low": low, "high": high}
            limit, found = TARGETS.get((where["shape"], row, batch, what)), middle
            text = f"<= {limit:g} {unit}" if limit else ""
            if baseline and self.comparable:
                line["baseline"], ratio = baseline[0], middle / median(baseline[1])
                numbers |= {"baseline_value": median(baseline[1]), "ratio": ratio}
                largest = RATIO_TARGETS.get((where["shape"], row, batch, baseline[0]))
                if largest:
                    limit, found, text = largest, ratio, f"<= {largest:g} x {baseline[0]}"
            if limit:
                line |= {"target": f"{text} on {hardware}", "met": "yes" if found <= limit else "no"}
            if bounds:
                numbers |= {"roofline": bounds[0], "overlapped": bounds[1]}
                numbers["ratio_to_roofline"] = middle / bounds[0]
            line |= {name: f"{value:.4g}" for name, value in numbers.items()}
            line |= {"unit": unit, "repeats": len(values)}
        line = {name: str(line.get(name, "")) for name in COLUMNS}
        self.rows.append(line)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(line)
        cells = [line["precision"], row, f"batch {batch}", what, shown(line, "median"), line["note"]]
        print("  ".join(cell for cell in cells if cell), file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print all measurements."""
        table = Table(title=f"{self.provenance['device']}, {self.provenance['commit']}: {self.path}")
        for number, column in enumerate(READABLE):
            table.add_column(column, justify="left" if number in (0, 2, 6, 10) else "right")
        for line in self.rows:
            table.add_row(*readable(line), end_section=line["row"] == "ceiling" and line["what"] == "matmul")
        Console(width=max(140, Console().width)).print(table)


def readable(line: Mapping[str, str]) -> list[str]:
    """Cells of one measurement for people, under the headings ``READABLE``."""
    spread = "-".join(shown(line, name).partition(" ")[0] for name in ("low", "high"))
    return [
        *(line[name] for name in ("row", "batch", "what")),
        shown(line, "median") or line["note"],
        spread if line["repeats"] not in ("", "1") else "",
        line["repeats"],
        " ".join(filter(None, (line["baseline"], shown(line, "baseline_value")))),
        line["ratio"],
        shown(line, "roofline"),
        line["ratio_to_roofline"],
        line["target"] and f"{line['target']}: {'met' if line['met'] == 'yes' else 'missed'}",
    ]


def shown(line: Mapping[str, str], name: str) -> str:
    """One of a measurement's values with its unit; seconds from 1000 ms on."""
    if not line[name]:
        return ""
    value, unit = float(line[name]), line["unit"]
    if unit == "ms" and value >= 1000:
        value, unit = value / 1000, "s"
    return f"{value:.3g} {unit}"


class Bench:
    """What the rows of one workload in one precision share.

    Args:
        shape: name of the workload.
        precision: of the model.
        report: where measurements go.
        options: of the command line.
        published: values of the published loop by name and part; shared by all precisions, so the loop in
            the first of them is the baseline of all.
    """

    def __init__(
        self,
        shape: str,
        precision: str,
        report: Report,
        options: argparse.Namespace,
        published: dict[str, dict[str, list[float]]],
    ) -> None:
        self.shape, self.workload, self.precision = shape, WORKLOADS[shape], precision
        self.report, self.options, self.device = report, options, options.device
        self._published = published
        self.model, self.tokenizer = self._load()
        # Without eos, as plain generate must not end early.
        self.model.generation_config = GenerationConfig(pad_token_id=self.tokenizer.pad_token_id)
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        self.weights_gib = sum(weights.values()) / GIB
        self.counts = Counts(self.model.config, self.model.dtype)
        self.ceilings = measure_ceilings(self.device, self.model.dtype)
        for what, value, unit in (
            ("copy", self.ceilings.bandwidth / 1e12, "TB/s"),
            ("matmul", self.ceilings.rate / 1e12, "TFLOP/s"),
        ):
            self.report.add(self.where, "ceiling", 1, what, [value], unit)

    def _load(self) -> tuple[Any, PreTrainedTokenizerFast]:
        if self.workload.config is None:
            backbone = Backbone.load("demo", self.precision, self.device)
            return backbone.model, backbone.tokenizer
        dtype = torch.float32 if self.precision == "32-true" else torch.bfloat16
        model = random_model(self.workload.config, dtype, self.device)
        return model, word_tokenizer(self.workload.config)

    @property
    def where(self) -> dict[str, str]:
        """Columns that name the model."""
        return {"shape": self.shape, "precision": self.precision}

    def add(self, row: str, batch: int, what: str, values: Sequence[float], **further: Any) -> None:
        """Report one measurement; ``phases`` among ``further`` give its roofline, ``share`` divides it."""
        phases, share = further.pop("phases", None), further.pop("share", 1)
        if phases:
            bounds = self.ceilings.milliseconds(phases), self.ceilings.overlapped(phases)
            further["bounds"] = tuple(bound / share for bound in bounds)
        hardware = self.workload.hardware
        self.report.add(self.where, row, batch, what, values, hardware=hardware, **further)

    def module(self, *methods: str) -> FastMemModule:
        """The product on a backbone of its own, so that what earlier rows left there is gone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        backbone = Endless(self.model, self.tokenizer, self.precision, self.shape)
        # Out of memory must show as such, not as a slower run.
        module = FastMemModule(
            methods=list(methods),
            memorize=MemorizationSettings(steps=STEPS),
            decode=DecodingSettings(max_new_tokens=self.workload.new_tokens),
            auto_batch=False,
        )
        module.load_backbone(self.precision, backbone.device, backbone)
        return module

    def groups(self, module: FastMemModule, batch: int, label_tokens: int | None = None) -> list[Group]:
        """The row's samples in batches."""
        count = max(self.options.samples or self.workload.samples, batch)
        config = self.workload.config
        if config is None:
            samples = demo_samples(count, lambda text: module.memorizer.encode(text).context_tokens)
        else:
            samples = random_samples(config, count, label_tokens or self.workload.label_tokens)
        items = [Item(sample, module.encoder(sample)) for sample in samples]
        return [items[start : start + batch] for start in range(0, len(items), batch)]

    def compare(self, ways: Mapping[str, Way], groups: list[Group]) -> dict[str, dict[str, list[float]]]:
        """Time ways in turns; ms a sample by way and part, the part ``total`` being all of it."""
        samples = sum(map(len, groups))
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
        for way in ways.values():
            for _ in range(WARM_UPS):
                way(groups[:1])
        for repeat in range(self.options.repeats):
            if repeat >= LEAST_REPEATS and time.monotonic() > self.options.until:
                break
            for name, way in ways.items():
                start = clock(self.device)
                parts = way(groups) or {}
                total = clock(self.device) - start
                for part, seconds in {"total": total, **parts}.items():
                    found[name][part].append(1e3 * seconds / samples)
        return found

    def peak(self, way: Way, groups: list[Group], inner: PhaseMeter | None = None) -> tuple[list[float], str]:
        """Peak GiB of a cold and a warm run together, nothing where they do not fit, and a note.

        ``inner`` is the meter of a module that runs: each of its phases forgets the peak of what was before.
        """
        gc.collect()
        meter = PhaseMeter(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with meter.measure("peak"):
                way(groups)
                way(groups)
        except (RuntimeError, OutOfMemoryError) as error:
            if not (isinstance(error, OutOfMemoryError) or is_out_of_memory(error)):
                raise
            return [], "out of memory"
        note = ""
        if self.device.type == "cuda":
            note = f"reserved {torch.cuda.memory_reserved(self.device) / GIB:.3g} GiB"
        peaks = [*meter.peak_bytes.values(), *(inner.peak_bytes.values() if inner else ())]
        return [max(peaks) / GIB], note

    def published(self, part: str, alpha: float | None = None) -> tuple[str, list[float]]:
        """The published loop's ms a sample, as a baseline: ``total``, ``memorize`` or ``decode``."""
        name = "published loop" if alpha is None else "published loop with CD"
        if name not in self._published:
            groups = self.groups(self.module("fastmem"), 1)
            found = self.compare({name: lambda groups: self.run_published(groups, alpha)}, groups)[name]
            self._published[name] = found
            row = "fit-predict" if alpha is None else "contrast"
            for key, values in found.items():
                self.add(row, 1, name if key == "total" else f"{name}, {key}", values)
        return name, self._published[name][part]

    def run_published(self, groups: list[Group], alpha: float | None = None) -> dict[str, float]:
        """The published loop, one sample at a time; seconds of memorizing and decoding."""
        seconds: dict[str, float] = Counter()
        settings = MemorizationSettings(steps=STEPS)
        for item in (item for group in groups for item in group):
            context = item.encoded.context
            with edited(self.model) as ffn:
                start = clock(self.device)
                memorize(self.model, ffn, context.input_ids, context.header_length, settings)
                middle = clock(self.device)
                decode(self.model, ffn, item.prompt, (), self.workload.new_tokens, alpha)
                seconds["memorize"] += middle - start
                seconds["decode"] += clock(self.device) - middle
        return seconds

    def run_module(self, module: FastMemModule, groups: list[Group]) -> dict[str, float]:
        """The product; seconds of memorizing and decoding, as its records say."""
        seconds: dict[str, float] = Counter()
        for group in groups:
            for record in module.predict_step([item.sample for item in group]):
                if len(record["token_ids"]) != self.workload.new_tokens:
                    raise RuntimeError(f"an answer of {len(record['token_ids'])} tokens")
                seconds.update(record["seconds"])
        return seconds

    def run_generate(self, groups: list[Group]) -> None:
        """Plain greedy ``generate`` of transformers on the same prompts, already encoded."""
        for group in groups:
            fill = self.tokenizer.pad_token_id
            ids, mask = pad([item.prompt for item in group], fill, "left", self.device)
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.workload.new_tokens,
                do_sample=False,
            )
            if found.shape[1] != ids.shape[1] + self.workload.new_tokens:
                raise RuntimeError(f"generate gave {found.shape[1] - ids.shape[1]} tokens")

    def memorize_phases(self, groups: list[Group], batch: int) -> list[Phase]:
        """Phases of memorizing a batch of the groups' mean lengths."""
        contexts = [item.encoded.context for group in groups for item in group]
        tokens = mean(len(c.input_ids) for c in contexts)
        labels = mean(len(c.input_ids) - c.header_length for c in contexts)
        return self.counts.memorize(batch, tokens, labels, STEPS)

    def answer_phases(self, groups: list[Group], batch: int, memory: bool = True) -> list[Phase]:
        """Phases of answering a batch of the groups' mean prompt length."""
        prompt = mean(len(item.prompt) for group in groups for item in group)
        return self.counts.answer(batch, prompt, self.workload.new_tokens, memory)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def row_memorize(bench: Bench, batch: int) -> None:
    """memorizing alone: Memorizer.fit, ms a sample and peak memory"""
    module = bench.module("fastmem")
    groups = bench.groups(module, batch)

    def fit(groups: list[Group]) -> None:
        for group in groups:
            module.memorizer.fit([item.encoded.context for item in group])

    values = bench.compare({"fastmem": fit}, groups)["fastmem"]["total"]
    phases = bench.memorize_phases(groups, batch)
    baseline = bench.published("memorize")
    bench.add("memorize", batch, "fastmem", values, baseline=baseline, phases=phases, share=batch)
    peak, note = bench.peak(fit, groups)
    bench.add("memorize", batch, "peak", peak, unit="GiB", note=note)


def row_decode(bench: Bench, batch: int) -> None:
    """one decode step with per-sample memories, next to an eager step of transformers"""
    module = bench.module("fastmem")
    group = bench.groups(module, batch)[0]
    prompts = [item.prompt for item in group]
    # One update gives deltas of the same kind as ten.
    memory = Memorizer(module.backbone, steps=1).fit([item.encoded.context for item in group])
    deltas = memory.to(module.backbone.compute_dtype).deltas
    del memory
    prefill = Prefill(module.backbone, prompts)
    ids, _ = pad(prompts, bench.tokenizer.pad_token_id, "left", bench.device)

    def seconds_of(tokens: int) -> float:
        start = clock(bench.device)
        Decoding(prefill, "greedy", DecodingSettings(max_new_tokens=tokens), deltas).run()
        return clock(bench.device) - start

    def step(groups: list[Group]) -> dict[str, float]:
        difference = seconds_of(MANY_TOKENS) - seconds_of(FEW_TOKENS)
        return {"step": difference / (MANY_TOKENS - FEW_TOKENS)}

    @torch.no_grad()
    def eager_step(groups: list[Group]) -> dict[str, float]:
        cache = DynamicCache(config=bench.model.config)
        token = bench.model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for number in range(MANY_TOKENS):
            if number == FEW_TOKENS:
                start = clock(bench.device)
            token = bench.model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        return {"step": (clock(bench.device) - start) / (MANY_TOKENS - FEW_TOKENS)}

    # A step serves the whole batch: undo what compare does for times a sample.
    found = bench.compare({"fastmem": step, "eager transformers": eager_step}, [group])
    values, eager = ([batch * value for value in way["step"]] for way in found.values())
    past = ids.shape[1] + (FEW_TOKENS + MANY_TOKENS) / 2
    phases, plain = (bench.counts.decode_step(batch, past, memory) for memory in (True, False))
    baseline = ("eager transformers", eager)
    bench.add("decode", batch, "fastmem", values, baseline=baseline, phases=phases)
    bench.add("decode", batch, "eager transformers", eager, phases=plain)


def row_fit_predict(bench: Bench, batch: int) -> None:
    """FastMemModule.predict_step: memorize and answer, next to plain generate and the published loop"""
    module = bench.module("fastmem")
    groups = bench.groups(module, batch)
    ways = {"fastmem": lambda groups: bench.run_module(module, groups), "generate": bench.run_generate}
    found = bench.compare(ways, groups)
    ours, plain = found["fastmem"], found["generate"]["total"]
    memorizing, answering = bench.memorize_phases(groups, batch), bench.answer_phases(groups, batch)
    both = {"phases": memorizing + answering, "share": batch}
    add, row = bench.add, "fit-predict"
    add(row, batch, "fastmem", ours["total"], baseline=("generate", plain), **both)
    add(row, batch, "fastmem", ours["total"], baseline=bench.published("total"), **both)
    for part, phases in (("memorize", memorizing), ("decode", answering)):
        baseline = bench.published(part)
        add(row, batch, f"fastmem, {part}", ours[part], baseline=baseline, phases=phases, share=batch)
    add(row, batch, "generate", plain, phases=bench.answer_phases(groups, batch, memory=False), share=batch)


def row_contrast(bench: Bench, batch: int) -> None:
    """fit-predict with contrastive decoding over the same without"""
    modules = {name: bench.module(name) for name in ("fastmem+cd", "fastmem")}
    groups = bench.groups(modules["fastmem"], batch)
    ways = {
        name: lambda groups, module=module: bench.run_module(module, groups)
        for name, module in modules.items()
    }
    found = bench.compare(ways, groups)
    ours = found["fastmem+cd"]["total"]
    baseline = ("fastmem", found["fastmem"]["total"])
    phases = bench.memorize_phases(groups, batch) + bench.answer_phases(groups, batch)
    bench.add("contrast", batch, "fastmem+cd", ours, baseline=baseline, phases=phases, share=batch)
    alpha = DECODERS["cd"].defaults["alpha"]
    bench.add("contrast", batch, "fastmem+cd", ours, baseline=bench.published("total", alpha))


@contextmanager
def card_of(gib: float | None, device: torch.device) -> Iterator[None]:
    """Let PyTorch have this much memory only, as on a smaller card."""
    if gib is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def row_memory(bench: Bench, batch: int) -> None:
    """peak memory: memorize and answer about one long context (batch 1), and a batch of ordinary ones"""
    module = bench.module("fastmem")
    long = batch == 1
    groups = bench.groups(module, batch, bench.workload.long_tokens if long else None)[:1]
    what, baseline = "peak, long context" if long else "peak", None
    if long:
        # Before the product leaves caches on its backbone.
        loop, note = bench.peak(bench.run_published, groups)
        bench.add("memory", batch, f"published loop, {what}", loop, unit="GiB", note=note)
        baseline = ("published loop", loop) if loop else None
    with card_of(CARD_GIB if long else None, bench.device):
        ours, note = bench.peak(lambda groups: bench.run_module(module, groups), groups, module.meter)
    if long and bench.device.type == "cuda":
        note += f", allowed {CARD_GIB} GiB"
    bench.add("memory", batch, what, ours, unit="GiB", baseline=baseline, note=note)
    if not long:
        shares = [(value - bench.weights_gib) / batch for value in ours]
        bench.add("memory", batch, "peak without weights, a sample", shares, unit="GiB")


ROWS: dict[str, Callable[[Bench, int], None]] = {
    "memorize": row_memorize,
    "decode": row_decode,
    "fit-predict": row_fit_predict,
    "contrast": row_contrast,
    "memory": row_memory,
}


def check_loop(shape: str, device: torch.device) -> bool:
    """Compare the published loop with the package in float32, on two blocks of the workload's widths."""
    config = WORKLOADS[shape].config
    if config is None:
        backbone = Endless.load("demo", "32-true", device)
        texts, settings = {}, CHECKED
    else:
        config = {**config, "num_hidden_layers": 2}
        model = random_model(config, torch.float32, device)
        backbone = Endless(model, word_tokenizer(config), "32-true", shape)
        sample = random_samples(config, 1, WORKLOADS[shape].label_tokens)[0]
        texts, settings = {"context": sample.context, "question": sample.question}, MemorizationSettings()
    try:
        worst = check(backbone, settings=settings, **texts)
    except Mismatch as error:
        print(f"the published loop and the package differ, so no ratios: {error}", file=sys.stderr)
        return False
    print(f"the published loop and the package agree within {worst:.1e}", file=sys.stderr, flush=True)
    return True


def provenance(device: torch.device, commit: str | None) -> dict[str, str]:
    """Columns that say where measurements come from."""
    where = environment(device)
    packages = {name: where["packages"][name] for name in ("torch", "transformers", "lightning")}
    try:
        packages["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        packages["triton"] = "not installed"
    return {
        "device": where["device"]["name"],
        "threads": str(where["device"]["threads"]),
        **packages,
        "commit": commit or git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def git_commit() -> str:
    """Short hash of the commit, with ``-dirty`` where files other than results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_slug(name: str, device: torch.device) -> str:
    """Short name of a device for a file: ``h100``, ``cpu``."""
    model = re.search(r"[A-Z]{1,3}\d{2,4}", name) if device.type != "cpu" else None
    return model.group().lower() if model else device.type


def measure(options: argparse.Namespace) -> int:
    """Run the rows asked for; 1 if the published loop and the package differ, or a row failed."""
    transformers_logging.set_verbosity_error()
    options.until = time.monotonic() + (options.seconds_budget or float("inf"))
    native = "8b" if options.device.type == "cuda" else "demo"
    shape = options.shape or native
    workload = WORKLOADS[shape]
    facts = provenance(options.device, options.commit)
    name = device_slug(facts["device"], options.device) + ("" if shape == native else f"_{shape}")
    comparable = check_loop(shape, options.device)
    report = Report(options.out or RESULTS / f"speed_{name}.csv", facts, comparable)
    published: dict[str, dict[str, list[float]]] = {}
    try:
        whole = [
            measure_rows(Bench(shape, precision, report, options, published), options.rows or workload.rows)
            for precision in options.precisions or workload.precisions
        ]
    finally:
        report.show()
    return 0 if comparable and all(whole) else 1


def measure_rows(bench: Bench, names: Sequence[str]) -> bool:
    """Measure rows of one model; one that fails is noted and does not take the others along."""
    whole = True
    for row in names or ROWS:
        for batch in bench.workload.batches.get(row, ()):
            if time.monotonic() > bench.options.until:
                print(f"{bench.precision} {row} batch {batch}: no time left", file=sys.stderr)
                continue
            try:
                ROWS[row](bench, batch)
            except Exception as error:
                whole = False
                traceback.print_exc()
                note = "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}"
                bench.add(row, batch, "fastmem", [], note=note)
    return whole


def render(paths: Sequence[Path]) -> None:
    """Print the CSV files as markdown tables, one a file, precision and row."""
    for path in paths:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        first = lines[0]
        print(f"## {first['device']}, {path.name}\n")
        versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "triton"))
        print(f"{versions}, {first['threads']} CPU threads; commit {first['commit']}, {first['date']}.\n")
        for (shape, precision), group in groupby(lines, lambda line: (line["shape"], line["precision"])):
            rows = list(group)
            limits = ", ".join(
                f"{line['what']} {shown(line, 'median')}" for line in rows if line["row"] == "ceiling"
            )
            print(f"### {shape}, {precision} ({limits})\n")
            print("| " + " | ".join(READABLE) + " |\n|" + " --- |" * len(READABLE))
            for name in ROWS:
                for line in rows:
                    if line["row"] == name:
                        print("| " + " | ".join(readable(line)) + " |")
            print()


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""
    allowed = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(allowed)}")
        return names

    return parse


def main() -> int:
    rows = "\n".join(f"  {name:12} {row.__doc__}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"rows:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action", nargs="?", default="measure", choices=("measure", "render"), help="measure by default"
    )
    parser.add_argument("files", nargs="*", type=Path, help="CSV files to render")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--shape", choices=WORKLOADS, help="model; 8b on a GPU, demo on a CPU")
    parser.add_argument(
        "--rows", type=names_of(ROWS), help="rows to measure, with commas; fit-predict on the demo, else all"
    )
    parser.add_argument(
        "--precisions",
        type=names_of(("32-true", "bf16-true")),
        help="of the model, with commas; bf16-true for 8b, both for demo",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of everything (default: 5)")
    parser.add_argument("--samples", type=int, help="least samples of a row (default: 1 batch; demo: 16)")
    parser.add_argument(
        "--seconds-budget",
        type=float,
        help=f"begin no row after this many seconds, and repeat a begun one {LEAST_REPEATS} times only",
    )
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/speed_DEVICE.csv)")
    parser.add_argument("--commit", help="commit to note where there is no git repository")
    options = parser.parse_args()
    if options.action == "render":
        render(options.files or sorted(RESULTS.glob("speed_*.csv")))
        return 0
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
