"""A memory merged into its model, as a folder for plain transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone import Backbone, EncodedContext
from fastmem_pl.backbone.quantization import quantized_method
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import check_target, new_folder
from fastmem_pl.export.deviation import Deviation, ExportReport, as_matrix
from fastmem_pl.export.lora import DTYPES
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

    Arguments are those of :func:`.to_lora`. The ``dtype`` is that of all weights, by default as the model is
    loaded; the report's KL is of a forward pass with the weights as written, so it includes their rounding.

    Raises:
        FastMemError: when ``out`` exists or cannot be written, the memory is of another model, or the model
            is quantized.
    """
    model = backbone.model
    method = quantized_method(model.config)
    if method:
        raise FastMemError(
            f"a checkpoint is written in plain weights, and this model's are quantized ({method}); use --to "
            "lora, or memorize with the model without quantization"
        )
    dtype = dtype or str(backbone.anatomy.head.weight.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    out = Path(out)
    check_target(out, force, folder=True)
    deviation = Deviation(memory, backbone, context)
    kind = getattr(torch, dtype)
    names = {module: name for name, module in model.named_modules()}
    merged: dict[str, Tensor] = {}
    kept = []
    for layer, deltas in zip(backbone.tail(memory.num_layers).layers, memory.deltas, strict=True):
        kept.append({})
        for parts, module in backbone.anatomy.ffn_modules(layer):
            base = module.weight.detach().float()
            delta = as_matrix(parts, deltas).to(base.device)
            # GPT-2's Conv1D stores its weight as (in, out).
            turned = isinstance(module, Conv1D)
            weight = (base + (delta.T if turned else delta)).to(kind)
            merged[f"{names[module]}.weight"] = weight
            change = weight.float() - base
            pieces = (change.T if turned else change).chunk(len(parts))
            kept[-1] |= {part: piece[None] for part, piece in zip(parts, pieces, strict=True)}
    state = _converted(model.state_dict(), kind)
    unknown_names = merged.keys() - state.keys()
    if unknown_names:
        raise FastMemError(f"this model does not store {', '.join(sorted(unknown_names))} as plain weights")
    state |= merged
    kl = _kl_of_weights(memory, backbone, deviation.encoded, state) if deviation.encoded else None
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
    with new_folder(out, sum(stored.values())) as folder:
        model.save_pretrained(folder, state_dict=state)
        backbone.tokenizer.save_pretrained(folder)
        # save_pretrained states the type of the model in memory.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        return deviation.report("checkpoint", out, dtype, kept, folder, kl=kl)


@torch.no_grad()
def _kl_of_weights(
    memory: Memory, backbone: Backbone, encoded: Sequence[EncodedContext], state: dict[str, Tensor]
) -> float:
    """KL from the memory to the model with other weights, on the memorized text, by the model's own code."""

    total, count = 0.0, 0
    # Window by window: the probabilities of a whole vocabulary are large.
    for part in encoded:
        given = {"input_ids": torch.tensor([part.input_ids], device=backbone.device), "use_cache": False}
        with backbone.numerics(), backbone.autocast(), memory.attached(backbone):
            memorized = backbone.model(**given).logits
        with backbone.numerics():
            rewritten = functional_call(backbone.model, state, (), given).logits
        # (N, V) each, at the positions that have a label.
        exact, other = (
            logits[0, part.header_length - 1 : -1].float().log_softmax(-1)
            for logits in (memorized, rewritten)
        )
        total += (exact.exp() * (exact - other)).sum().item()
        count += len(exact)
    return max(total, 0.0) / count


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in another type; those that share memory go on sharing it."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        made.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
    return {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}
