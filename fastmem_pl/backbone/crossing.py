"""A model whose blocks lie on several devices of one process: what is moved when a pass crosses over.

Accelerate wraps the ``forward`` of every module for that, which copies of a module would run past, and
which costs time at each of them. Hooks of PyTorch are in dicts that shallow copies share, and blocks are
the only places where a pass can cross: one hook a block does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.base.errors import FastMemError


@dataclass(frozen=True)
class Placement:
    """Devices of the embeddings, of each block, and of the LM head (the tail's, where memories are)."""

    entry: torch.device
    blocks: tuple[torch.device, ...]
    tail: torch.device

    @classmethod
    def of(cls, model: Any, anatomy: Anatomy) -> Placement:
        """Look where parameters are."""
        entry = model.get_input_embeddings().weight.device
        blocks = [_device_of(f"block {i}", [block], entry) for i, block in enumerate(anatomy.blocks)]
        ends = [anatomy.final_norm, anatomy.head]
        return cls(entry, tuple(blocks), _device_of("the final norm with the LM head", ends, entry))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, each once, in the order of a pass."""
        return tuple(dict.fromkeys((self.entry, *self.blocks, self.tail)))

    @property
    def spread(self) -> bool:
        """Whether there are several."""
        return len(self.devices) > 1


class Crossing:
    """Moves what a block needs to where the block is; per pass and device, every tensor once."""

    def __init__(self) -> None:
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forget(self, *_: Any) -> None:
        """Let go of the tensors of a pass."""
        self._moved.clear()

    def begin(self, device: torch.device, _: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Hook of the body: its arguments, on the device of the embeddings."""
        self.forget()
        return tuple(self._move(list(args), device)), self._move(kwargs, device)

    def enter(self, device: torch.device, _: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Hook of a block: its arguments, hidden states first, on its device."""
        # These change from block to block: kept for later, they would only hold memory.
        hidden = [_carry(value, device) for value in args[:1]]
        return (*hidden, *self._move(list(args[1:]), device)), self._move(kwargs, device)

    def _move(self, value: Any, device: torch.device) -> Any:
        # Tensors inside as well, but for those of caches, which are where their blocks are.
        return recursively_apply(self._once, value, device)

    def _once(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self._moved:
            # Beside the tensor itself: its id is its own for as long as it lives.
            self._moved[key] = (tensor, _carry(tensor, device))
        return self._moved[key][1]


def let_cross(model: Any, anatomy: Anatomy, placement: Placement) -> None:
    """Make a model that lies on several devices run; no hooks of Accelerate are left on it.

    Masks, positions and position embeddings are made where the embeddings are; logits where the LM head is.
    """
    if hasattr(model, "_fastmem_crossing"):
        return
    remove_hook_from_submodules(model)
    for module in model.modules():
        # It leaves the class's method on each module, bound to that one: copies would run the original.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    model._fastmem_crossing = crossing = Crossing()
    anatomy.body.register_forward_pre_hook(partial(crossing.begin, placement.entry), with_kwargs=True)
    anatomy.body.register_forward_hook(crossing.forget)
    for block, device in zip(anatomy.blocks, placement.blocks, strict=True):
        block.register_forward_pre_hook(partial(crossing.enter, device), with_kwargs=True)


def _carry(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def _device_of(name: str, modules: Sequence[nn.Module], default: torch.device) -> torch.device:
    devices = list(dict.fromkeys(p.device for module in modules for p in module.parameters()))
    if len(devices) > 1 or torch.device("meta") in devices:
        found = " and ".join("no device (offloaded)" if d.type == "meta" else str(d) for d in devices)
        raise FastMemError(f"model.backbone.device_map: {name} is on {found}; allowed: one that computes")
    return devices[0] if devices else default
