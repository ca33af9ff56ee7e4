"""Copies of modules that share parameters and run other code in places."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import nn


def shallow_copy(module: nn.Module, **children: nn.Module) -> nn.Module:
    """Copy a module but not its parameters and submodules; put ``children`` in the copy."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def replaced(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy with other modules at these paths; it shares all else, and the module stays as it is."""
    if "" in parts:
        return parts[""]
    inner: dict[str, dict[str, nn.Module]] = {}
    for path, part in parts.items():
        child, _, rest = path.partition(".")
        inner.setdefault(child, {})[rest] = part
    children = {name: replaced(module._modules[name], rest) for name, rest in inner.items()}
    return shallow_copy(module, **children) if children else module


def with_forward(module: nn.Module, forward: Callable) -> nn.Module:
    """A copy that runs other code; a model still finds attributes and hooks on it."""
    twin = shallow_copy(module)
    twin.forward = forward
    return twin


def stand_in(module: nn.Module, forward: Callable) -> nn.Module:
    """The same without the module's hooks, such as those of a memory that is attached to its model."""
    twin = with_forward(module, forward)
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def float_copy(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A frozen copy with float32 parameters of its own."""
    return copy.deepcopy(module).to(device=device, dtype=torch.float32).requires_grad_(False)
