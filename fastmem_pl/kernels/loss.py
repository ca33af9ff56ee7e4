"""The memorization loss of a chunk of tokens and its gradient in the logits, one program a token.

Logits are the reference's ``raw (n, V)`` plus ``change (n, V)``; the gradient overwrites ``change``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


def reference_normalizers(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of ``raw`` ``(n, V)``, and what is left of it after subtracting it once.

    The second is zero but for rounding. Both are ``(n,)`` float32.
    """
    tokens, vocabulary = raw.shape
    normalizer = torch.empty(tokens, dtype=torch.float32, device=raw.device)
    rest = torch.empty_like(normalizer)
    _reference[(tokens,)](raw, normalizer, rest, vocabulary, BLOCK=_BLOCK, num_warps=_WARPS)
    return normalizer, rest


def soft_target_loss_(
    change: Tensor,
    raw: Tensor,
    normalizer: Tensor,
    rest: Tensor,
    labels: Tensor,
    kl_coeff: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL of ``n`` tokens, ``(n,)`` each; ``change`` becomes the weighted gradient.

    ``raw`` are the logits at step 0, ``(n, V)`` as ``change`` since then; ``normalizer`` and ``rest`` come
    from :func:`reference_normalizers`. The others are ``(n,)``, but for ``labels`` in float32.
    """
    tokens, vocabulary = raw.shape
    cross_entropy = torch.empty(tokens, dtype=torch.float32, device=raw.device)
    kl = torch.empty_like(cross_entropy)
    _soft_target[(tokens,)](
        change,
        raw,
        normalizer,
        rest,
        labels,
        kl_coeff,
        weights,
        cross_entropy,
        kl,
        vocabulary,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return cross_entropy, kl


@triton.jit
def _add_block(largest, total, logits):
    """Log-sum-exp over blocks: running maximum, and sum of exponentials relative to it."""
    new = tl.maximum(largest, tl.max(logits, 0))
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(logits - new), 0)


@triton.jit
def _reference(raw_ptr, normalizer_ptr, rest_ptr, vocabulary, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    raw_ptr += token * vocabulary
    v = tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(raw_ptr + start + v, start + v < vocabulary, other=-float("inf")).to(tl.float32)
        largest, total = _add_block(largest, total, logits)
    normalizer = largest + tl.log(total)
    largest, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(raw_ptr + start + v, start + v < vocabulary, other=-float("inf")).to(tl.float32)
        largest, total = _add_block(largest, total, logits - normalizer)
    tl.store(normalizer_ptr + token, normalizer)
    tl.store(rest_ptr + token, largest + tl.log(total))


@triton.jit
def _soft_target(
    change_ptr,
    raw_ptr,
    normalizer_ptr,
    rest_ptr,
    labels_ptr,
    kl_coeff_ptr,
    weights_ptr,
    cross_entropy_ptr,
    kl_ptr,
    vocabulary,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    change_ptr += token * vocabulary
    raw_ptr += token * vocabulary
    reference = tl.load(normalizer_ptr + token)
    label = tl.load(labels_ptr + token)
    kl_coeff = tl.load(kl_coeff_ptr + token)
    weight = tl.load(weights_ptr + token)
    v = tl.arange(0, BLOCK)
    largest, total, expected_change = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        mask = start + v < vocabulary
        log_p0 = tl.load(raw_ptr + start + v, mask, other=-float("inf")).to(tl.float32) - reference
        change = tl.load(change_ptr + start + v, mask, other=0.0).to(tl.float32)
        expected_change += tl.sum(tl.exp(log_p0) * change, 0)
        largest, total = _add_block(largest, total, log_p0 + change)
    normalizer = largest + tl.log(total)
    # The change of the normalizer: 0 where the logits have not changed, and KL with it.
    normalizer_change = normalizer - tl.load(rest_ptr + token)
    label_log_p = (
        tl.load(raw_ptr + label).to(tl.float32) - reference + tl.load(change_ptr + label).to(tl.float32)
    )
    tl.store(cross_entropy_ptr + token, normalizer_change - label_log_p)
    tl.store(kl_ptr + token, normalizer_change - expected_change)
    # All threads must have read the label's change before it is overwritten.
    tl.debug_barrier()
    for start in range(0, vocabulary, BLOCK):
        mask = start + v < vocabulary
        log_p0 = tl.load(raw_ptr + start + v, mask, other=-float("inf")).to(tl.float32) - reference
        change = tl.load(change_ptr + start + v, mask, other=0.0).to(tl.float32)
        grad = (1 + kl_coeff) * tl.exp(log_p0 + change - normalizer) - kl_coeff * tl.exp(log_p0)
        grad = weight * (grad - tl.where(start + v == label, 1.0, 0.0))
        tl.store(change_ptr + start + v, grad.to(change_ptr.dtype.element_ty), mask)
