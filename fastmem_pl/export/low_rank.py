"""The best low-rank forms of a memory's deltas, and the smallest rank that keeps what it says."""

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import check_target
from fastmem_pl.export.deviation import Deviation, ExportReport
from fastmem_pl.memory import Memory
from fastmem_pl.memory.files import FORMS

Factors = tuple[Tensor, Tensor]
"""``outer (out, r)`` and ``inner (r, in)`` of a delta."""


class LowRank:
    """The truncated singular value decompositions of one memory's deltas.

    The delta of a module, ``(out, in)``, is projected on the leading singular vectors of its shorter side,
    found as eigenvectors of its Gram matrix in float64: the best approximation of that rank in Frobenius
    norm (Eckart and Young, 1936). ``max_rank`` is the highest that every module's delta has.
    """

    def __init__(self, memory: Memory, backbone: Backbone, dtype: torch.dtype = torch.float32) -> None:
        self._memory, self._dtype = memory, dtype
        if backbone.anatomy.routed:
            raise FastMemError(
                "export: a memory on routed experts has no low-rank form; allowed: --to checkpoint, or --to "
                "memory with --form bfloat16 or int8"
            )
        layers = backbone.tail(memory.num_layers).layers
        self._modules = [[parts for parts, _ in backbone.anatomy.ffn_modules(layer)] for layer in layers]
        self._whole = [
            [_decomposed(torch.cat([deltas[part][0] for part in parts])) for parts in modules]
            for modules, deltas in zip(self._modules, memory.deltas, strict=True)
        ]
        self.max_rank = min(min(inner.shape) for layer in self._whole for _, inner in layer)

    def modules(self, rank: int) -> list[list[Factors]]:
        """Factors by layer and module."""
        self._check_rank(rank)

        def cut(outer: Tensor, inner: Tensor) -> Factors:
            return outer[:, :rank].to(self._dtype).contiguous(), inner[:rank].to(self._dtype).contiguous()

        return [[cut(*factors) for factors in layer] for layer in self._whole]

    def factors(self, rank: int) -> list[dict[str, Factors]]:
        """Factors by layer and projection; projections of one module share the inner one."""
        return [
            {
                # Tensors of their own, as files refuse those that share memory.
                part: (rows.clone(), inner.clone())
                for parts, (outer, inner) in zip(modules, layer, strict=True)
                for part, rows in zip(parts, outer.chunk(len(parts)), strict=True)
            }
            for modules, layer in zip(self._modules, self.modules(rank), strict=True)
        ]

    def memory(self, rank: int) -> Memory:
        """The memory that factors of this rank stand for."""
        deltas = [
            {part: (outer.float() @ inner.float())[None] for part, (outer, inner) in layer.items()}
            for layer in self.factors(rank)
        ]
        return replace(self._memory, deltas=deltas)

    def choose(
        self, deviation: Deviation, rank: int | Literal["auto"], max_kl: float
    ) -> tuple[int, list[dict[str, float]]]:
        """The rank that was asked for, or the smallest whose KL from the memory is at most ``max_kl``.

        The latter by bisection: KL falls with the rank, but for rounding, as approximations get better.
        Returned with it are the ranks that were looked at and their KL, nats a token.
        """
        if rank != "auto":
            self._check_rank(rank)
            return rank, []
        if not max_kl > 0:
            raise FastMemError(f"max_kl: {max_kl} is out of range; allowed: above 0")
        if not deviation.encoded:
            raise FastMemError(
                "rank: auto measures on the memorized text, which is not known; give it (--context FILE)"
            )
        tried: dict[int, float] = {}

        def fits(rank: int) -> bool:
            tried[rank] = deviation.kl(self.memory(rank).deltas)
            return tried[rank] <= max_kl

        smallest = bisect_left(range(1, self.max_rank + 1), True, key=fits) + 1
        if smallest > self.max_rank:
            raise FastMemError(
                f"max_kl: no rank comes within {max_kl}: the highest, {self.max_rank}, has a KL of "
                f"{tried[self.max_rank]:.2e}; raise it, or give --dtype float32"
            )
        return smallest, [{"rank": rank, "kl": tried[rank]} for rank in sorted(tried)]

    def _check_rank(self, rank: object) -> None:
        if not (isinstance(rank, int) and 1 <= rank <= self.max_rank):
            raise FastMemError(f"rank: {rank!r} is out of range; allowed: 1 to {self.max_rank}, or auto")


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
    """Write the memory as a file of another form: arguments as of :func:`.to_lora` and :meth:`.Memory.save`.

    Factors of the form ``low-rank`` are kept in bfloat16.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    out = Path(out)
    check_target(out, force)
    deviation = Deviation(memory, backbone, context)
    factors, chosen, tried = None, None, []
    if form == "low-rank":
        low_rank = LowRank(memory, backbone, torch.bfloat16)
        chosen, tried = low_rank.choose(deviation, rank, max_kl)
        factors = low_rank.factors(chosen)
    memory.save(out, form=form, text=text, factors=factors)
    kept = Memory.load(out, backbone, backbone.device)
    return deviation.report("memory", out, form, kept.deltas, rank=chosen, tried=tried)


def _decomposed(delta: Tensor) -> Factors:
    """Outer ``(out, n)`` and inner ``(n, in)`` factors, strongest first; ``n`` is the shorter side."""
    if delta.shape[1] > delta.shape[0]:
        outer, inner = _decomposed(delta.T)
        return inner.T, outer.T
    exact = delta.double()
    squares, vectors = torch.linalg.eigh(exact.T @ exact)
    vectors = vectors.flip(1)
    # The scale is shared, so that both factors are of numbers of one size.
    scale = squares.flip(0).clamp(min=0).pow(0.25)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((exact @ vectors) * inverse).float(), (vectors * scale).T.float()
