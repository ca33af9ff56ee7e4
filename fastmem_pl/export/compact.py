"""A memory as a smaller memory file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import unknown
from fastmem_pl.base.files import check_target
from fastmem_pl.export.deviation import Deviation, ExportReport
from fastmem_pl.export.low_rank import LowRank
from fastmem_pl.memory import Memory
from fastmem_pl.memory.files import FORMS


def to_memory(
    memory: Memory,
    backbone: Backbone,
    out: str | Path,
    form: str = "low-rank",
    rank: int | Literal["auto"] = "auto",
    max_kl: float = 0.01,
    context: str | None = None,
    force: bool = False,
    text: bool = True,
) -> ExportReport:
    """Write the memory in another form.

    Other arguments are those of :func:`.to_lora`; ``out`` is a file.

    Args:
        form: ``float32``, ``bfloat16``, ``int8``, or ``low-rank`` (factors in bfloat16).
        text: keep the memorized text, where it is known, in the file.

    Raises:
        FastMemError: when ``out`` exists or cannot be written, or a value is out of range.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    out = Path(out)
    check_target(out, force, folder=False)
    deviation = Deviation(memory, backbone, context)
    factors, chosen, tried = None, None, []
    if form == "low-rank":
        low_rank = LowRank(memory, backbone, torch.bfloat16)
        chosen, tried = low_rank.choose(deviation, rank, max_kl)
        factors = low_rank.factors(chosen)
    memory.save(out, form=form, text=text, factors=factors)
    kept = Memory.load(out, backbone, backbone.device)
    return deviation.report("memory", out, form, kept.deltas, rank=chosen, tried=tried)
