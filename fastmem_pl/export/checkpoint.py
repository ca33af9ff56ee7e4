"""A memory merged into its model, as a folder for plain transformers."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone import Backbone
from fastmem_pl.backbone.experts import RoutedFFN
from fastmem_pl.backbone.quantization import quantized_method
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import check_target, new_folder
from fastmem_pl.export.deviation import Deviation, ExportReport
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
    """
    model = backbone.model
    if method := quantized_method(model.config):
        raise FastMemError(
            f"a checkpoint is written in plain weights, and this model's are quantized ({method}); use --to "
            "lora, or the model without quantization"
        )
    dtype = dtype or str(backbone.anatomy.head.weight.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    out = Path(out)
    check_target(out, force, folder=True)
    deviation = Deviation(memory, backbone, context)
    kind = getattr(torch, dtype)
    names = {module: name for name, module in model.named_modules()}
    merged, kept = dict[str, Tensor](), []
    for layer, deltas in zip(backbone.tail(memory.num_layers).layers, memory.deltas, strict=True):
        kept.append({})
        if backbone.anatomy.routed:
            ffn, module = (
                RoutedFFN(backbone.anatomy.experts(layer), torch.float32),
                backbone.anatomy.experts(layer),
            )
            for name, weight in ffn.merged({part: t[0] for part, t in deltas.items()}, kind).items():
                merged[f"{names[module]}.{name}"] = weight
            kept[-1] = deltas
            continue
        for parts, module in backbone.anatomy.ffn_modules(layer):
            # GPT-2's Conv1D stores its weight as (in, out).
            turned = isinstance(module, Conv1D)
            base = (module.weight.T if turned else module.weight).detach().float()
            delta = torch.cat([deltas[part][0] for part in parts]).to(base.device, torch.float32)
            weight = (base + delta).to(kind)
            merged[f"{names[module]}.weight"] = weight.T.contiguous() if turned else weight
            pieces = (weight.float() - base).chunk(len(parts))
            kept[-1] |= {part: piece[None] for part, piece in zip(parts, pieces, strict=True)}
    made: dict[tuple[int, torch.Size], Tensor] = {}
    plain = model.state_dict()
    for tensor in plain.values():
        made.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(kind))
    # Those that share memory go on sharing it.
    state = {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in plain.items()}
    if unknown_names := merged.keys() - state.keys():
        raise FastMemError(f"this model does not store {', '.join(sorted(unknown_names))} as plain weights")
    state |= merged
    kl = deviation.kl_of_weights(state)
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
    with new_folder(out, sum(stored.values())) as folder:
        model.save_pretrained(folder, state_dict=state)
        backbone.tokenizer.save_pretrained(folder)
        # save_pretrained states the type of the model in memory.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        return deviation.report("checkpoint", out, dtype, kept, folder, kl=kl)
