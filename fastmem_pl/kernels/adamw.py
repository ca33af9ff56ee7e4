"""AdamW on a weight change whose gradient is a product of two thin matrices.

The gradient of one sample's ``(M, N)`` matrix is ``outer^T @ inner`` with ``outer (T, M)`` and
``inner (T, N)``. A program forms one tile of it, clips, and updates that tile's state in registers, so
a step reads and writes the state once and nothing else of its size. With many tokens, forming tiles takes
longer than reading them: then cuBLAS forms the gradients of a few samples at a time, and the same kernel
reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile, warps and order that were fastest on an H200 for Llama-3-8B shapes (docs/LOG.md).
_BLOCK_M, _BLOCK_N, _BLOCK_T, _WARPS, _STAGES, _GROUP = 64, 64, 32, 4, 6, 4
# Tokens from which storing gradients was faster there, and how many samples' at a time.
_STORED_FROM, _STORED_SAMPLES = 160, 4


def factored_adamw_(
    delta: Tensor,
    first: Tensor,
    second: Tensor,
    base: Tensor,
    outer: Tensor,
    inner: Tensor,
    scale: Tensor,
    step: int,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    first_step: bool = False,
    last: bool = False,
) -> None:
    """Take one step in place.

    Args:
        delta: ``(B, M, N)``, of any float type; arithmetic is float32. Both moments are like it.
        base: weight that ``delta`` belongs to and that decays, ``(M, N)`` for all samples or ``(B, M, N)``.
        outer: gradient of the product's output, ``(B, T, M)``.
        inner: the product's input, ``(B, T, N)``.
        scale: factor of each sample's gradient, ``(B,)`` float32.
        step: number of this step, from 1.
        lr: learning rate of each sample, ``(B,)`` float32.
        first_step: delta and moments are zero, and are not read.
        last: no step comes after, so the moments need not be written.
    """
    samples, rows, columns = delta.shape
    base = base.expand_as(delta)
    beta1, beta2 = betas
    stored = outer.shape[1] >= _STORED_FROM
    count = _STORED_SAMPLES if stored else samples
    # A stored gradient is read row by row; tiles that are formed share parts of the thin matrices.
    block_m, block_n = (1, 2048) if stored else (_BLOCK_M, _BLOCK_N)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    for part in (slice(start, start + count) for start in range(0, samples, count)):
        factor = outer[part]
        if stored:
            # In the type of the products, as PyTorch gives it; with a float32 state, in float32.
            wide = {"out_dtype": torch.float32} if delta.dtype is torch.float32 and delta.is_cuda else {}
            factor = torch.bmm(factor.transpose(1, 2), inner[part], **wide)
        _factored_adamw[tiles, len(factor)](
            delta[part],
            first[part],
            second[part],
            base[part],
            factor,
            inner[part],
            scale[part],
            lr[part],
            outer.shape[1],
            rows,
            columns,
            *base.stride(),
            1 / (1 - beta1**step),
            (1 - beta2**step) ** -0.5,
            beta1,
            beta2,
            eps,
            weight_decay,
            STORED=stored,
            FIRST=first_step,
            LAST=last,
            GROUP=_GROUP,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
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
    outer_ptr,  # of the gradient itself where it is stored
    inner_ptr,
    scale_ptr,
    lr_ptr,
    tokens,
    rows,
    columns,
    base_sample,
    base_row,
    base_column,
    first_scale,
    second_scale,
    beta1,
    beta2,
    eps,
    weight_decay,
    STORED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Groups of rows go through all columns together: their part of the thin matrices stays in cache.
    tile, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_group = GROUP * tl.cdiv(columns, BLOCK_N)
    tile_row = tile // in_group * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - tile_row, GROUP)
    tile_row += tile % in_group % height
    m = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % in_group) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    in_m, in_n = m < rows, n < columns
    mask = in_m[:, None] & in_n[None, :]
    place = sample * rows * columns + m[:, None].to(tl.int64) * columns + n[None, :]

    # The state is on its way while the gradient is formed. It passes through the cache once.
    base_ptr += sample * base_sample
    base = tl.load(base_ptr + m[:, None] * base_row + n[None, :] * base_column, mask)
    if not FIRST:
        delta = tl.load(delta_ptr + place, mask, eviction_policy="evict_first")
        second = tl.load(second_ptr + place, mask, eviction_policy="evict_first")
        first = tl.load(first_ptr + place, mask, eviction_policy="evict_first")

    if STORED:
        grad = tl.load(outer_ptr + place, mask, eviction_policy="evict_first").to(tl.float32)
    else:
        outer_ptr += sample * tokens * rows
        inner_ptr += sample * tokens * columns
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            in_t = (start + t < tokens)[:, None]
            rows_at = (start + t)[:, None] * rows + m[None, :]
            columns_at = (start + t)[:, None] * columns + n[None, :]
            outer = tl.load(outer_ptr + rows_at, in_t & in_m[None, :], other=0.0)
            inner = tl.load(inner_ptr + columns_at, in_t & in_n[None, :], other=0.0)
            grad = tl.dot(tl.trans(outer), inner, grad)
    grad *= tl.load(scale_ptr + sample)

    lr = tl.load(lr_ptr + sample)
    decay = lr * weight_decay
    new_first = (1 - beta1) * grad
    new_second = (1 - beta2) * grad * grad
    new_delta = -decay * base.to(tl.float32)
    if not FIRST:
        new_first += beta1 * first.to(tl.float32)
        new_second += beta2 * second.to(tl.float32)
        new_delta += (1 - decay) * delta.to(tl.float32)
    new_delta -= lr * first_scale * new_first / (tl.sqrt(new_second) * second_scale + eps)
    tl.store(delta_ptr + place, new_delta.to(delta_ptr.dtype.element_ty), mask, eviction_policy="evict_first")
    if not LAST:
        new_first = new_first.to(first_ptr.dtype.element_ty)
        tl.store(first_ptr + place, new_first, mask, eviction_policy="evict_first")
        new_second = new_second.to(second_ptr.dtype.element_ty)
        tl.store(second_ptr + place, new_second, mask, eviction_policy="evict_first")
