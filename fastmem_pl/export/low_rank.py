"""The best low-rank forms of a memory's deltas, and the smallest rank that keeps what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.export.deviation import Deviation, as_matrix
from fastmem_pl.memory import Memory

Factors = tuple[Tensor, Tensor]
"""``outer (out, r)`` and ``inner (r, in)`` of a delta."""


class LowRank:
    """The truncated singular value decompositions of one memory's deltas.

    The delta of a module, ``(out, in)``, is projected on the leading singular vectors of its shorter side,
    found as eigenvectors of its Gram matrix in float64: the best approximation of that rank in Frobenius
    norm (Eckart and Young, 1936).

    Args:
        memory: of one row.
        backbone: its model.
        dtype: type of the factors.

    Attributes:
        max_rank: the highest that every module's delta has.
    """

    def __init__(self, memory: Memory, backbone: Backbone, dtype: torch.dtype = torch.float32) -> None:
        self._memory, self._dtype = memory, dtype
        anatomy, self._layers = backbone.anatomy, backbone.tail(memory.num_layers).layers
        self._modules = [[parts for parts, _ in anatomy.ffn_modules(layer)] for layer in self._layers]
        self._whole = [
            [_decomposed(as_matrix(parts, deltas)) for parts in modules]
            for modules, deltas in zip(self._modules, memory.deltas, strict=True)
        ]
        self.max_rank = min(min(inner.shape) for layer in self._whole for _, inner in layer)

    def modules(self, rank: int) -> list[list[Factors]]:
        """Factors by layer and module; a FastMemError when the rank is out of range."""
        if not 1 <= rank <= self.max_rank:
            raise self._out_of_range(rank)
        return [
            [
                (outer[:, :rank].to(self._dtype).contiguous(), inner[:rank].to(self._dtype).contiguous())
                for outer, inner in layer
            ]
            for layer in self._whole
        ]

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

        Returns:
            the rank, and the ranks that were looked at with their KL, nats a token.

        Raises:
            FastMemError: when the rank is out of range, the text is not known, or no rank is that close.
        """
        if rank != "auto":
            if not isinstance(rank, int):
                raise self._out_of_range(rank)
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

        # Small ranks first: doubling until one fits, then halving the gap.
        low, high = 0, 1
        while not fits(high):
            if high == self.max_rank:
                raise FastMemError(
                    f"max_kl: no rank comes within {max_kl}: the highest, {high}, has a KL of "
                    f"{tried[high]:.2e}; raise it, or give --dtype float32"
                )
            low, high = high, min(2 * high, self.max_rank)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high, [{"rank": rank, "kl": tried[rank]} for rank in sorted(tried)]

    def _out_of_range(self, rank: object) -> FastMemError:
        return FastMemError(f"rank: {rank!r} is out of range; allowed: 1 to {self.max_rank}, or auto")


def _decomposed(delta: Tensor) -> Factors:
    """Outer ``(out, n)`` and inner ``(n, in)`` factors, strongest first; ``n`` is the shorter side."""
    wide = delta.shape[1] > delta.shape[0]
    exact = delta.double()
    gram = exact @ exact.T if wide else exact.T @ exact
    squares, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)
    # The scale is shared, so that both factors are of numbers of one size.
    scale = squares.flip(0).clamp(min=0).pow(0.25)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    if wide:
        return (vectors * scale).float(), ((vectors.T @ exact) * inverse[:, None]).float()
    return ((exact @ vectors) * inverse).float(), (vectors * scale).T.float()
