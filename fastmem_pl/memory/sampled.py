"""The memorization loss from a sample of the vocabulary, for many settings on one context.

On a CPU most of memorizing is the head's product with all ``V`` words. The loss needs of it, for every
token, the log-normalizer ``A(d) = log sum_v exp(logit_v + w_v . d)`` and its gradient, ``d`` being the
change of the head's input. Around an anchor ``d_a``, where ``A``, the probabilities ``p_a`` and the mean
``m_a = sum_v p_a(v) w_v`` are known exactly, and with ``x = d - d_a``::

    A(d) - A(d_a) = log sum_v p_a(v) exp(w_v . x)
                  = log [1 + m_a . x + sum_v p_a(v) (exp(w_v . x) - 1 - w_v . x)]

The last sum is of second order in ``x``. It is estimated from ``K`` words, drawn without replacement with
probabilities ``pi_v`` that grow with ``p(v)`` and are 1 for the likely words and the labels, each weighted by
``1 / pi_v`` (Horvitz and Thompson, 1952). So loss and gradient are exact at the anchor, the estimate errs by
the rare words' share of a second-order term, and a row that has moved too far from its anchor gets a new one
from the whole vocabulary. What the estimate was wrong by shows then, and is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from fastmem_pl.backbone import BaseActivations, Tail, TailInputs
from fastmem_pl.memory.loss import Losses
from fastmem_pl.memory.memorizer import ReadContexts

# Words drawn for contexts of so many tokens or more. Shorter ones average over fewer, and cost less anyway.
SAMPLE_SIZE, _FULL_LENGTH = 4096, 128
# How far a row may move from its anchor: mean KL(p_anchor || p) of its tokens, in nats.
MAX_DRIFT = 0.003
# Bytes of one chunk of (tokens, V) logits.
_CHUNK_BYTES = 96 << 20


@dataclass(frozen=True)
class Anchors:
    """What is known exactly of ``n`` tokens in each of ``R`` rows, at one value of the head's input.

    Attributes:
        change: of the head's input since step 0, ``(R, n, D)``.
        normalizer: log-normalizer, ``(R, n)``.
        mean: of the head's rows under the predicted probabilities, ``(R, n, D)``.
        weights: probability over inclusion probability of the sampled words, ``(R, n, K)``.
        rest: what their sum lacks to 1, ``(R, n)``.
        mean_rest: what their mean lacks to ``mean``, ``(R, n, D)``.
    """

    change: Tensor
    normalizer: Tensor
    mean: Tensor
    weights: Tensor
    rest: Tensor
    mean_rest: Tensor

    def repeat(self, rows: int) -> Anchors:
        """As many copies of a single row."""
        return Anchors(*(tensor.repeat(rows, *[1] * (tensor.dim() - 1)) for tensor in self._tensors()))

    def replace(self, row: int, other: Anchors) -> None:
        """Put the single row of ``other`` in place of one."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            own[row] = new[0]

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class SampledVocabulary:
    """Loss of rows on one context from a sample of the vocabulary.

    Args:
        tail: of the model; without a soft-cap.
        hidden: the head's input at step 0, ``(n, D)`` float32.
        labels: ``(n,)``.
        size: words drawn, ``K``; left out, by the number of tokens.
        max_drift: mean KL of the anchor's prediction to the row's, in nats a token, from which the row gets
            a new anchor.

    Attributes:
        hidden: the head's input at step 0.
        start: the anchor there.
        errors: of the mean log-normalizer, wherever an estimate near the largest drift was checked.
    """

    def __init__(
        self,
        tail: Tail,
        hidden: Tensor,
        labels: Tensor,
        size: int | None = None,
        max_drift: float = MAX_DRIFT,
    ) -> None:
        self.hidden, self._tail, self._max_drift = hidden, tail, max_drift
        self._head = tail.head_weight.float()
        self.errors: list[float] = []
        # Importance of a word: root mean square of its probability over the tokens.
        squares = torch.zeros(self._head.shape[0])
        for _, probs in self._predictions(torch.zeros_like(hidden)):
            squares += probs.square().sum(0)
        squares[labels] = torch.inf
        size = size or int(SAMPLE_SIZE * min(4.0, max(1.0, _FULL_LENGTH / len(labels))))
        self._words, self._inclusion = draw_words(squares.sqrt(), size)
        self._sample = self._head[self._words]
        self._label_head = self._head[labels]
        self._label_logits = self._logits(hidden, labels)
        self.start = self._anchor(torch.zeros_like(hidden))

    def loss(self, anchors: Anchors, change: Tensor, kl_coeff: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy and KL of each row's tokens, ``(R,)``, and the gradient of the sum of losses.

        Args:
            anchors: that estimates start from; rows that have moved too far get new ones.
            change: of the head's input since step 0, ``(R, n, D)``.
            kl_coeff: weight of the KL by row, ``(R,)``.
        """
        moved = change - anchors.change
        estimate = (moved.flatten(0, 1) @ self._sample.t()).exp_().view_as(anchors.weights)
        estimate.mul_(anchors.weights)
        total = estimate.sum(2).add_(anchors.rest).add_(torch.linalg.vecdot(anchors.mean_rest, moved))
        growth = total.log()
        drift = (growth - torch.linalg.vecdot(anchors.mean, moved)).mean(1)
        normalizer = anchors.normalizer + growth
        mean = (estimate.flatten(0, 1) @ self._sample).view_as(change)
        mean.add_(anchors.mean_rest).div_(total[:, :, None])
        # Whatever is not a number has left its anchor, too; so has a KL below 0, which no exact one is.
        near = drift.abs() <= self._max_drift
        for row in (~near).nonzero().flatten().tolist():
            anchors.replace(row, self._anchor(change[row]))
            if drift[row].abs() < 2 * self._max_drift:
                # Of estimates much further off, none is used.
                self.errors.append(float((normalizer[row] - anchors.normalizer[row]).mean()))
            normalizer[row], mean[row] = anchors.normalizer[row], anchors.mean[row]
        self._last = change, normalizer, int(torch.where(near, drift, 0.0).argmax())
        gain = self._label_logits + torch.linalg.vecdot(self._label_head, change)
        kl = normalizer - self.start.normalizer - torch.linalg.vecdot(self.start.mean, change)
        coeff = kl_coeff[:, None, None]
        gradient = mean.mul_(1 + coeff).sub_(self._label_head).sub_(coeff * self.start.mean)
        return (normalizer - gain).mean(1), kl.mean(1), gradient.div_(change.shape[1])

    def check(self) -> None:
        """Compare the last estimate that went furthest from its anchor with the exact value."""
        change, normalizer, row = self._last
        error = float((normalizer[row] - self._anchor(change[row]).normalizer).mean())
        if math.isfinite(error):
            self.errors.append(error)

    def _anchor(self, change: Tensor) -> Anchors:
        """Everything exact at ``change`` ``(n, D)``, from the whole vocabulary; a single row."""
        tokens, width = change.shape
        normalizer, mean = change.new_empty(tokens), change.new_empty(tokens, width)
        weights = change.new_empty(tokens, len(self._words))
        start = 0
        for part, probs in self._predictions(change):
            rows = slice(start, start + len(part))
            normalizer[rows], start = part, start + len(part)
            torch.mm(probs, self._head, out=mean[rows])
            torch.div(probs.index_select(1, self._words), self._inclusion, out=weights[rows])
        mean_rest = torch.addmm(mean, weights, self._sample, alpha=-1)
        row = (change.clone(), normalizer, mean, weights, 1 - weights.sum(1), mean_rest)
        return Anchors(*(tensor[None] for tensor in row))

    def _predictions(self, change: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-normalizers ``(n,)`` and probabilities ``(n, V)`` by chunks of tokens."""
        chunk = max(16, _CHUNK_BYTES // (4 * self._head.shape[0]))
        for hidden in (self.hidden + change).split(chunk):
            logits = self._tail.finish_logits(hidden @ self._head.t())
            normalizer = logits.logsumexp(1)
            yield normalizer, logits.sub_(normalizer[:, None]).exp_()

    def _logits(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Logit of one word at every token."""
        logits = torch.linalg.vecdot(self._head[words], hidden)
        bias = self._tail.head_bias
        return logits if bias is None else logits + bias[words]


def draw_words(importance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw words with probability proportional to their importance, at most 1: systematic sampling.

    Args:
        importance: of every word, ``(V,)``; infinite for those that must be in.
        size: how many are drawn, at least those that must be.

    Returns:
        words ``(K,)`` and the probability that each had, ``(K,)``.

    >>> words, inclusion = draw_words(torch.tensor([torch.inf, 1.0, 1.0, 2.0, 0.0]), 3)
    >>> len(words), inclusion.tolist()[0], set(inclusion.tolist()) <= {0.5, 1.0}
    (3, 1.0, True)
    """
    order = importance.double().sort(descending=True)
    values, places = order.values, order.indices
    certain = int(values.isinf().sum())
    size = min(max(size, certain + 1), len(values))
    # Words whose share of what is left exceeds 1 are certain, which leaves fewer draws for the others.
    tails = values.flip(0).cumsum(0).flip(0)
    while certain < size and values[certain] * (size - certain) >= tails[certain]:
        if values[certain] == 0:
            break
        certain += 1
    left = (values[certain:] / tails[certain] * (size - certain)).clamp(max=1) if certain < size else None
    probabilities = values.new_ones(certain)
    if left is not None and tails[certain] > 0:
        # One number decides all: of points one apart, those that fall into a word's stretch draw it. The
        # same words are drawn every time; any fixed number does.
        ends = left.cumsum(0)
        drawn = (ends + 0.5).floor() > (ends - left + 0.5).floor()
        places = torch.cat([places[:certain], places[certain:][drawn]])
        probabilities = torch.cat([probabilities, left[drawn]])
    else:
        places = places[:certain]
    return places, probabilities.float()


class SampledBatch(SimpleNamespace):
    """All that stays constant while one context is memorized under ``R`` settings at once.

    Stands in for :class:`~fastmem_pl.memory.loss.MemorizationBatch`.

    Attributes:
        inputs: trunk results, ``(R, T, D)``, all rows one tensor.
        base: products of the base weights with them.
        positions: those of the ``T`` that predict a label.
        vocabulary: the loss.
        anchors: of the rows; they change as the rows move.
    """

    inputs: TailInputs
    base: BaseActivations
    positions: Tensor
    vocabulary: SampledVocabulary
    anchors: Anchors

    def loss(self, tail: Tail, hidden: Tensor, kl_coeff: Tensor, moved: bool = True) -> Losses:
        """Loss of every row; arguments as of :func:`~fastmem_pl.memory.loss.memorization_loss`."""
        selected = hidden[:, self.positions]
        return Losses(*_SampledLoss.apply(selected, self.vocabulary, self.anchors, kl_coeff))


class _SampledLoss(torch.autograd.Function):
    """Loss, and the gradient that comes with it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, vocabulary: SampledVocabulary, anchors: Anchors, kl_coeff: Tensor):
        cross_entropy, kl, gradient = vocabulary.loss(anchors, hidden - vocabulary.hidden, kl_coeff)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + kl_coeff * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total[:, None, None], None, None, None


def sampling_fits(tail: Tail) -> bool:
    """Whether the sampled loss serves a model here: on a CPU in float32, without a soft-cap."""
    head = tail.head_weight
    plain = tail.softcap is None and head.dtype is torch.float32
    return plain and head.device.type == "cpu" and head.shape[0] > 2 * SAMPLE_SIZE


class SampledContext:
    """One context, read by the trunk, with the loss from a sample of the vocabulary.

    Args:
        tail: of the model.
        read: what the trunk made of the context.
    """

    def __init__(self, tail: Tail, read: ReadContexts) -> None:
        # Saves a tenth of a step. It rounds away what editing float32 weights would: less than 1% of the
        # loss's fall at the paper's smallest rate (tests/memory/test_sampled.py).
        self._inputs, self._base = read.inputs, replace(tail.base(read.inputs), merged=True)
        self._positions = read.label_mask[0].nonzero().squeeze(1)
        hidden = tail.hidden(self._inputs, self._base)[0, self._positions]
        self.vocabulary = SampledVocabulary(tail, hidden, read.labels[0, self._positions])

    def batch(self, rows: int) -> SampledBatch:
        """What stays constant while ``rows`` settings memorize it."""
        return SampledBatch(
            inputs=self._inputs.expand(rows),
            base=self._base.expand(rows),
            positions=self._positions,
            vocabulary=self.vocabulary,
            anchors=self.vocabulary.start.repeat(rows),
        )
