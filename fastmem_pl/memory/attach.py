"""Deltas at work: shared out over sequences, and inside the forward pass of a transformers model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmem_pl.backbone import FFN, Delta
from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.base.errors import FastMemError


def check_shapes(shapes: Sequence[Mapping[str, tuple[int, ...]]], anatomy: Anatomy) -> None:
    """Refuse deltas ``(out, in)``, by layer, that do not fit the model's last FFNs."""
    total = len(anatomy.blocks)
    if not 1 <= len(shapes) <= total:
        raise FastMemError(f"the memory is of {len(shapes)} layers, this model has {total}")
    for layer, found in enumerate(shapes, total - len(shapes)):
        expected = {name: tuple(p.weight.shape) for name, p in anatomy.projections(layer).items()}
        if dict(found) != expected:
            raise FastMemError(
                f"the memory does not fit this model: its deltas are {dict(found)}, the weights of block "
                f"{layer} are {expected}"
            )


def spread(deltas: Delta, count: int) -> dict[str, Tensor]:
    """Deltas of ``B`` rows for ``count`` sequences; each row serves as many, side by side."""
    rows = len(next(iter(deltas.values())))
    if count % rows:
        raise FastMemError(
            f"the memory has {rows} rows for {count} sequences; give one row, or one for each prompt"
        )
    # Views, where there is one row, or one for each sequence.
    return {n: delta[:, None].expand(-1, count // rows, -1, -1).flatten(0, 1) for n, delta in deltas.items()}


@contextmanager
def attached(anatomy: Anatomy, deltas: Sequence[Delta], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let a transformers model use deltas, by layer, lowest first; see :meth:`.Memory.attached`.

    Hooks on the trained FFNs add the memory's change to their output, computed in ``dtype``, by default that
    of the model's head. No weight is written to, and the hooks go when the context ends.
    """
    dtype = dtype or anatomy.head.weight.dtype
    first = len(anatomy.blocks) - len(deltas)
    trained = [block.mlp for block in list(anatomy.blocks)[first:]]
    if any(getattr(hook, "func", None) is _changed for f in trained for hook in f._forward_hooks.values()):
        raise FastMemError("a memory is attached to this model already; stack memories to serve several")
    with ExitStack() as hooks:
        for number, (module, layer) in enumerate(zip(trained, deltas, strict=True), first):
            ffn = FFN(anatomy.projections(number), anatomy.activation(number), dtype)
            device = ffn.base_weights["down"].device
            placed = {name: delta.to(device, dtype) for name, delta in layer.items()}
            hooks.callback(module.register_forward_hook(partial(_changed, ffn, placed)).remove)
        yield


def _changed(ffn: FFN, deltas: Delta, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook: an FFN's output with the memory's change."""
    (ffn_input,) = args
    served = spread(deltas, len(ffn_input))
    with torch.autocast(ffn_input.device.type, enabled=False):
        base = ffn.base(ffn_input)
        change = ffn.memorized(ffn_input, served, base) - base.output
        return (output.float() + change).to(output.dtype)
