"""Triton kernels for what memorizing spends its time on; every one has a plain PyTorch twin.

They are used where they can run: on a CUDA device that multiplies bfloat16, with Triton installed (the
CUDA builds of PyTorch bring it), in bfloat16. Everywhere else, and inside :func:`disabled`, the plain
path computes the same. The tests compare the two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_enabled = True


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run for products of this type on this device."""
    return _enabled and dtype is torch.bfloat16 and device.type == "cuda" and _capable(device.index or 0)


@contextmanager
def disabled() -> Iterator[None]:
    """Take the plain path, to compare with it."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@cache
def _capable(index: int) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= (
        8,
        0,
    )
