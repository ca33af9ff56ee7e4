"""What a Lightning Fabric of the user's own says of device and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastmem_pl.errors import FastMemError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fastmem_pl.backbone.backbone import Backbone


def fabric_settings(fabric: Fabric) -> tuple[str, torch.device]:
    """Precision and device of a Fabric."""
    plugin: Any = fabric.strategy.precision
    return str(plugin.precision), fabric.device


def check_fabric(fabric: Fabric, backbone: Backbone) -> None:
    """Refuse a Fabric that would change what memorizing computes.

    Raises:
        FastMemError: naming the device, the precision or the number of processes that does not fit.
    """
    from fastmem_pl.backbone.backbone import normalize_precision

    precision, device = fabric_settings(fabric)
    if fabric.world_size > 1:
        raise FastMemError(
            f"fabric: {fabric.world_size} processes would average the gradients of different samples; "
            "allowed: one, so give each process a Fabric of its own"
        )
    if normalize_precision(precision) != backbone.precision:
        raise FastMemError(
            f"fabric: its precision is {precision}, the backbone's {backbone.precision}; load it with "
            "Backbone.load(..., fabric=fabric)"
        )
    if device.type != backbone.device.type or (device.index or 0) != (backbone.device.index or 0):
        raise FastMemError(
            f"fabric: its device is {device}, the backbone is on {backbone.device}; load it with "
            "Backbone.load(..., fabric=fabric)"
        )
