"""Decoders that choose at every step how far to follow the context, from the predictions with and without it.

Under a memory the model with the context is the memorized one; what it is held against stays the base model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding.decoders import (
    DECODERS,
    Decoder,
    StepLogits,
    contrast,
    difference,
    keep_plausible,
)
from fastmem_pl.decoding.settings import DecodingSettings

# CK-PLUG never judges by fewer tokens than these.
_HEAD_TOKENS = 10


class Adaptive(Decoder):
    """Notes what it chose at every step, ``(B,)``; NaN where a step had nothing to choose."""

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
        """One number a token: ``{"strengths": [0.12, 0.3, None, ...]}``."""
        return {"strengths": [None if math.isnan(note) else float(f"{note:.6g}") for note in notes]}


class AdaptiveContextAware(Adaptive):
    """AdaCAD: CAD whose ``alpha`` is the Jensen-Shannon divergence with and without the context, in nats.

    Source: Wang et al., arXiv 2409.07394, and https://github.com/HanNight/AdaCAD, which is followed: natural
    logarithms, so ``alpha`` is at most ln 2; it replaces values below a threshold, 0.3 for summaries
    (``alpha_min``). The factor ``alpha`` of the divergence is this package's; it is 1 there.
    """

    needs_without_context = True
    uses = ("alpha", "alpha_min", "relative_top")
    defaults: Mapping[str, float | None] = {**Decoder.defaults, "alpha": 1.0}

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits; notes the strength."""
        return self._contrasted(logits.model, logits.without_context)

    def _contrasted(self, logits: Tensor, other: Tensor) -> Tensor:
        divergence = jensen_shannon(logits.log_softmax(-1), other.log_softmax(-1))
        self.note = (self.settings.alpha * divergence).clamp(min=self.settings.alpha_min)
        scores = contrast(logits, other, self.note[:, None])
        return keep_plausible(scores, logits, self.settings.relative_top)


class AdaptiveContrastive(AdaptiveContextAware):
    """AdaCD: FastMem+CD whose ``alpha`` is the Jensen-Shannon divergence of memorized and base model.

    Both read the same prompt, so it needs no second one. This package's own.
    """

    needs_without_context = False
    needs_base = True

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits; notes the strength."""
        return self._contrasted(logits.model, logits.base)


class ContextualEntropy(Adaptive):
    """COIECD: contrasts the tokens whose information with the context is out of bounds, and no others.

    With ``p`` and ``q`` the probabilities without and with the context, the score is
    ``log q + alpha * (log q - log p)`` out of bounds and ``log p + alpha * (log q - log p)`` within, which is
    ``log q`` at the paper's ``alpha`` of 1.

    Source: Yuan et al., arXiv 2402.11893, and https://github.com/Stacy027/COIECD, which is followed; see
    :func:`conflicting`. Notes the probability of the tokens that are out of bounds.
    """

    needs_without_context = True
    uses = ("alpha", "entropy_bound", "relative_top")
    defaults: Mapping[str, float | None] = {**Decoder.defaults, "alpha": 1.0}

    def scores(self, logits: StepLogits) -> Tensor:
        """Return log-probabilities, contrasted token by token."""
        shown, hidden = logits.model.log_softmax(-1), logits.without_context.log_softmax(-1)
        outside = conflicting(shown, self.settings.entropy_bound)
        self.note = (shown.exp() * outside).sum(-1)
        # Within bounds, log p + alpha * gap is log q + (alpha - 1) * gap.
        scores = contrast(shown, hidden, self.settings.alpha - 1 + outside.to(shown.dtype))
        return keep_plausible(scores, shown, self.settings.relative_top)


class ConfidenceAware(Adaptive):
    """CoCoA: ``lambda * log q + (1 - lambda) * log p``, with ``lambda`` from how sure the context makes.

    ``p`` and ``q`` are the probabilities without and with the context. For the context count the entropy that
    it takes away, ``H(p) - H(q)``, the Renyi divergence ``D(p || q)``, brought to ``D / (1 + D)``, and the
    lead of the most likely token of ``q`` over the next. ``lambda`` is the logistic function of the first two
    times ``gap_weight`` plus the third times ``peak_weight``, so 1, the model with the context, is the most.

    Source: Khandelwal et al., arXiv 2508.17670: the blend, its three measures and order 0.5. How ``lambda``
    comes from them could not be read there: the first two terms are those of
    https://github.com/infusion-zero-edit/CoCoA (which then overwrites them by 0.5), and the third is added to
    them here. Notes ``lambda``.
    """

    needs_without_context = True
    uses = ("renyi_order", "gap_weight", "peak_weight", "relative_top")

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the blended log-probabilities."""
        settings = self.settings
        shown, hidden = logits.model.log_softmax(-1), logits.without_context.log_softmax(-1)
        # 1 - 1 / (1 + D) has a value where D is infinite, too.
        divergence = 1 - 1 / (1 + renyi_divergence(hidden, shown, settings.renyi_order))
        first, second = shown.topk(2).values.exp().unbind(-1)
        gap = entropy(hidden) - entropy(shown)
        weight = settings.gap_weight * (gap + divergence) + settings.peak_weight * (first - second)
        self.note = weight.sigmoid()
        return keep_plausible(contrast(shown, hidden, self.note[:, None] - 1), shown, settings.relative_top)


class KnowledgeDial(Adaptive):
    """CK-PLUG: one dial between context and own knowledge, for tokens that the context makes less sure.

    With ``p`` and ``q`` the probabilities without and with the context, the score is
    ``alpha * log p + (1 - alpha) * (log q - log p)`` where the confidence gain ``H(p) - H(q)`` is negative,
    and ``log q`` elsewhere. Left open, ``alpha`` is ``H(q) / (H(p) + H(q))``, the paper's adaptive form.

    Source: Bi et al., arXiv 2503.15888; https://github.com/byronBBL/CK-PLUG is followed where tokens compete,
    and by what their entropies are computed: ten at least, or all of ``relative_top`` of the highest
    probability, of either prediction. It is not where it adjusts at ``H(p) < 2 * H(q)``: the text says where
    the gain is negative. Notes ``alpha``; nothing where the gain is not negative.

    Raises:
        FastMemError: when ``alpha`` is above 1.
    """

    needs_without_context = True
    uses = ("alpha", "relative_top")
    defaults: Mapping[str, float | None] = {**Decoder.defaults, "alpha": None, "relative_top": 0.01}

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        if settings.alpha is not None and settings.alpha > 1:
            raise FastMemError(
                f"model.decode.alpha: {settings.alpha!r} is out of range for ck-plug; "
                "allowed: 0 to 1, or null"
            )

    def scores(self, logits: StepLogits) -> Tensor:
        """Return scores, ``-inf`` for tokens that neither prediction finds likely."""
        shown, hidden = logits.model.log_softmax(-1), logits.without_context.log_softmax(-1)
        head = self._likely(shown) | self._likely(hidden)
        sure, doubtful = (
            entropy(part.masked_fill(~head, -torch.inf).log_softmax(-1)) for part in (hidden, shown)
        )
        alpha = self.settings.alpha
        dial = doubtful / (sure + doubtful) if alpha is None else torch.full_like(doubtful, alpha)
        conflict = sure < doubtful
        self.note = dial.where(conflict, torch.nan)
        # alpha * log p + (1 - alpha) * (log q - log p), without a product of 0 and log p.
        dial = dial[:, None]
        dialed = dial * shown + (1 - 2 * dial) * difference(shown, hidden)
        scores = torch.where(conflict[:, None], dialed, shown)
        return scores.masked_fill(~head | (shown == -torch.inf), -torch.inf)

    def _likely(self, log_p: Tensor) -> Tensor:
        """Which tokens compete, ``(B, V)``: those of a likely prediction, and never fewer than ten."""
        share = self.settings.relative_top
        tenth = log_p.topk(min(_HEAD_TOKENS, log_p.shape[-1])).values[:, -1:]
        least = log_p.amax(-1, keepdim=True) + (math.log(share) if share else -torch.inf)
        return log_p >= torch.minimum(tenth, least)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy ``(B,)`` in nats of log-probabilities ``(B, V)``.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    return torch.special.entr(log_p.exp()).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence ``(B,)`` in nats of log-probabilities ``(B, V)``: 0 to ln 2.

    >>> jensen_shannon(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log())
    tensor([0.6931])
    """
    p, q = log_p.exp(), log_q.exp()
    # Summed token by token, small divergences are no differences of large entropies.
    own = 0.5 * (torch.special.entr(p) + torch.special.entr(q))
    return (torch.special.entr(0.5 * (p + q)) - own).sum(-1).clamp(min=0)


def renyi_divergence(log_p: Tensor, log_q: Tensor, order: float) -> Tensor:
    """Renyi divergence ``(B,)`` in nats of ``p`` from ``q``, log-probabilities ``(B, V)``; order below 1.

    >>> renyi_divergence(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.25, 0.75]]).log(), 0.5)
    tensor([1.3863])
    """
    return ((order * log_p + (1 - order) * log_q).logsumexp(-1) / (order - 1)).clamp(min=0)


def conflicting(log_q: Tensor, bound: float) -> Tensor:
    """Which tokens ``(B, V)`` are out of COIECD's bounds, by their log-probabilities with the context.

    Those above ``bound`` times the highest probability, unless it is a single one, and those below the lowest
    divided by ``bound``. The entropy of the prediction without the context, by which the paper shifts a
    token's information before it takes the softmax over all, shifts all alike, so it cancels. That a single
    token counts as no conflict is the authors' repository's.

    >>> conflicting(torch.tensor([[0.5, 0.4, 0.08, 0.02]]).log(), 0.25)
    tensor([[ True,  True, False,  True]])
    >>> conflicting(torch.tensor([[0.9, 0.08, 0.015, 0.005]]).log(), 0.25)
    tensor([[False, False,  True,  True]])
    """
    margin = math.log(bound)
    high = log_q > log_q.amax(-1, keepdim=True) + margin
    high = high & (high.sum(-1, keepdim=True) != 1)
    return high | (log_q < log_q.amin(-1, keepdim=True) - margin)


DECODERS.register("adacad", AdaptiveContextAware)
DECODERS.register("adacd", AdaptiveContrastive)
DECODERS.register("coiecd", ContextualEntropy)
DECODERS.register("cocoa", ConfidenceAware)
DECODERS.register("ck-plug", KnowledgeDial)
