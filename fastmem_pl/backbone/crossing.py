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
from accelerate.utils import send_to_device
from torch import nn

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


def let_cross(model: Any, anatomy: Anatomy, placement: Placement) -> None:
    """Make a model that lies on several devices run; no hooks of Accelerate are left on it.

    Masks, positions and position embeddings are made where the embeddings are; logits where the LM head is.
    """
    if getattr(model, "_fastmem_crosses", False):
        return
    model._fastmem_crosses = True
    remove_hook_from_submodules(model)
    for module in model.modules():
        # It leaves the class's method on each module, bound to that one: copies would run the original.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    modules = [(anatomy.body, placement.entry), *zip(anatomy.blocks, placement.blocks, strict=True)]
    for module, device in modules:
        module.register_forward_pre_hook(partial(_send, device), with_kwargs=True)


def _send(device: torch.device, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A cache has the tensors of each block where that block is.
    return send_to_device(args, device), send_to_device(kwargs, device, skip_keys="past_key_values")


def _device_of(name: str, modules: Sequence[nn.Module], default: torch.device) -> torch.device:
    devices = list(dict.fromkeys(p.device for module in modules for p in module.parameters()))
    if len(devices) > 1 or torch.device("meta") in devices:
        found = " and ".join("no device (offloaded)" if d.type == "meta" else str(d) for d in devices)
        raise FastMemError(f"model.backbone.device_map: {name} is on {found}; allowed: one that computes")
    return devices[0] if devices else default
