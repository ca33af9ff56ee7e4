"""Copies of a model's modules that leave the model as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn


def shallow_copy(module: nn.Module, **replaced: nn.Module) -> nn.Module:
    """Copy a module but not its parameters and submodules; put ``replaced`` submodules in the copy."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


def float_copy(norm: nn.Module, device: torch.device) -> nn.Module:
    """Return a frozen float32 copy of a norm (a few KB), so that it takes float32 activations."""
    return copy.deepcopy(norm).to(device=device, dtype=torch.float32).requires_grad_(False)
