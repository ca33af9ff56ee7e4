"""The three precisions, and the types that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from fastmem_pl.base.errors import unknown

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
WEIGHT_DTYPE = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


def compute_dtype(precision: Precision) -> torch.dtype:
    """Type in which the tail's matrix products run."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def normalize_precision(precision: str | int) -> Precision:
    """Map Lightning's spellings, such as 32 or bf16, to one of the three supported precisions."""
    name = _PRECISIONS.get(str(precision), str(precision))
    if name not in WEIGHT_DTYPE:
        raise unknown("trainer.precision", precision, WEIGHT_DTYPE)
    return name


def fabric_settings(fabric: Fabric) -> tuple[str, torch.device]:
    """Precision and device of a Fabric."""
    return str(fabric.strategy.precision.precision), fabric.device
