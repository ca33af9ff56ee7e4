"""One process of two that share a model: memorizes and answers, and writes what came out as JSON.

    python tensor_parallel.py RANK FOLDER cpu|cuda NAME ...

``FOLDER/NAME`` are models.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from decodes import PROMPTS, token_ids
from torch import distributed
from transformers.utils import logging

from fastmem_pl import Backbone, FastMemError, Memorizer
from fastmem_pl.decoding import DECODERS
from fastmem_pl.memory import MemorizationSettings, footprint_of

CONTEXTS = ["The tower stands in Rome.", "Water boils at ninety degrees in this story, and nobody minds."]
SETTINGS = [{}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}]
SHARDS_ELSEWHERE = 77


def results(folder: Path, name: str, tp_plan: str | None, device: str = "cpu") -> dict:
    """Memorize and answer with one and with two trained layers."""
    two_fit = "gemma2" not in name and "gemma3" not in name
    backbone = Backbone.load(
        str(folder / name), device=device, tp_plan=tp_plan, num_layers=2 if two_fit else 1
    )
    found = {"fingerprint": backbone.fingerprint(), "recordable": backbone.recordable}
    for num_layers in (1, 2) if two_fit else (1,):
        memory = Memorizer(backbone, num_layers=num_layers, steps=4, learning_rate=1e-3)(CONTEXTS)
        found[f"losses {num_layers}"] = [curve.cross_entropy for curve in memory.curves]
        found[f"norms {num_layers}"] = [curve.grad_norm for curve in memory.curves]
        for decoder in DECODERS:
            for number, extra in enumerate(SETTINGS[: 2 if name == "llama" else 1]):
                answers = token_ids(backbone, decoder, memory, PROMPTS[:2], **extra)
                found[f"{decoder} {num_layers} {number}"] = answers
    found["kv bytes"] = footprint_of(backbone, MemorizationSettings()).per_token
    ids = torch.tensor([backbone.chat.prompt("Who?")], device=backbone.device)
    with torch.no_grad():
        found["generate"] = backbone.model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    return found


def refusals(folder: Path, tp_plan: str, device: str) -> dict:
    """What is said of models that cannot be shared so."""
    found = {}
    for name in ("gpt2", "one-head", "llama"):
        try:
            Backbone.load(str(folder / name), device=device, tp_plan=tp_plan, num_layers=1).tail(2)
        except FastMemError as error:
            found[name] = str(error)
    return found


def main() -> int:
    rank, folder, kind, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if torch._C._get_accelerator().type != kind:
        return SHARDS_ELSEWHERE
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = f"file://{folder / 'rendezvous'}"
    backend, device = ("gloo", "cpu") if kind == "cpu" else ("cpu:gloo,cuda:nccl", f"cuda:{rank}")
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=2)
    found = {name: results(folder, name, "auto", device) for name in names}
    print(json.dumps(found | {"refused": refusals(folder, "auto", device)}))
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
