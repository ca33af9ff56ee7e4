"""By what model, with what settings, and where results were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmem_pl.base.environment import environment
from fastmem_pl.run.predict import FastMemModule


def describe_run(
    model: FastMemModule,
    identity: Mapping[str, Any],
    peaks: Mapping[str, float] | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What is kept with every result.

    Args:
        model: model that answered.
        identity: settings that the results depend on.
        peaks: peak GiB by phase; by default those of this process.
        processes: how many took part.
    """
    backbone = model.backbone
    return {
        "model": {
            "backbone": backbone.name,
            "class": type(backbone.model).__name__,
            "fingerprint": backbone.fingerprint(),
            "precision": backbone.precision,
        },
        "peak_memory_gib": dict(model.meter.peak_gib() if peaks is None else peaks),
        "environment": {**environment(backbone.device), "processes": processes},
        "settings": identity,
    }
