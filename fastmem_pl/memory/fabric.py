"""Whether a user's own Lightning Fabric fits the backbone that it shall memorize with."""

from __future__ import annotations

from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy

from fastmem_pl.backbone import Backbone
from fastmem_pl.backbone.settings import fabric_settings, normalize_precision
from fastmem_pl.base.errors import FastMemError


def check_fabric(fabric: Fabric, backbone: Backbone) -> None:
    """Refuse a Fabric that would change what memorizing computes.

    Raises:
        FastMemError: naming the device, the precision or the number of processes that does not fit.
    """
    precision, device = fabric_settings(fabric)
    if not isinstance(fabric.strategy, SingleDeviceStrategy):
        raise FastMemError(
            f"fabric: {type(fabric.strategy).__name__} would average the gradients of different samples; "
            "allowed: one device, so give each process a Fabric of its own (devices=1, no strategy)"
        )
    try:
        same = normalize_precision(precision) == backbone.precision
    except FastMemError as error:
        raise FastMemError(str(error).replace("trainer.precision", "fabric", 1)) from None
    if not same:
        raise FastMemError(
            f"fabric: its precision is {precision}, the backbone's {backbone.precision}; load it with "
            "Backbone.load(..., fabric=fabric)"
        )
    if device.type != backbone.device.type or (device.index or 0) != (backbone.device.index or 0):
        raise FastMemError(
            f"fabric: its device is {device}, the backbone is on {backbone.device}; "
            + (
                f"allowed: Fabric(devices=[{backbone.device.index}]), where its tail is"
                if backbone.placement.spread
                else "load it with Backbone.load(..., fabric=fabric)"
            )
        )
