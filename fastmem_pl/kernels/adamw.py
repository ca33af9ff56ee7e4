"""AdamW on a weight change whose gradient is a product of two thin matrices, never stored itself.

The gradient of one sample's ``(M, N)`` matrix is ``outer^T @ inner`` with ``outer (T, M)`` and
``inner (T, N)``. A program forms one tile of it, clips, and updates that tile's state in registers, so
a step reads and writes the state once and nothing else of its size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile and warps that were fastest on an H200 for Llama-3-8B shapes (docs/LOG.md).
_BLOCK_M, _BLOCK_N, _BLOCK_T, _WARPS, _STAGES = 128, 64, 32, 8, 3


def factored_adamw_(
    delta: Tensor,
    first: Tensor,
    second: Tensor,
    base: Tensor,
    outer: Tensor,
    inner: Tensor,
    scale: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """Take one step in place.

    Args:
        delta: ``(B, M, N)``, of any float type; arithmetic is float32.
        first: first moment, like ``delta``.
        second: second moment, like ``delta``. Neither moment is read at step 1.
        base: weight that ``delta`` belongs to and that decays, ``(M, N)``.
        outer: gradient of the product's output, ``(B, T, M)``.
        inner: the product's input, ``(B, T, N)``.
        scale: factor of each sample's gradient, ``(B,)`` float32.
        step: number of this step, from 1.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        decay: share of ``base + delta`` that the step takes away.
    """
    samples, rows, columns = delta.shape
    grid = (samples, triton.cdiv(rows, _BLOCK_M) * triton.cdiv(columns, _BLOCK_N))
    beta1, beta2 = betas
    _factored_adamw[grid](
        delta,
        first,
        second,
        base,
        outer,
        inner,
        scale,
        outer.shape[1],
        rows,
        columns,
        *base.stride(),
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        beta1,
        beta2,
        eps,
        decay,
        FIRST=step == 1,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_T=_BLOCK_T,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


@triton.jit
def _factored_adamw(
    delta_ptr,
    first_ptr,
    second_ptr,
    base_ptr,
    outer_ptr,
    inner_ptr,
    scale_ptr,
    tokens,
    rows,
    columns,
    base_row,
    base_column,
    step_size,
    second_scale,
    beta1,
    beta2,
    eps,
    decay,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Samples vary fastest: those that share a tile of the base weight run together and find it in cache.
    sample = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(1) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(1) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    in_m, in_n = m < rows, n < columns

    outer_ptr += sample * tokens * rows
    inner_ptr += sample * tokens * columns
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        in_t = (start + t < tokens)[:, None]
        outer = tl.load(outer_ptr + (start + t)[:, None] * rows + m[None, :], in_t & in_m[None, :], other=0.0)
        inner = tl.load(
            inner_ptr + (start + t)[:, None] * columns + n[None, :], in_t & in_n[None, :], other=0.0
        )
        grad = tl.dot(tl.trans(outer), inner, grad)
    grad *= tl.load(scale_ptr + sample)

    mask = in_m[:, None] & in_n[None, :]
    place = sample * rows * columns + m[:, None].to(tl.int64) * columns + n[None, :]
    base = tl.load(base_ptr + m[:, None] * base_row + n[None, :] * base_column, mask).to(tl.float32)
    first = (1 - beta1) * grad
    second = (1 - beta2) * grad * grad
    delta = -decay * base
    if not FIRST:
        first += beta1 * tl.load(first_ptr + place, mask).to(tl.float32)
        second += beta2 * tl.load(second_ptr + place, mask).to(tl.float32)
        delta += (1 - decay) * tl.load(delta_ptr + place, mask).to(tl.float32)
    delta -= step_size * first / (tl.sqrt(second) * second_scale + eps)
    tl.store(first_ptr + place, first.to(first_ptr.dtype.element_ty), mask)
    tl.store(second_ptr + place, second.to(second_ptr.dtype.element_ty), mask)
    tl.store(delta_ptr + place, delta.to(delta_ptr.dtype.element_ty), mask)


def allocate_moments(delta: Tensor, first_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and second moment for ``delta``, not filled: the first step reads neither."""
    return torch.empty_like(delta, dtype=first_dtype), torch.empty_like(delta, dtype=torch.float32)
