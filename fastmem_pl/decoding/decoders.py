"""Decoders: how one step's logits become next-token scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry
from fastmem_pl.decoding.dola import candidate_layers, contrast_layers
from fastmem_pl.decoding.settings import DecodingSettings


@dataclass(frozen=True)
class StepLogits:
    """Logits of the next token, ``(B, V)`` float32; what the decoder did not ask for is ``None``.

    Attributes:
        model: of the model that answers: with its memory if it has one, else the base model.
        base: of the base model on the same prompt.
        without_context: of the base model on the prompt without the context.
        early: ``(L, B, V)`` of the answering model's hidden states in the decoder's ``early_layers``, put
            through the head without the final norm.
    """

    model: Tensor
    base: Tensor | None = None
    without_context: Tensor | None = None
    early: Tensor | None = None


class Decoder:
    """Turns :class:`StepLogits` into scores; the next token has the highest, or is drawn from them.

    Attributes:
        needs_base: whether it looks at the base model beside the memory.
        needs_without_context: whether it looks at the prompt without the context.
        early_layers: numbers of the hidden states that it looks at.
        max_new_tokens: its limit, where it is not that of the settings.
        repetition_penalty: its own, where the settings leave it open.
        note: a number a row to keep beside the token that the last scores lead to, ``(B,)``.
    """

    needs_base: bool = False
    needs_without_context: bool = False
    early_layers: Sequence[int] = ()
    max_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    note: Tensor | None = None

    def scores(self, logits: StepLogits) -> Tensor:
        """Return ``(B, V)`` scores."""
        raise NotImplementedError

    def details(self, notes: Sequence[int]) -> dict[str, Any]:
        """What to keep beside an answer, given its notes, one a token."""
        return {}


class Greedy(Decoder):
    """The model's own logits."""

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the model's logits ``(B, V)``."""
        return logits.model


class Contrastive(Decoder):
    """FastMem+CD: ``(1 + alpha) * logits(memorized) - alpha * logits(base)``, same prompt for both.

    Source: Zhu et al., arXiv 2406.16069, section 3.3.
    """

    needs_base = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits ``(B, V)``."""
        return logits.model + self.alpha * (logits.model - logits.base)


class ContextAware(Decoder):
    """CAD: ``(1 + alpha) * logits(with context) - alpha * logits(without context)``.

    Source: Shi et al., arXiv 2305.14739, equation 3. Under a memory, what is subtracted stays the base
    model: with the memory it would know the context even without reading it.
    """

    needs_without_context = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits ``(B, V)``."""
        return logits.model + self.alpha * (logits.model - logits.without_context)


class DoLa(Decoder):
    """Contrasts the last layer with the premature layer that differs most from it.

    Source: Chuang et al., arXiv 2309.03883, sections 2.2 and 2.3; the divergence as published with
    FastMem, see :func:`contrast_layers`.

    Args:
        early_layers: numbers of the hidden states to choose from.
        relative_top: keep tokens of at least this share of the highest probability.
        unlimited: as published, without token limit and repetition penalty.
    """

    def __init__(self, early_layers: Sequence[int], relative_top: float, unlimited: bool = False) -> None:
        self.early_layers = early_layers
        self.relative_top = relative_top
        self.max_new_tokens = 399 if unlimited else None
        self.repetition_penalty = 1.0 if unlimited else 1.2

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the log-probability differences ``(B, V)``, ``-inf`` where a token is not plausible.

        The note is the chosen layer's place among ``early_layers``.
        """
        scores, self.note = contrast_layers(logits.model, logits.early, self.relative_top)
        return scores

    def details(self, notes: Sequence[int]) -> dict[str, Any]:
        """How often each premature layer was chosen: ``{"dola_layers": {number: count}}``."""
        count = Counter(notes)
        return {"dola_layers": {str(layer): count[place] for place, layer in enumerate(self.early_layers)}}


def _dola(settings: DecodingSettings, backbone: Backbone) -> DoLa:
    if settings.dola_unlimited and settings.repetition_penalty is not None:
        raise FastMemError(
            "model.repetition_penalty: dola as published applies none; leave it out or drop 'dola-unlimited'"
        )
    tied = bool(getattr(backbone.model.config.get_text_config(), "tie_word_embeddings", False))
    layers = candidate_layers(settings.dola_layers, backbone.num_blocks, tied)
    return DoLa(layers, settings.relative_top, settings.dola_unlimited)


DECODERS: Registry[Callable[[DecodingSettings, Backbone], Decoder]] = Registry("decoder")
DECODERS.register("greedy", lambda settings, backbone: Greedy())
DECODERS.register("cd", lambda settings, backbone: Contrastive(settings.alpha))
DECODERS.register("cad", lambda settings, backbone: ContextAware(settings.alpha))
DECODERS.register("dola", _dola)
