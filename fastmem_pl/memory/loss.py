"""The memorization loss, in token chunks, with its gradient written directly.

Per label token, with the model's step-0 prediction ``p_0`` and its current one ``p_n``::

    loss = CE(p_n) + kl_coeff * KL(p_0 || p_n)          gradient in the logits:
    (1 + kl_coeff) * p_n - onehot - kl_coeff * p_0

that is, cross-entropy against the soft target ``onehot + kl_coeff * p_0``. Logits are formed as the
reference's plus the head's product with the *change* of the hidden state: nothing is lost to rounding
where the change is small, and in bfloat16 the curve follows the float32 one. With ``d`` that change,
``p_n = p_0 exp(d) / sum(p_0 exp(d))``, which takes few passes over ``(n, V)`` where ``p_0`` is kept.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem_pl import kernels
from fastmem_pl.backbone import Backbone, BaseActivations, Footprint, Tail, TailInputs
from fastmem_pl.memory.settings import MemorizationSettings

# Bytes of one chunk's (tokens, V) tensor: matrix products want many rows. On a CPU, what follows them goes
# through the chunk in blocks that stay in its cache (both measured in docs/LOG.md).
_CHUNK_BYTES = {"cpu": 96 << 20, "other": 384 << 20}
_BLOCK_BYTES = 4 << 20


class PlainPrediction:
    """The model's own prediction at step 0 for ``n`` label tokens, as probabilities, in plain PyTorch.

    It is made from the head's input at step 0, ``hidden`` ``(n, D)``; keeping it takes ``nbytes``.
    """

    def __init__(self, tail: Tail, hidden: Tensor, labels: Tensor) -> None:
        raw = tail.raw_logits(hidden)
        # Head products before bias and soft-cap, which the soft-cap's slope depends on.
        self._raw = None if tail.softcap is None else raw
        logits = tail.finish_logits(raw)
        self._labels = labels[:, None]
        log_total = logits.logsumexp(-1, keepdim=True)
        # Not the logarithm of the probability, which may be 0 where this is not infinite.
        self._label_log_p = logits.gather(1, self._labels) - log_total
        self._probs = logits.sub_(log_total).exp_() if self._raw is None else logits.softmax(-1)
        # One but for rounding; kept so that nothing has changed where no logit has.
        self._total = self._probs.sum(-1, keepdim=True)
        self.nbytes = self._probs.nbytes * (1 if self._raw is None else 2)

    def loss(
        self, tail: Tail, change: Tensor | None, kl_coeff: Tensor, weights: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and KL of the tokens, ``(n,)`` each, as ``kl_coeff`` and ``weights`` are.

        ``change`` is that of the head's input since step 0, ``(n, D)``, or ``None``; ``out`` receives the
        weighted gradient in the head's product, ``(n, V)`` in the product's type.
        """
        if change is not None:
            tail.head_product(change, out=out)
        tokens, vocabulary = out.shape
        block = max(1, _BLOCK_BYTES // (4 * vocabulary)) if out.device.type == "cpu" else tokens
        blocks = [slice(start, start + block) for start in range(0, tokens, block)]
        losses = [
            self._block_loss(tail, change is not None, kl_coeff[b, None], weights[b, None], b, out[b])
            for b in blocks
        ]
        cross_entropy, kl = (torch.cat(values).squeeze(1) for values in zip(*losses, strict=True))
        return cross_entropy, kl

    def _block_loss(
        self, tail: Tail, moved: bool, kl_coeff: Tensor, weights: Tensor, part: slice, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of some tokens, ``(n, 1)`` each; in ``out``, the head's product becomes the gradient."""
        probs, labels, label_log_p = self._probs[part], self._labels[part], self._label_log_p[part]
        raw = None if self._raw is None else self._raw[part]
        logits = None if raw is None else tail.finish_logits(raw)
        if moved:
            grad = out.float()
            if raw is not None:
                before, logits = logits, tail.finish_logits(raw + grad)
                grad = logits - before
            expected = torch.linalg.vecdot(probs, grad)[:, None]
            label_log_p = label_log_p + grad.gather(1, labels)
            # What float32 holds no probability for gains none, and must not count as the largest change.
            largest = grad.masked_fill_(probs == 0, -torch.inf).amax(-1, keepdim=True)
            grad.sub_(largest).exp_().mul_(probs)
            total = grad.sum(-1, keepdim=True)
            normalizer_change = (total / self._total[part]).log() + largest
            label_log_p -= normalizer_change
            kl = normalizer_change - expected
            grad.mul_((1 + kl_coeff) * weights / total).addcmul_(probs, kl_coeff * weights, value=-1)
        else:
            kl = torch.zeros_like(label_log_p)
            grad = probs * weights
        grad.scatter_add_(1, labels, -weights)
        if logits is not None:
            grad.mul_(1 - (logits / tail.softcap).square())
        if grad is not out:
            out.copy_(grad)
        return -label_log_p, kl


class KernelPrediction:
    """The same, as logits in the head's own type, for :mod:`fastmem_pl.kernels.loss`."""

    def __init__(self, tail: Tail, hidden: Tensor, labels: Tensor) -> None:
        from fastmem_pl.kernels.loss import reference_normalizers

        self._labels = labels
        self._raw = tail.head_product(hidden)
        self._normalizer, self._rest = reference_normalizers(self._raw)
        self.nbytes = self._raw.nbytes

    def loss(
        self, tail: Tail, change: Tensor | None, kl_coeff: Tensor, weights: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`PlainPrediction.loss`."""
        from fastmem_pl.kernels.loss import soft_target_loss_

        if change is None:
            out.zero_()
        else:
            tail.head_product(change, out=out)
        before = self._raw, self._normalizer, self._rest
        return soft_target_loss_(out, *before, self._labels, kl_coeff, weights)


def predict(tail: Tail, hidden: Tensor, labels: Tensor) -> PlainPrediction | KernelPrediction:
    """The prediction from the head's input ``(n, D)``, for the kernel where that can run."""
    return (KernelPrediction if _kernel_fits(tail) else PlainPrediction)(tail, hidden, labels)


def _kernel_fits(tail: Tail) -> bool:
    return tail.plain_head and kernels.usable(tail.head_weight.device, tail.head_weight.dtype)


class MemorizationBatch(SimpleNamespace):
    """All that stays constant while ``B`` contexts are memorized.

    A namespace rather than a dataclass: precision plugins would convert a dataclass's float32 tensors.
    """

    inputs: TailInputs  # of the trunk, (B, T, D)
    base: BaseActivations  # products of the base weights with them
    positions: Tensor  # (N,): of the flattened (B * T) positions, those that predict a label
    labels: Tensor  # (N,): the tokens predicted there
    rows: Tensor  # (N,): their samples
    weights: Tensor  # (N,): 1 / label tokens of that sample
    hidden: Tensor  # (N, D) float32: the head's input at step 0
    # Of step 0, by token chunk; None for those made anew at every step, as they did not fit the budget.
    predictions: list[PlainPrediction | KernelPrediction | None]
    # (n, V): room for the head's products of one chunk, which takes the system time to hand out.
    scratch: Tensor


def prepare(
    tail: Tail, inputs: TailInputs, labels: Tensor, label_mask: Tensor, reference_budget: float = 2 << 30
) -> MemorizationBatch:
    """Compute what stays constant; step-0 predictions are kept up to ``reference_budget`` bytes."""
    base = tail.base(inputs)
    positions = label_mask.flatten().nonzero().squeeze(1)
    rows = positions // labels.shape[1]
    labels = labels.flatten()[positions]
    hidden = tail.hidden(inputs, base).flatten(0, 1)[positions]
    predictions, parts = [], _parts(tail, hidden)
    for part in parts:
        prediction = predict(tail, hidden[part], labels[part]) if reference_budget > 0 else None
        reference_budget -= prediction.nbytes if prediction else 0
        predictions.append(prediction if reference_budget >= 0 else None)
    return MemorizationBatch(
        inputs=inputs,
        base=base,
        positions=positions,
        labels=labels,
        rows=rows,
        weights=(1.0 / label_mask.sum(1).float())[rows],
        hidden=hidden,
        predictions=predictions,
        scratch=tail.head_weight.new_empty(parts[0].stop, tail.head_weight.shape[0]),
    )


def footprint_of(backbone: Backbone, settings: MemorizationSettings) -> Footprint:
    """Memory that memorizing with these settings, and answering, takes beside the weights."""
    tail = backbone.tail(settings.num_layers)
    # Of a label token's reference: logits or probabilities.
    kept = tail.head_weight.element_size() if _kernel_fits(tail) else 4 if tail.softcap is None else 8
    reference = tail.head_weight.shape[0] * kept
    return backbone.footprint(settings.num_layers, reference, settings.optimizer_state == "float32")


class Losses(NamedTuple):
    """Per-sample values ``(B,)``, of which only ``total`` carries a gradient."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


class SoftTargetLoss(torch.autograd.Function):
    """Cross-entropy plus weighted KL of every sample (paper, equations 2 to 4).

    Loss and gradient of the head's input, ``(N, D)``, are made in one pass over token chunks: no ``(N, V)``
    is kept. Deltas that are still zero, not ``moved``, save the head's product.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, tail: Tail, batch: MemorizationBatch, kl_coeff: Tensor, moved: bool):
        """The fields of :class:`Losses`."""
        tokens = hidden.shape[0]
        grad = torch.empty_like(hidden)
        ce_tokens, kl_tokens = hidden.new_empty(tokens), hidden.new_empty(tokens)
        coeffs = kl_coeff[batch.rows]
        for part, kept in zip(_parts(tail, hidden), batch.predictions, strict=True):
            prediction = kept or predict(tail, batch.hidden[part], batch.labels[part])
            change = hidden[part] - batch.hidden[part] if moved else None
            logits_grad = batch.scratch[: len(coeffs[part])]
            ce_tokens[part], kl_tokens[part] = prediction.loss(
                tail, change, coeffs[part], batch.weights[part], logits_grad
            )
            grad[part] = logits_grad @ tail.head_weight
        ctx.save_for_backward(grad, batch.rows)
        zeros = hidden.new_zeros(len(kl_coeff))
        cross_entropy = zeros.index_add(0, batch.rows, ce_tokens * batch.weights)
        kl = zeros.index_add(0, batch.rows, kl_tokens * batch.weights)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + kl_coeff * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_):
        """That of ``hidden``, from the forward pass."""
        grad, rows = ctx.saved_tensors
        return grad * grad_total[rows][:, None], None, None, None, None


def _parts(tail: Tail, hidden: Tensor) -> list[slice]:
    """Slices of the ``N`` tokens whose logits fit the chunk size, about equally long."""
    tokens, vocabulary = hidden.shape[0], tail.head_weight.shape[0]
    budget = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "other"]
    most = max(16, budget // (tail.head_weight.element_size() * vocabulary))
    # Whole tiles of the matrix product.
    tile = 128 if most >= 128 else 16
    chunk = -(-tokens // (-(-tokens // (most // tile * tile)) * tile)) * tile
    return [slice(start, start + chunk) for start in range(0, tokens, chunk)]
