"""By what, with what settings and where results were made."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastmem_pl.run.folder import RunFolder
    from fastmem_pl.run.predict import FastMemModule

PACKAGES = ("fastmem-pl", "torch", "lightning", "transformers", "torchmetrics", "tokenizers", "safetensors")


def describe_run(
    model: FastMemModule, run: RunFolder, peaks: Mapping[str, float] | None = None, processes: int = 1
) -> dict[str, Any]:
    """By what model, with what settings, and where results were made.

    Args:
        model: that answered.
        run: the folder.
        peaks: peak GiB by phase; by default those of this process.
        processes: that took part.
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
        "settings": run.identity,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, as kept with every result."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages, and "not installed" for others; none is imported."""
    found = {}
    for name in packages:
        try:
            # Of a damaged installation, the version may be missing.
            found[name] = importlib.metadata.version(name) or "unknown"
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
