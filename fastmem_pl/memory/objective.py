"""The memorization loss, in token chunks, with its gradient written directly.

Per label token, with the model's step-0 prediction ``p_0`` and its current one ``p_n``::

    loss = CE(p_n) + kl_coeff * KL(p_0 || p_n)          gradient in the logits:
    (1 + kl_coeff) * p_n - onehot - kl_coeff * p_0

that is, cross-entropy against the soft target ``onehot + kl_coeff * p_0``. Logits are formed as the
reference's plus the head's product with the *change* of the hidden state: nothing is lost to rounding
where the change is small, and in bfloat16 the curve follows the float32 one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from fastmem_pl.backbone import BaseActivations, Tail, TailInputs

# Bytes of one chunk's (tokens, V) float32 tensor. On the CPU it should stay in the last-level cache
# and below the size from which the allocator returns memory to the system (measured in docs/LOG.md).
_CHUNK_BYTES = {"cpu": 12 << 20, "other": 256 << 20}


@dataclass
class Prediction:
    """Step-0 prediction for ``n`` label tokens.

    Attributes:
        log_probs: ``(n, V)`` float32.
        normalizer: log-sum-exp of ``log_probs``, zero but for rounding, ``(n, 1)``.
        raw: head products before bias and soft-cap ``(n, V)``; only kept for models with a soft-cap.
    """

    log_probs: Tensor
    normalizer: Tensor
    raw: Tensor | None

    @classmethod
    def of(cls, tail: Tail, hidden: Tensor) -> Prediction:
        """Predict from the head's input ``(n, D)``."""
        raw = tail.raw_logits(hidden)
        log_probs = torch.log_softmax(tail.finish_logits(raw), dim=-1)
        normalizer, _, _ = _normalize_(log_probs.clone())
        return cls(log_probs, normalizer, None if tail.softcap is None else raw)


@dataclass
class Reference:
    """The model's own prediction at step 0 for ``N`` label tokens.

    Attributes:
        hidden: the head's input, ``(N, D)`` float32.
        chunks: predictions by token chunk, or ``None`` to recompute each when it is needed.
    """

    hidden: Tensor
    chunks: list[Prediction] | None


class MemorizationBatch(SimpleNamespace):
    """All that stays constant while ``B`` contexts are memorized.

    A namespace rather than a dataclass: precision plugins would convert a dataclass's float32 tensors.

    Attributes:
        inputs: trunk results, ``(B, T, D)``.
        base: products of the base weights with them.
        positions: index into the flattened ``(B * T)`` positions of the ``N`` that predict a label.
        labels: the ``N`` tokens predicted there.
        rows: sample of each, ``(N,)``.
        weights: ``1 / label tokens of that sample``, ``(N,)``.
        reference: step-0 predictions.
    """

    inputs: TailInputs
    base: BaseActivations
    positions: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor
    reference: Reference

    @property
    def num_samples(self) -> int:
        """Number of contexts, ``B``."""
        return self.inputs.residual.shape[0]


def prepare(
    tail: Tail,
    inputs: TailInputs,
    labels: Tensor,
    label_mask: Tensor,
    reference_budget: int = 2 << 30,
) -> MemorizationBatch:
    """Compute what stays constant over the steps.

    Args:
        tail: that will be trained.
        inputs: of the trunk, ``(B, T, D)``.
        labels: token that position ``t`` predicts, ``(B, T)``.
        label_mask: true where it counts, ``(B, T)``; at least one a row.
        reference_budget: bytes up to which step-0 predictions are kept rather than recomputed.
    """
    base = tail.base(inputs)
    flat_mask = label_mask.flatten()
    positions = flat_mask.nonzero().squeeze(1)
    counts = label_mask.sum(1)
    rows = positions // labels.shape[1]
    hidden = tail.hidden(inputs, base).flatten(0, 1)[positions]
    tensors = 1 if tail.softcap is None else 2
    keep = tensors * positions.numel() * tail.head_weight.shape[0] * 4 <= reference_budget
    chunks = [Prediction.of(tail, hidden[part]) for part in _parts(tail, hidden)] if keep else None
    return MemorizationBatch(
        inputs=inputs,
        base=base,
        positions=positions,
        labels=labels.flatten()[positions],
        rows=rows,
        weights=(1.0 / counts.float())[rows],
        reference=Reference(hidden, chunks),
    )


@dataclass
class Losses:
    """Per-sample values ``(B,)``: ``total`` carries the gradient, the other two do not."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def memorization_loss(tail: Tail, hidden: Tensor, batch: MemorizationBatch, kl_coeff: Tensor) -> Losses:
    """Cross-entropy plus weighted KL of every sample (paper, equations 2 to 4).

    Args:
        tail: whose head turns hidden states into logits.
        hidden: the head's input with the current deltas, ``(B, T, D)``.
        batch: the constants, reference included.
        kl_coeff: weight of the KL term by sample, ``(B,)``.
    """
    selected = hidden.flatten(0, 1)[batch.positions]
    total, cross_entropy, kl = _SoftTargetLoss.apply(selected, tail, batch, kl_coeff)
    return Losses(total, cross_entropy, kl)


class _SoftTargetLoss(torch.autograd.Function):
    """Loss and gradient of the hidden states in one pass over token chunks: no ``(N, V)`` is kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, tail: Tail, batch: MemorizationBatch, kl_coeff: Tensor):
        tokens = hidden.shape[0]
        grad = torch.empty_like(hidden)
        ce_tokens, kl_tokens = hidden.new_empty(tokens), hidden.new_empty(tokens)
        for index, part in enumerate(_parts(tail, hidden)):
            kept = batch.reference.chunks
            reference = Prediction.of(tail, batch.reference.hidden[part]) if kept is None else kept[index]
            ce_tokens[part], kl_tokens[part], grad[part] = _chunk_loss(
                tail,
                hidden[part] - batch.reference.hidden[part],
                reference,
                batch.labels[part, None],
                kl_coeff[batch.rows[part], None],
                batch.weights[part, None],
            )
        ctx.save_for_backward(grad, batch.rows)
        zeros = hidden.new_zeros(batch.num_samples)
        cross_entropy = zeros.index_add(0, batch.rows, ce_tokens * batch.weights)
        kl = zeros.index_add(0, batch.rows, kl_tokens * batch.weights)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + kl_coeff * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_):
        grad, rows = ctx.saved_tensors
        return grad * grad_total[rows][:, None], None, None, None


def _parts(tail: Tail, hidden: Tensor) -> list[slice]:
    """Slices of the ``N`` tokens whose logits fit the chunk size."""
    budget = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "other"]
    chunk = max(16, budget // (4 * tail.head_weight.shape[0]))
    return [slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk)]


def _normalize_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exp, ``exp(logits - max)`` (in place of ``logits``) and its sum, ``(n, 1)`` each."""
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    return largest + total.log(), exponentials, total


def _chunk_loss(
    tail: Tail,
    hidden_change: Tensor,
    reference: Prediction,
    labels: Tensor,
    kl_coeff: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of ``n`` tokens; ``labels``, ``kl_coeff`` and ``weights`` are ``(n, 1)``.

    Returns:
        cross-entropy ``(n,)``, KL ``(n,)`` and the weighted gradient in the hidden state ``(n, D)``.
    """
    change, slope = tail.raw_logits(hidden_change), None
    if reference.raw is not None:
        logits = tail.finish_logits(reference.raw + change)
        slope = 1 - (logits / tail.softcap).square()
        change = logits - tail.finish_logits(reference.raw)
    p_0 = reference.log_probs.exp()
    expected_change = torch.linalg.vecdot(p_0, change)[:, None]
    log_p = change.add_(reference.log_probs)
    label_log_p = log_p.gather(1, labels)
    normalizer, exponentials, total = _normalize_(log_p)
    # The change of the normalizer: exactly 0 at step 0, where KL must be.
    normalizer_change = normalizer - reference.normalizer
    kl = normalizer_change - expected_change
    cross_entropy = normalizer_change - label_log_p

    grad = exponentials.mul_((1 + kl_coeff) * weights / total)
    grad.addcmul_(p_0, kl_coeff * weights, value=-1)
    grad.scatter_add_(1, labels, -weights)
    if slope is not None:
        grad.mul_(slope)
    hidden_grad = (grad.to(tail.head_weight.dtype) @ tail.head_weight).float()
    return cross_entropy.squeeze(1), kl.squeeze(1), hidden_grad
