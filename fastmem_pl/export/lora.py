"""A memory as a LoRA adapter that PEFT loads."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import check_target, new_folder, write_atomic
from fastmem_pl.export.deviation import Deviation, ExportReport
from fastmem_pl.export.low_rank import LowRank
from fastmem_pl.memory import Memory

DTYPES = ("float32", "bfloat16")


def to_lora(
    memory: Memory,
    backbone: Backbone,
    out: str | Path,
    rank: int | Literal["auto"] = "auto",
    max_kl: float = 0.01,
    dtype: str = "bfloat16",
    context: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a PEFT adapter of the memory's best approximation of a rank.

    Args:
        memory: of one row.
        backbone: its model.
        out: folder to write.
        rank: that of every matrix; ``auto`` takes the smallest whose KL is at most ``max_kl``.
        max_kl: ``KL(memory || adapter)`` on the memorized text, nats a token.
        dtype: of the adapter's weights.
        context: what was memorized, where the memory does not hold it.
        force: replace what exists.
    """
    try:
        import peft
    except ImportError as error:
        raise FastMemError(
            'exporting to LoRA needs the package peft; run: pip install "fastmem-pl[lora]" (or peft)'
        ) from error
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    out = Path(out)
    check_target(out, force, folder=True)
    deviation = Deviation(memory, backbone, context)
    low_rank = LowRank(memory, backbone, getattr(torch, dtype))
    rank, tried = low_rank.choose(deviation, rank, max_kl)
    names = {module: name for name, module in backbone.model.named_modules()}
    weights, targets, transposed = {}, set(), False
    for layer, factors in zip(backbone.tail(memory.num_layers).layers, low_rank.modules(rank), strict=True):
        for (_, module), (outer, inner) in zip(backbone.anatomy.ffn_modules(layer), factors, strict=True):
            targets.add(names[module])
            transposed = isinstance(module, Conv1D)
            weights[f"base_model.model.{names[module]}.lora_A.weight"] = inner.cpu()
            weights[f"base_model.model.{names[module]}.lora_B.weight"] = outer.cpu()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=backbone.public_name,
        revision=backbone.revision,
        inference_mode=True,
        r=rank,
        # PEFT scales by alpha / r.
        lora_alpha=rank,
        target_modules=targets,
        fan_in_fan_out=transposed,
    )
    with new_folder(out, sum(tensor.nbytes for tensor in weights.values()) + (1 << 20)) as folder:
        write_atomic(folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
        # As its save_pretrained writes it, but with the set of modules in an order that does not change.
        stated = {**config.to_dict(), "target_modules": sorted(targets)}
        write_atomic(folder / "adapter_config.json", json.dumps(stated, indent=2, sort_keys=True) + "\n")
        deltas = low_rank.memory(rank).deltas
        return deviation.report("lora", out, dtype, deltas, folder, rank=rank, tried=tried)
