"""Deltas at work: shared out over sequences, and inside the forward pass of a transformers model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmem_pl.backbone import FFN, Delta
from fastmem_pl.backbone.anatomy import Anatomy
from fastmem_pl.backbone.experts import RoutedFFN, Routing, cast
from fastmem_pl.base.errors import FastMemError


def check_shapes(shapes: Sequence[Mapping[str, tuple[int, ...]]], anatomy: Anatomy) -> None:
    """Refuse deltas ``(out, in)``, by layer, that do not fit the model's last FFNs."""
    total = len(anatomy.blocks)
    if not 1 <= len(shapes) <= total:
        raise FastMemError(f"the memory is of {len(shapes)} layers, this model has {total}")
    for layer, found in enumerate(shapes, total - len(shapes)):
        if anatomy.routed:
            ffn = RoutedFFN(anatomy.experts(layer), torch.float32, found.get("experts", (1, 1))[0])
            expected = {
                **{name: tuple(shape) for name, shape in ffn.shapes.items()},
                "experts": (ffn.count, 1),
            }
        else:
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
    trained = list(anatomy.blocks)[first:]
    if any(
        getattr(hook, "func", None) is _changed for b in trained for m in b.modules() for hook in _hooks(m)
    ):
        raise FastMemError("a memory is attached to this model already; stack memories to serve several")
    site = anatomy.layout.site
    with ExitStack() as hooks:
        for number, (block, layer) in enumerate(zip(trained, deltas, strict=True), first):
            if anatomy.routed:
                ffn = RoutedFFN(anatomy.experts(number), dtype, layer["experts"].shape[1])
            else:
                ffn = FFN(anatomy.projections(number), anatomy.form(number), dtype)
            placed = cast(layer, dtype, next(block.parameters()).device)
            seen: dict[str, Any] = {}
            enter = block.get_submodule(site.whole or (*site.entries, site.exit)[0])
            leave = block.get_submodule(site.whole or site.exit)
            hooks.callback(
                block.register_forward_pre_hook(partial(_note, seen, "block"), with_kwargs=True).remove
            )
            hooks.callback(
                enter.register_forward_pre_hook(partial(_note, seen, "ffn"), with_kwargs=True).remove
            )
            hooks.callback(leave.register_forward_hook(partial(_changed, ffn, placed, seen)).remove)
        yield


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_hooks.values())


def _note(seen: dict[str, Any], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """A hook: the first tensor that a module is given."""
    seen[name] = args[0] if args else next(iter(kwargs.values()))


def _changed(
    ffn: FFN, deltas: Delta, seen: dict[str, Any], module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """A hook: an FFN's output with the memory's change."""
    rows, given = len(seen["block"]), seen["ffn"]
    served = spread(deltas, rows)
    # Some models hand their FFNs positions of all rows in one dimension.
    x = given.reshape(rows, -1, given.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if "experts" in served:
            index, weights = (tensor.reshape(rows, x.shape[1], -1) for tensor in args[1:])
            base = ffn.base(
                x, Routing(index, weights, output.reshape(x.shape), served["experts"].squeeze(-1))
            )
        else:
            base = ffn.base(x)
        change = ffn.memorized(x, served, base) - base.output
        return (output.float() + change.reshape(output.shape)).to(output.dtype)
