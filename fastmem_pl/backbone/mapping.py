"""Devices of a model's parts as a user's mapping gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmem_pl.base.errors import FastMemError, nearest

if TYPE_CHECKING:
    from fastmem_pl.backbone.placement import Part


def given_devices(
    device_map: Mapping[str, Any], parts: Sequence[Part], embedding: nn.Module
) -> dict[str, torch.device]:
    """The devices that a mapping names; the longest name that a part begins with counts.

    Args:
        device_map: devices by names of modules, ``""`` for all.
        parts: of the model.
        embedding: its module.

    Raises:
        FastMemError: for names and devices that are not there, parts without one, and a tail on several.
    """
    wanted = {str(name): _device(name, value) for name, value in device_map.items()}
    known = {prefix for part in parts for prefix in _prefixes(part.name)}
    for name in wanted:
        if name not in known:
            some = ", ".join(part.name for part in parts if part.block in (None, 0))
            raise FastMemError(
                f"model.device_map: {name!r} is no module of the model, or a part of a block; allowed: whole "
                f"modules, such as {some}{nearest(name, known)}"
            )
    found = {}
    for part in parts:
        name = next((prefix for prefix in _prefixes(part.name) if prefix in wanted), None)
        if name is None:
            raise FastMemError(
                f"model.device_map: {part.name!r} has no device; allowed: every module has one, and '' gives "
                "one to all that are not named"
            )
        found[part.name] = wanted[name]
    tail = [part.name for part in parts if part.tail and not part.entry]
    if len({found[name] for name in tail}) > 1:
        raise FastMemError(
            "model.device_map: trained blocks, final norm and LM head are on "
            f"{', '.join(f'{found[name]} ({name})' for name in tail)}; allowed: one device for all of them"
        )
    # Tied embeddings go where the head goes, and what is beside them with them, whatever the mapping says.
    home = next(part for part in parts if part.module and embedding in set(part.module.modules()))
    device = found[tail[0] if home.tail else home.name]
    return found | {part.name: device for part in parts if part.entry}


def _device(name: str, value: Any) -> torch.device:
    """A device of a mapping, if it is there."""
    allowed = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    number = isinstance(value, int) or str(value).isdigit()
    try:
        device = torch.device("cuda", int(value)) if number else torch.device(value)
    except (RuntimeError, TypeError):
        device = None
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    elif device is not None and device.type == "cpu":
        device = torch.device("cpu")
    if device is None or str(device) not in allowed:
        raise FastMemError(
            f"model.device_map: {value} of {name!r} is no device that computes here; allowed: "
            f"{', '.join(allowed)}{nearest(str(value), allowed)}"
        )
    return device


def _prefixes(name: str) -> list[str]:
    """A dotted name and all that it begins with, longest first.

    >>> _prefixes("model.layers.0")
    ['model.layers.0', 'model.layers', 'model', '']
    """
    words = name.split(".")
    return [".".join(words[:count]) for count in range(len(words), -1, -1)]
