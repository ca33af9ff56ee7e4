"""FastMem for PyTorch Lightning: make a language model read its context before it answers.

Zhu et al., *FastMem: Fast Memorization of Prompt Improves Context Awareness of Large Language Models*,
arXiv 2406.16069.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# Where they are installed, transformers imports them, and they warn of kernels for other machines.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_EXPORTS = {
    "Backbone": "fastmem_pl.backbone",
    "BackboneSettings": "fastmem_pl.backbone",
    "ChatSettings": "fastmem_pl.backbone",
    "ContextSample": "fastmem_pl.data",
    "DecodingSettings": "fastmem_pl.decoding",
    "FastMemDataModule": "fastmem_pl.data",
    "FastMemError": "fastmem_pl.base.errors",
    "FastMemModule": "fastmem_pl.run.predict",
    "FastMemTrainer": "fastmem_pl.run.trainer",
    "MemorizationModule": "fastmem_pl.memory",
    "MemorizationSettings": "fastmem_pl.memory",
    "Memorizer": "fastmem_pl.memory",
    "Memory": "fastmem_pl.memory",
    "WindowSettings": "fastmem_pl.memory",
    "answer": "fastmem_pl.decoding.answer",
    "encode_prompt": "fastmem_pl.decoding.answer",
    "generator": "fastmem_pl.decoding.generate",
    "memorize_document": "fastmem_pl.memory",
    "stream_answer": "fastmem_pl.decoding.answer",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `fastmem --help` does not wait for torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastmem_pl' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
