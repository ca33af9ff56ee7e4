"""Where results are made: versions of packages, and the device."""

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("fastmem-pl", "torch", "lightning", "transformers", "torchmetrics", "tokenizers", "safetensors")


def environment(device: "torch.device") -> dict[str, Any]:
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
