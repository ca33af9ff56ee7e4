"""A memory merged into its model, as a folder for plain transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone import Backbone
from fastmem_pl.errors import FastMemError, unknown
from fastmem_pl.export.lora import DTYPES
from fastmem_pl.export.report import ExportReport, Loss, as_matrix, check_target, new_folder, size_of
from fastmem_pl.memory import Memory


def to_checkpoint(
    memory: Memory,
    backbone: Backbone,
    out: str | Path,
    dtype: str | None = None,
    context: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write the model with the memory added to its weights; the model in memory stays as it is.

    Args:
        memory: of one row.
        backbone: its model.
        out: folder to write.
        dtype: of all weights; that of the model as it is loaded by default. The report states what rounding
            the trained weights to it loses: updates of 1e-5 are lost on most bfloat16 weights.
        context: what was memorized, where the memory does not hold it.
        force: replace what exists.

    Raises:
        FastMemError: when ``out`` exists or cannot be written, or the memory is of another model.
    """
    model = backbone.model
    dtype = dtype or str(backbone.anatomy.head.weight.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    out = Path(out)
    check_target(out, force, folder=True)
    loss = Loss(memory, backbone, context)
    kind = getattr(torch, dtype)
    names = {module: name for name, module in model.named_modules()}
    merged: dict[str, Tensor] = {}
    kept = []
    for layer, deltas in zip(backbone.tail(memory.num_layers).layers, memory.deltas, strict=True):
        kept.append({})
        for parts, module in backbone.anatomy.ffn_modules(layer):
            delta = as_matrix(parts, deltas).to(module.weight.device)
            # GPT-2's Conv1D stores its weight as (in, out).
            base = module.weight.detach().float()
            weight = (base + (delta.T if isinstance(module, Conv1D) else delta)).to(kind)
            merged[f"{names[module]}.weight"] = weight
            change = weight.float() - base
            change = change.T if isinstance(module, Conv1D) else change
            pieces = change.chunk(len(parts))
            kept[-1] |= {part: piece[None] for part, piece in zip(parts, pieces, strict=True)}
    state = _converted(model.state_dict(), kind)
    unknown_names = merged.keys() - state.keys()
    if unknown_names:
        raise FastMemError(f"this model does not store {', '.join(sorted(unknown_names))} as plain weights")
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
    with new_folder(out, sum(stored.values())) as folder:
        model.save_pretrained(folder, state_dict={**state, **merged})
        backbone.tokenizer.save_pretrained(folder)
        # save_pretrained states the type of the model in memory.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        report = ExportReport(
            "checkpoint",
            out,
            dtype,
            size_of(folder),
            loss.relative_error(kept),
            loss.kl(kept),
            loss.kl_base,
            replace(memory, deltas=kept),
        )
        report.write(folder)
    return report


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in another type; those that share memory go on sharing it."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        made.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
    return {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}
