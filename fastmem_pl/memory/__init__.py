"""Memories: the delta on the last FFN, the objective, fitting and saving."""

from fastmem_pl.backbone import usable_bytes
from fastmem_pl.memory.delta import DeltaAdamW, FFNDelta
from fastmem_pl.memory.document import DocumentFit, encoded_text
from fastmem_pl.memory.files import read_header
from fastmem_pl.memory.header import trained_layers
from fastmem_pl.memory.loss import (
    Losses,
    MemorizationBatch,
    Reference,
    footprint_of,
    memorization_loss,
    prepare,
)
from fastmem_pl.memory.memorizer import Memorizer, context_hash
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.probe import ContextProbe
from fastmem_pl.memory.settings import POLICIES, MemorizationSettings, WindowSettings
from fastmem_pl.memory.snapshots import ContextReader
from fastmem_pl.memory.store import MemoryFolder

__all__ = [
    "POLICIES",
    "ContextProbe",
    "ContextReader",
    "Curve",
    "DeltaAdamW",
    "DocumentFit",
    "FFNDelta",
    "Losses",
    "MemorizationBatch",
    "MemorizationModule",
    "MemorizationSettings",
    "Memorizer",
    "Memory",
    "MemoryFolder",
    "Reference",
    "WindowSettings",
    "context_hash",
    "encoded_text",
    "footprint_of",
    "memorization_loss",
    "prepare",
    "read_header",
    "trained_layers",
    "usable_bytes",
]
