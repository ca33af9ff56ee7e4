"""A model whose blocks lie on several devices of one process: what is moved when a pass crosses over.

Accelerate wraps the ``forward`` of every module for that, which copies of a module would run past, and
which costs time at each of them. Hooks of PyTorch are in dicts that shallow copies share, and blocks are
the only places where a pass can cross: one hook a block does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.base.errors import FastMemError

_INSTALLED = "_fastmem_crossing"


@dataclass(frozen=True)
class Placement:
    """Devices of a loaded model: of the embeddings, of each block, and of the LM head (the tail's), where
    batches and memories are.
    """

    entry: torch.device
    blocks: tuple[torch.device, ...]
    tail: torch.device

    @classmethod
    def of(cls, model: Any, anatomy: Anatomy) -> Placement:
        """Look where parameters are."""
        entry = model.get_input_embeddings().weight.device
        blocks = [_device_of(block, f"block {i}", entry) for i, block in enumerate(anatomy.blocks)]
        tail = _device_of(anatomy.head, "the LM head", entry)
        norm = _device_of(anatomy.final_norm, "the final norm", tail)
        if norm != tail:
            raise FastMemError(
                f"model.backbone.device_map: the final norm is on {norm}, the LM head on {tail}; "
                "allowed: both on one device, with the trained blocks"
            )
        return cls(entry, tuple(blocks), tail)

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

    def carry(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor on a device; nothing is kept."""
        return tensor.to(device)

    def move(self, value: Any, device: torch.device) -> Any:
        """A value with all tensors in it on a device; caches have theirs where their blocks are."""
        return recursively_apply(self._once, value, device)

    def _once(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self._moved:
            # Beside the tensor itself: its id is its own for as long as it lives.
            self._moved[key] = (tensor, self.carry(tensor, device))
        return self._moved[key][1]


class Entrance:
    """A block's hook: moves its arguments to where it is."""

    def __init__(self, device: torch.device, crossing: Crossing) -> None:
        self._device, self._crossing = device, crossing

    def __call__(self, _: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the arguments; hidden states come first."""
        # They change from block to block: kept for later, they would only hold memory.
        hidden = [self._crossing.carry(value, self._device) for value in args[:1]]
        others = self._crossing.move(list(args[1:]), self._device)
        return (*hidden, *others), self._crossing.move(kwargs, self._device)


def let_cross(model: Any, anatomy: Anatomy, placement: Placement) -> None:
    """Make a model that lies on several devices run; no hooks of Accelerate are left on it.

    Masks, positions and position embeddings are made on the device of the embeddings. Logits come back on
    the device of the token ids.
    """
    if hasattr(model, _INSTALLED):
        return
    _remove_hooks_of_accelerate(model)
    crossing = Crossing()
    setattr(model, _INSTALLED, crossing)

    def begin(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        crossing.forget()
        return tuple(crossing.move(list(args), placement.entry)), crossing.move(kwargs, placement.entry)

    anatomy.body.register_forward_pre_hook(begin, with_kwargs=True)
    anatomy.body.register_forward_hook(crossing.forget)
    for block, device in zip(anatomy.blocks, placement.blocks, strict=True):
        block.register_forward_pre_hook(Entrance(device, crossing), with_kwargs=True)
    model.register_forward_hook(_return_logits, with_kwargs=True)


def _remove_hooks_of_accelerate(model: nn.Module) -> None:
    remove_hook_from_submodules(model)
    for module in model.modules():
        # It leaves the class's method on each module, bound to that one: copies would run the original.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def _return_logits(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> Any:
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    logits = getattr(output, "logits", None)
    if given is not None and logits is not None:
        output.logits = logits.to(given.device)
    return output


def _device_of(module: nn.Module, name: str, default: torch.device) -> torch.device:
    devices = list(dict.fromkeys(parameter.device for parameter in module.parameters()))
    if any(device.type == "meta" for device in devices):
        raise FastMemError(
            f"model.backbone.device_map: the weights of {name} are offloaded; allowed: devices that compute, "
            "such as cuda:0 and cpu"
        )
    if len(devices) > 1:
        raise FastMemError(
            f"model.backbone.device_map: {name} is on {' and '.join(map(str, devices))}; allowed: one device"
        )
    return devices[0] if devices else default
