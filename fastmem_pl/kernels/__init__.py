"""Triton kernels for what memorizing spends its time on; every one has a plain PyTorch twin.

They are used where they can run: on a CUDA device that multiplies bfloat16, with Triton installed (the
CUDA builds of PyTorch bring it), in bfloat16. Everywhere else, and inside :func:`disabled`, the plain
path computes the same. The tests compare the two.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_enabled = True
# Of devices that multiply bfloat16.
_CAPABILITY = (8, 0)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run for products of this type on this device."""
    return _enabled and dtype is torch.bfloat16 and device.type == "cuda" and _capable(device.index or 0)


def obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on a device; ``None`` where they can, in bfloat16."""
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    found = torch.cuda.get_device_capability(device.index or 0)
    if found < _CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below {_CAPABILITY[0]}.{_CAPABILITY[1]}"
    return None


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
    return obstacle(torch.device("cuda", index)) is None
