"""Memories: the delta on the last FFN, the objective, fitting and saving."""

from fastmem_pl.memory.delta import DeltaAdamW
from fastmem_pl.memory.document import DocumentFit, encoded_text, memorize_document
from fastmem_pl.memory.files import read_header, trained_part
from fastmem_pl.memory.loss import footprint_of
from fastmem_pl.memory.memorizer import Memorizer, context_hash
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import POLICIES, MemorizationSettings, WindowSettings
from fastmem_pl.memory.store import MemoryFolder

__all__ = [
    "POLICIES",
    "Curve",
    "DeltaAdamW",
    "DocumentFit",
    "MemorizationModule",
    "MemorizationSettings",
    "Memorizer",
    "Memory",
    "MemoryFolder",
    "WindowSettings",
    "context_hash",
    "encoded_text",
    "footprint_of",
    "memorize_document",
    "read_header",
    "trained_part",
]
