"""How far bfloat16 memorizing follows float32: the fall of the cross-entropy over the steps.

    python benchmarks/precision.py [--device cuda] [--samples 60] [--out benchmarks/results/precision_cpu.csv]

For every precision, the packaged demo contexts are memorized at the paper's learning rate. The baseline
"autocast, edited weights" is the published way: float32 weights edited in place under bfloat16 autocast,
one sample at a time.
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path

import torch
import torch.nn.functional as F

from fastmem_pl import Backbone, FastMemDataModule, Memorizer
from fastmem_pl.run.provenance import environment

LEARNING_RATE = 1e-5
STEPS = 10


def product_falls(precision: str, device: str, contexts: list[str], batch_size: int) -> list[float]:
    """Fall of the cross-entropy of every context through the product's own path."""
    memorizer = Memorizer(Backbone.load("demo", precision, device), steps=STEPS, learning_rate=LEARNING_RATE)
    falls = []
    for start in range(0, len(contexts), batch_size):
        memory = memorizer(contexts[start : start + batch_size])
        falls += [c.cross_entropy[0] - c.cross_entropy[-1] for c in memory.curves]
    return falls


def published_falls(device: str, contexts: list[str]) -> list[float]:
    """The same by editing float32 weights under bfloat16 autocast."""
    backbone = Backbone.load("demo", "32-true", device)
    memorizer = Memorizer(backbone, steps=STEPS, learning_rate=LEARNING_RATE)
    falls = []
    for context in contexts:
        encoded = memorizer.encode(context)
        model = copy.deepcopy(backbone.model)
        trained = list(model.model.layers[-1].mlp.parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        ids = torch.tensor([encoded.input_ids], device=device)
        labels, losses, reference = ids[0, encoded.header_length :], [], None
        for _ in range(STEPS):
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = model(input_ids=ids).logits[0, encoded.header_length - 1 : -1].float()
            log_p = logits.log_softmax(-1)
            reference = log_p.detach() if reference is None else reference
            loss = F.nll_loss(log_p, labels)
            kl = F.kl_div(log_p, reference, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            (loss + 0.1 * kl).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(loss.item())
        falls.append(losses[0] - losses[-1])
    return falls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data = FastMemDataModule(limit=arguments.samples)
    data.setup()
    contexts = [sample.context for sample in data.samples]
    device = arguments.device
    falls = {
        precision: product_falls(precision, device, contexts, arguments.batch_size)
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }
    falls["autocast, edited weights"] = published_falls(device, contexts)
    exact = torch.tensor(falls["32-true"])
    where = environment(torch.device(device))
    rows = []
    for way, values in falls.items():
        fall = torch.tensor(values)
        error = fall.std() / len(fall) ** 0.5 if len(fall) > 1 else torch.tensor(float("nan"))
        rows.append(
            {
                "way": way,
                "samples": len(fall),
                "mean_fall": f"{fall.mean():.5f}",
                "standard_error": f"{error:.5f}",
                "of_float32": f"{fall.sum() / exact.sum():.4f}",
                "device": where["device"]["name"],
                "torch": where["packages"]["torch"],
                "transformers": where["packages"]["transformers"],
            }
        )
        row = rows[-1]
        print(f"{way:26} fall {row['mean_fall']} ± {row['standard_error']}, {row['of_float32']} of float32")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
