"""What policies for long texts, forms of files and adapters keep of a memory, and what they cost.

    python benchmarks/memories.py measure --data nqswap.json   # results/memories_cpu.csv
    python benchmarks/memories.py measure --shape 8b           # on a GPU, random weights
    python benchmarks/memories.py render                       # prints what they say

With data: the demo model. Documents are 8 NQ-Swap contexts each, cut into windows of 256 tokens; every policy
memorizes them, and the 8 questions are asked of the memory alone and with their own passage shown ("The
answer is:" opens the answers).
Forms and ranks are those of memories of single contexts. With a shape: one context of 160 tokens, and how
long saving, loading, exporting and answering inside `generate` take.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from speed import _8B, _TINY, device_slug, provenance, random_model, random_samples, word_tokenizer

from fastmem_pl import Backbone, Memorizer, Memory, WindowSettings, answer
from fastmem_pl.backbone import EncodedContext
from fastmem_pl.export import to_lora, to_memory
from fastmem_pl.export.deviation import Deviation
from fastmem_pl.memory import DocumentFit
from fastmem_pl.metrics import normalize_answer

RESULTS = Path(__file__).parent / "results"
SHAPES = {"8b": _8B, "tiny": _TINY}
DOCUMENTS, CONTEXTS, MAX_WORDS = 4, 8, 120
WINDOW = 256
RATE = 3e-4
# Policy and updates; sequential takes as many for each window.
POLICIES = (("joint", 10), ("joint", 50), ("sequential", 10), ("cut", 10))
REPEATS = 5

Row = dict[str, Any]


def documents(source: Path) -> list[list[dict[str, Any]]]:
    """Groups of records whose contexts are read as one text."""
    records = [r for r in json.loads(source.read_text()) if len(r["sub_context"].split()) <= MAX_WORDS]
    return [records[i * CONTEXTS : (i + 1) * CONTEXTS] for i in range(DOCUMENTS)]


def cross_entropy(backbone: Backbone, windows: Sequence[EncodedContext], memory: Memory | None) -> float:
    """Of all tokens of a document, by the model's own forward pass."""
    served = memory.attached(backbone) if memory else torch.no_grad()
    losses = []
    with torch.no_grad(), served:
        for part in windows:
            logits = backbone.model(input_ids=torch.tensor([part.input_ids])).logits[0]
            log_p = logits[part.header_length - 1 : -1].log_softmax(-1)
            labels = torch.tensor(part.input_ids[part.header_length :])
            losses += (-log_p.gather(1, labels[:, None])).flatten().tolist()
    return mean(losses)


def contained(
    backbone: Backbone, records: Sequence[dict[str, Any]], memory: Memory | None, shown: bool
) -> list[bool]:
    """Whether answers hold the answer of the memorized text, with the question's own passage shown or not."""
    questions = [record["input"] for record in records]
    contexts = [record["sub_context"] for record in records] if shown else None
    options = {"max_new_tokens": 24, "answer_prefix": "The answer is:"}
    texts = answer(backbone, questions, contexts, memory, **options)
    wanted = [record["sub_answer"] for record in records]
    wanted = [names if isinstance(names, list) else [names] for names in wanted]
    return [
        any(normalize_answer(name) in normalize_answer(text) for name in names)
        for text, names in zip(texts, wanted, strict=True)
    ]


def policy_rows(backbone: Backbone, groups: Sequence[Sequence[dict[str, Any]]]) -> Iterator[Row]:
    """Every policy on every document."""
    texts = ["\n\n".join(record["sub_context"] for record in group) for group in groups]
    layout = Memorizer(backbone)
    windows = [DocumentFit(layout, text, WindowSettings("joint", WINDOW)).encoded for text in texts]
    yield {
        "part": "policy",
        "what": "base model",
        "windows": mean(map(len, windows)),
        "tokens": mean(sum(part.context_tokens for part in parts) for parts in windows),
        "cross_entropy": mean(cross_entropy(backbone, parts, None) for parts in windows),
        "alone": mean(hit for group in groups for hit in contained(backbone, group, None, False)),
        "shown": mean(hit for group in groups for hit in contained(backbone, group, None, True)),
        "samples": len(groups) * CONTEXTS,
    }
    for policy, steps in POLICIES:
        memorizer = Memorizer(backbone, steps=steps, learning_rate=RATE)
        seconds, losses, alone, shown = [], [], [], []
        for group, text, parts in zip(groups, texts, windows, strict=True):
            fit = DocumentFit(memorizer, text, WindowSettings(policy, WINDOW))
            start = time.perf_counter()
            for _ in fit.run():
                pass
            seconds.append(time.perf_counter() - start)
            memory = fit.memory()
            losses.append(cross_entropy(backbone, parts, memory))
            alone += contained(backbone, group, memory, False)
            shown += contained(backbone, group, memory, True)
        yield {
            "part": "policy",
            "what": policy,
            "steps": steps,
            "updates": fit.num_updates,
            "seconds": median(seconds),
            "cross_entropy": mean(losses),
            "alone": mean(alone),
            "shown": mean(shown),
            "samples": len(alone),
        }
        print(f"  {policy}, {steps} steps: done", file=sys.stderr)


def form_rows(backbone: Backbone, texts: Sequence[str]) -> Iterator[Row]:
    """What files and adapters lose, over contexts."""
    memories = [Memorizer(backbone, steps=10, learning_rate=RATE)(text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        for form in ("float32", "bfloat16", "int8", "low-rank"):
            out = Path(folder, form)
            reports = [to_memory(memory, backbone, out, form, force=True) for memory in memories]
            yield summary("form", form, reports)
        for max_kl in (0.1, 0.01, 0.001):
            out = Path(folder, f"lora-{max_kl}")
            reports = [to_lora(m, backbone, out, max_kl=max_kl, force=True) for m in memories]
            yield {**summary("lora", f"KL up to {max_kl}", reports), "max_kl": max_kl}


def summary(part: str, what: str, reports: Sequence[Any]) -> Row:
    """Medians of exports, and their extremes."""
    ranks = [report.rank for report in reports if report.rank]
    return {
        "part": part,
        "what": what,
        "bytes": median(report.bytes for report in reports),
        "relative_error": median(report.relative_error for report in reports),
        "kl": median(report.kl for report in reports),
        "kl_worst": max(report.kl for report in reports),
        "kl_base": median(report.kl_base for report in reports),
        "rank": median(ranks) if ranks else "",
        "rank_least": min(ranks, default=""),
        "rank_most": max(ranks, default=""),
        "samples": len(reports),
    }


def shape_rows(shape: str, device: torch.device) -> Iterator[Row]:
    """Times of a large model's memory."""
    config = SHAPES[shape]
    model = random_model(config, torch.bfloat16, device)
    backbone = Backbone(model, word_tokenizer(config), "bf16-true", shape)
    (sample,) = random_samples(config, 1, 160)
    memory = Memorizer(backbone, steps=10, learning_rate=1e-4)([sample.context])

    def row(what: str, work: Callable[[], Any], **further: Any) -> Row:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(device) if device.type == "cuda" else None
            seconds.append(time.perf_counter() - start)
        spread = {"seconds": median(seconds), "least": min(seconds), "most": max(seconds)}
        print(f"  {what}: {spread}", file=sys.stderr)
        return {"part": shape, "what": what, "samples": REPEATS, **spread, **further}

    with tempfile.TemporaryDirectory() as folder:
        for form in ("bfloat16", "int8"):
            path = Path(folder, form)
            yield row(f"save {form}", lambda path=path, form=form: memory.save(path, form=form))
            size = path.stat().st_size
            yield row(f"load {form}", lambda path=path: Memory.load(path, backbone, device), bytes=size)
        deviation = Deviation(memory, backbone)
        path = Path(folder, "lora")
        for rank in (16, 64, "auto"):
            report = to_lora(memory, backbone, path, rank, max_kl=deviation.kl_base / 100, force=True)
            yield row(
                f"LoRA, rank {rank}",
                lambda rank=rank: to_lora(
                    memory, backbone, path, rank, max_kl=deviation.kl_base / 100, force=True
                ),
                bytes=report.bytes,
                rank=report.rank,
                kl=report.kl,
                kl_base=report.kl_base,
                relative_error=report.relative_error,
            )
    ids = torch.randint(4, config["vocab_size"], (1, 64), device=device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def generate(tokens: int) -> None:
        model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)

    for what, served in (("generate, 32 tokens", None), ("generate, 32 tokens, memory attached", memory)):
        with served.attached(backbone) if served else torch.no_grad():
            generate(8)
            yield row(what, lambda: generate(32))


FIELDS = (
    *("part", "what", "steps", "updates", "windows", "tokens", "seconds", "least", "most"),
    *("cross_entropy", "alone", "shown", "bytes", "relative_error", "kl", "kl_worst", "kl_base", "max_kl"),
    *("rank", "rank_least", "rank_most", "samples"),
    *("device", "threads", "torch", "transformers", "lightning", "triton", "commit", "date"),
)


def measure(options: argparse.Namespace) -> None:
    """Measure and write the CSV."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.shape:
        rows = list(shape_rows(options.shape, device))
    else:
        backbone = Backbone.load("demo")
        groups = documents(options.data)
        rows = list(policy_rows(backbone, groups))
        rows += form_rows(backbone, [record["sub_context"] for record in groups[0]])
    where = provenance(device, options.commit)
    path = options.out or RESULTS / f"memories_{device_slug(where['device'], device)}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    show(path)


def show(path: Path) -> None:
    """Print a CSV's rows, without what is empty."""
    for row in csv.DictReader(path.open()):
        numbers = {k: v for k, v in row.items() if v and k in FIELDS[2:-8]}
        print(f"{row['part']:8} {row['what']}: " + ", ".join(f"{k} {short(v)}" for k, v in numbers.items()))
    print(f"{path.name}: {row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}")


def short(value: str) -> str:
    """A number in at most four digits."""
    number = float(value)
    return f"{number:.4g}" if abs(number) < 10_000 else f"{number:,.0f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="measure on this machine and write a CSV")
    one.add_argument("--data", type=Path, help="NQ-Swap records in the published format")
    one.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    one.add_argument("--device", help="default: a GPU if there is one, for shapes")
    one.add_argument("--out", type=Path, help="CSV file")
    one.add_argument("--commit", help="to state, where there is no git")
    commands.add_parser("render", help="print the committed results")
    options = parser.parse_args()
    if options.command == "render":
        for path in sorted(RESULTS.glob("memories_*.csv")):
            show(path)
    elif bool(options.data) == bool(options.shape):
        parser.error("give --data or --shape")
    else:
        options.device = options.device or ("cpu" if options.data else None)
        measure(options)


if __name__ == "__main__":
    main()
