"""Memorizing and answering with large models, of several families, on one card or more: time and memory.

    python benchmarks/large.py --devices cuda:0,cuda:1              # 70B in bfloat16 on two cards
    python benchmarks/large.py --devices cuda:0,cpu --batches 1     # on one, some blocks on the CPU
    python benchmarks/large.py --devices cuda:0 --blocks 60         # fewer blocks, on one
    python benchmarks/large.py --shape qwen3-30b-a3b,gpt-oss-20b,glm4-9b    # other families, one card
    python benchmarks/large.py --shape tiny --devices cpu           # on a CPU in seconds, to try the program
    python benchmarks/large.py render benchmarks/results/large_*.csv        # the numbers in docs/scaling.md

The model has the shapes of a published one and random weights, which are made on the devices block by
block; nothing is read or downloaded. Blocks are laid out as `--model.backbone.device_map auto` does it,
with room for the largest batch on the last card, where the trained block, the final norm and the head are;
the CPU, if named, takes the lowest blocks, as few as will do. Contexts have 160 tokens with a loss,
memorizing takes 10 steps, and answers have 20 tokens. Values are seconds a sample: medians, with the 20th
and 80th percentiles. "fall of the cross-entropy" is that of the first context, nats a token; with
`--precision 32-true` the same bfloat16 weights are widened, so that falls can be compared (with few
`--blocks`, as such a model is twice as large).
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import _8B, _70B, _TINY, Endless, device_slug, provenance, random_samples, word_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from fastmem_pl import DecodingSettings, FastMemError, Memorizer, Memory
from fastmem_pl.backbone import find_anatomy
from fastmem_pl.backbone.placement import Reserve, lay_out, parts_of, space_for_weights
from fastmem_pl.base.phases import PhaseMeter, is_out_of_memory
from fastmem_pl.decoding import METHODS, Decoding, GraphPool, Prefill

RESULTS = Path(__file__).parent / "results"
_QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
_GPT_OSS_20B = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
}
_GLM4_9B = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
_TINY_MOE = {**_QWEN3_30B, **_TINY, "moe_intermediate_size": 32, "head_dim": 16, "num_experts": 8}
# Type of the model, its shape, type of the weights.
SHAPES = {
    "70b": ("llama", _70B, "bf16-true"),
    "8b": ("llama", _8B, "bf16-true"),
    "qwen3-30b-a3b": ("qwen3_moe", _QWEN3_30B, "bf16-true"),
    "gpt-oss-20b": ("gpt_oss", _GPT_OSS_20B, "bf16-true"),
    "glm4-9b": ("glm4", _GLM4_9B, "bf16-true"),
    "tiny": ("llama", _TINY, "32-true"),
    "tiny-moe": ("qwen3_moe", _TINY_MOE, "32-true"),
}
DTYPES = {"bf16-true": torch.bfloat16, "32-true": torch.float32}
ANSWERED_BY = ("fastmem", "fastmem+cd")
LABELS, STEPS, NEW_TOKENS = 160, 10, 20
WARM_UPS = 1
# Of a batch's longest row, prompt and answer, which room is left for.
TOKENS = 256
COLUMNS = (
    *("shape", "precision", "blocks", "layout", "batch", "what", "median", "p20", "p80", "unit", "repeats"),
    *("steps", "context_tokens", "new_tokens", "note", "device", "threads"),
    *("torch", "transformers", "lightning", "triton", "commit", "date"),
)


def empty_model(config: PreTrainedConfig, precision: str) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])


def layout(
    model: Any, precision: str, devices: Sequence[torch.device], samples: int, on_cpu: int | None
) -> dict[str, torch.device]:
    """Devices of the model's parts, with room for a batch.

    Args:
        model: without weights.
        precision: of the weights and the products.
        devices: to use, the tail's last; among GPUs, a CPU takes what these have no room for.
        samples: of the largest batch.
        on_cpu: blocks on the CPU; by default as few as will do.
    """
    anatomy, dtype = find_anatomy(model), DTYPES[precision]
    gpus = [device for device in devices if device.type != "cpu"] or list(devices)
    parts = parts_of(model, anatomy, 1)
    reserve = Reserve.of(model, anatomy, 1, (dtype, dtype), gpus[-1], samples, TOKENS)
    free = {device: space_for_weights(device) for device in gpus}
    most = len(anatomy.blocks) - 1 if len(gpus) < len(devices) else 0
    for count in range(most + 1) if on_cpu is None else [on_cpu]:
        lowest = [part.name for part in parts if part.block is not None and part.block < count]
        others = [part for part in parts if part.name not in lowest]
        found = lay_out(others, gpus, free, reserve, balanced=True)
        if found is not None:
            return found | dict.fromkeys(lowest, torch.device("cpu"))
    raise FastMemError(
        f"--devices: no room on {', '.join(map(str, devices))} for {samples} samples; lower --batches or "
        "--blocks, or add a device or the cpu"
    )


@torch.no_grad()
def fill(model: Any, places: dict[str, torch.device]) -> None:
    """Make random weights on the devices, part by part."""
    torch.manual_seed(0)
    for name, device in places.items():
        part = model.get_submodule(name)
        if not list(part.parameters()):
            # Tables of angles are computed, not drawn.
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(part)(config=model.config).to(device))
            continue
        part.to_empty(device=device)
        for parameter in part.parameters():
            if parameter.ndim > 1:
                # In bfloat16 whatever the precision, so that models of one shape are the same.
                drawn = torch.empty_like(parameter, dtype=torch.bfloat16)
                parameter.copy_(drawn.uniform_(-0.02, 0.02))
            else:
                nn.init.ones_(parameter)


class Bench:
    """Measures batches of one model, and writes each measurement to the CSV file as it comes.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        kind, shape, precision = SHAPES[options.shape]
        self.precision = options.precision or precision
        shape = {**shape, "num_hidden_layers": options.blocks or shape["num_hidden_layers"]}
        config = AutoConfig.for_model(kind, **shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        model = empty_model(config, self.precision)
        places = layout(model, self.precision, options.devices, max(options.batches), options.cpu_blocks)
        fill(model, places)
        self.backbone = Endless(model.eval(), word_tokenizer(shape), self.precision)
        # Kept from call to call, as a run keeps them; a model on several devices has none.
        self.graphs = GraphPool()
        self.options, self.samples = options, random_samples(shape, max(options.batches), LABELS)
        self.meters = {device: PhaseMeter(device) for device in self.backbone.placement.devices}
        blocks = self.backbone.placement.blocks
        self.facts = {
            "shape": options.shape,
            "precision": self.precision,
            "blocks": len(blocks),
            "layout": " ".join(f"{device}={blocks.count(device)}" for device in dict.fromkeys(blocks)),
            "steps": STEPS,
            "context_tokens": LABELS,
            "new_tokens": NEW_TOKENS,
            **provenance(self.backbone.device, options.commit or os.environ.get("FASTMEM_COMMIT")),
        }
        facts = self.facts
        name = device_slug(facts["device"], self.backbone.device)
        cut = f"_{options.blocks}blocks" if options.blocks else ""
        other = "" if self.precision == precision else f"_{self.precision}"
        self.path = options.out or RESULTS / f"large_{name}_{options.shape}{cut}{other}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
        print(f"{len(blocks)} blocks on {facts['layout']}", file=sys.stderr, flush=True)

    def run(self) -> bool:
        """Measure all batch sizes; whether none failed."""
        whole = True
        for size in self.options.batches:
            try:
                self.measure(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                whole = False
                self.add(size, "memorize", [], note="out of memory")
            self.graphs.clear()
            gc.collect()
            if self.backbone.device.type == "cuda":
                torch.cuda.empty_cache()
        return whole

    def measure(self, size: int) -> None:
        """Memorize and answer one batch again and again."""
        samples = self.samples[:size]
        contexts = [sample.context for sample in samples]
        prompts = [self.backbone.chat.prompt(f"{s.context} {s.question}") for s in samples]
        memorizer = Memorizer(self.backbone, steps=STEPS)
        memory: list[Memory] = []
        self.repeat(size, "memorize", lambda: memory.__setitem__(slice(None), [memorizer(contexts)]))
        losses = memory[0].curves[0].cross_entropy
        self.add(size, "fall of the cross-entropy", [losses[0] - losses[-1]], unit="nats a token")
        for name in ANSWERED_BY:
            self.repeat(size, name, lambda name=name: self.answer(prompts, memory[0], METHODS[name].decoder))

    def answer(self, prompts: Sequence[Sequence[int]], memory: Memory, decoder: str) -> None:
        settings = DecodingSettings(max_new_tokens=NEW_TOKENS)
        prefill = Prefill(self.backbone, prompts)
        found = Decoding(prefill, decoder, settings, memory.deltas, graphs=self.graphs).run()
        assert all(len(answer.token_ids) == NEW_TOKENS for answer in found)

    def repeat(self, size: int, what: str, work: Any) -> None:
        """Time calls after warm-up; a device's peak is that of all of them."""
        seconds = []
        for call in range(WARM_UPS + self.options.repeats):
            with ExitStack() as stack:
                timings = [stack.enter_context(meter.measure(what)) for meter in self.meters.values()]
                work()
            if call >= WARM_UPS:
                seconds.append(max(timing["seconds"] for timing in timings) / size)
        self.add(size, what, seconds)
        for device, meter in self.meters.items():
            self.add(size, f"{what}, peak of {device}", [meter.peak_bytes.pop(what) / 2**30], unit="GiB")

    def add(
        self, size: int, what: str, values: Sequence[float], unit: str = "s a sample", note: str = ""
    ) -> None:
        """Write one measurement."""
        line = {**self.facts, "batch": size, "what": what, "note": note}
        if values:
            numbers = dict(zip(("p20", "median", "p80"), np.percentile(values, (20, 50, 80)), strict=True))
            line |= {name: f"{value:.4g}" for name, value in numbers.items()}
            line |= {"unit": unit, "repeats": len(values)}
        line = {name: str(line.get(name, "")) for name in COLUMNS}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(line)
        cells = (f"batch {size}", what, line["median"], line["unit"], note)
        print("  ".join(cell for cell in cells if cell), file=sys.stderr, flush=True)


def render(paths: Sequence[Path]) -> None:
    """Print CSV files as markdown tables, one a file: a row a batch size and phase."""
    for path in paths:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        first = lines[0]
        print(f"## {first['shape']}, {first['blocks']} blocks on {first['layout']} ({first['precision']})\n")
        print(f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}, ", end="")
        print(f"commit {first['commit']}, {first['date']}.\n")
        print("| batch | phase | seconds a sample | 20-80% | runs | peak, GiB |\n|" + " --- |" * 6)
        for line in lines:
            if ", peak of " in line["what"]:
                continue
            start = f"{line['what']}, peak of "
            peaks = [
                f"{other['what'].removeprefix(start)} {float(other['median']):.1f}"
                for other in lines
                if other["batch"] == line["batch"] and other["what"].startswith(start)
            ]
            cells = [line["batch"], line["what"], line["median"] or line["note"]]
            cells += [f"{line['p20']}-{line['p80']}", line["repeats"], ", ".join(peaks)]
            print("| " + " | ".join(cells) + " |")
        print()


def main() -> int:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", default="measure", choices=("measure", "render"))
    parser.add_argument("files", nargs="*", type=Path, help="CSV files to render")
    parser.add_argument("--shape", default="70b", help=f"one or several with commas: {', '.join(SHAPES)}")
    parser.add_argument("--precision", choices=DTYPES, help="of weights and products (default: the shape's)")
    parser.add_argument("--blocks", type=int, help="of the model (default: those of the shape)")
    parser.add_argument(
        "--devices",
        type=lambda text: [torch.device(name) for name in text.split(",")],
        default=",".join(gpus or ["cpu"]),
        help="with commas, the tail's last but for the CPU (default: all GPUs)",
    )
    parser.add_argument("--cpu-blocks", type=int, help="blocks on the CPU (default: as few as will do)")
    parser.add_argument(
        "--batches", type=lambda text: [int(size) for size in text.split(",")], default="1,4,8"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of everything (default: 5)")
    parser.add_argument(
        "--out", type=Path, help="CSV file (default: benchmarks/results/large_DEVICE_SHAPE.csv)"
    )
    parser.add_argument("--commit", help="commit to note where there is no git repository")
    options = parser.parse_args()
    if options.action == "render":
        render(options.files or sorted(RESULTS.glob("large_*.csv")))
        return 0
    whole = True
    for shape in options.shape.split(","):
        if shape not in SHAPES:
            parser.error(f"--shape: {shape!r} is unknown; allowed: {', '.join(SHAPES)}")
        whole &= Bench(argparse.Namespace(**{**vars(options), "shape": shape})).run()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
