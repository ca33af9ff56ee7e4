"""Memories for others: LoRA adapters, merged checkpoints, smaller files."""

from fastmem_pl.export.checkpoint import to_checkpoint
from fastmem_pl.export.deviation import ExportReport
from fastmem_pl.export.lora import DTYPES, to_lora
from fastmem_pl.export.low_rank import LowRank, to_memory

__all__ = ["DTYPES", "ExportReport", "LowRank", "to_checkpoint", "to_lora", "to_memory"]
