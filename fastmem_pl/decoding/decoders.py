"""Decoders: how one step's logits become next-token scores.

To add one, register a subclass of :class:`Decoder` in :data:`DECODERS`; repetition penalty, drawing and
stopping are the loop's. ``scores`` runs inside a CUDA graph where there are any: no branch on a tensor's
value, no ``.item()``.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry
from fastmem_pl.decoding.settings import DecodingSettings


@dataclass(frozen=True)
class StepLogits:
    """Logits of the next token, ``(B, V)`` float32; what the decoder did not ask for is ``None``."""

    model: Tensor  # of the model that answers: with its memory if it has one, else the base model
    base: Tensor | None = None  # of the base model on the same prompt
    without_context: Tensor | None = None  # of the base model on the prompt without the context
    # (L, B, V), of the hidden states in early_layers, through the head without the final norm
    early: Tensor | None = None


class Decoder:
    """Turns :class:`StepLogits` into scores: the model's own logits, if not overridden."""

    needs_base: bool = False  # whether it looks at the base model beside the memory
    needs_without_context: bool = False  # whether it looks at the prompt without the context
    early_layers: Sequence[int] = ()  # numbers of the hidden states that it looks at
    # (B,), whole numbers or floats to keep beside the tokens that the last scores lead to.
    note: Tensor | None = None

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        self.settings = settings
        # A decoder may have its own.
        self.max_new_tokens = settings.max_new_tokens
        self.repetition_penalty = 1.0 if settings.repetition_penalty is None else settings.repetition_penalty

    def forms(self, form: str) -> list[str]:
        """Forms of the prompt that it reads to answer one of them."""
        return [form, "without_context"] if self.needs_without_context else [form]

    def scores(self, logits: StepLogits) -> Tensor:
        """Return ``(B, V)`` scores."""
        return logits.model

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
        """What to keep beside an answer, given its notes, one a token."""
        return {}


class Contrastive(Decoder):
    """FastMem+CD: ``(1 + alpha) * logits(memorized) - alpha * logits(base)``, same prompt for both.

    Source: Zhu et al., arXiv 2406.16069, section 3.3.
    """

    needs_base = True

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits."""
        return logits.model + self.settings.alpha * (logits.model - logits.base)


class ContextAware(Decoder):
    """CAD: ``(1 + alpha) * logits(with context) - alpha * logits(without context)``.

    Source: Shi et al., arXiv 2305.14739, equation 3. Under a memory, what is subtracted stays the base
    model: with the memory it would know the context even without reading it.
    """

    needs_without_context = True

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits."""
        return logits.model + self.settings.alpha * (logits.model - logits.without_context)


class DoLa(Decoder):
    """Contrasts the last layer with the premature layer that differs most from it.

    Source: Chuang et al., arXiv 2309.03883, sections 2.2 and 2.3; the divergence as published with FastMem,
    see :func:`contrast_layers`. The repetition penalty is 1.2, as the paper advises, where it is left open.
    """

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        if settings.repetition_penalty is None:
            self.repetition_penalty = 1.2
        tied = bool(getattr(backbone.model.config.get_text_config(), "tie_word_embeddings", False))
        self.early_layers = candidate_layers(settings.dola_layers, backbone.num_blocks, tied)

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the log-probability differences; notes the chosen layer's place in ``early_layers``."""
        scores, self.note = contrast_layers(logits.model, logits.early, self.settings.relative_top)
        return scores

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
        """How often each premature layer was chosen: ``{"dola_layers": {number: count}}``."""
        count = Counter(notes)
        return {"dola_layers": {str(layer): count[place] for place, layer in enumerate(self.early_layers)}}


def candidate_layers(wanted: str | Sequence[float], num_blocks: int, tied: bool) -> tuple[int, ...]:
    """Numbers of the hidden states that DoLa chooses from; number ``l`` is the input of block ``l``.

    Number 0 predicts the token that was read where head and embedding are ``tied``: "low" starts at 2 then.

    >>> candidate_layers("high", 32, False)
    (16, 18, 20, 22, 24, 26, 28, 30)
    >>> candidate_layers([0.5, 31], 32, False)
    (16, 31)
    """
    middle = num_blocks // 2 // 2 * 2
    if isinstance(wanted, str):
        first = {"low": 2 if tied and middle > 2 else 0, "high": middle, "auto": max(middle, num_blocks - 20)}
        return tuple(range(first[wanted], max(middle, 1) if wanted == "low" else num_blocks, 2))
    numbers = []
    for value in wanted:
        number = min(round(value * num_blocks), num_blocks - 1) if 0 < value < 1 else value
        if not 0 <= number < num_blocks or number != int(number):
            raise FastMemError(
                f"model.decode.dola_layers: {value:g} is no layer; allowed: 0 to {num_blocks - 1}, "
                "fractions of the depth below 1, or auto, low, high"
            )
        numbers.append(int(number))
    if not numbers:
        raise FastMemError("model.decode.dola_layers: empty; allowed: numbers of layers, or auto, low, high")
    return tuple(sorted(set(numbers)))


def contrast_layers(mature: Tensor, early: Tensor, relative_top: float) -> tuple[Tensor, Tensor]:
    """Score tokens by how much the last layer raises them over the most different premature layer.

    The divergence is the one published with FastMem: both Kullback-Leibler terms run from the mixture, and
    it is the mean over the vocabulary. Takes logits ``(B, V)`` and ``(L, B, V)``; returns scores ``(B, V)``,
    ``-inf`` below ``relative_top`` of the highest probability, and the places of the chosen layers, ``(B,)``.
    """
    log_mature, log_early = mature.log_softmax(-1), early.log_softmax(-1)
    mixture = 0.5 * (log_mature.exp() + log_early.exp())
    # The mean of mixture * (log mixture - (log mature + log early) / 2) is half the sum of both terms.
    divergence = torch.xlogy(mixture, mixture) - mixture * (0.5 * (log_mature + log_early))
    chosen = divergence.mean(-1).argmax(0)
    premature = log_early[chosen, torch.arange(len(mature), device=mature.device)]
    implausible = log_mature < log_mature.amax(-1, keepdim=True) + math.log(relative_top)
    return (log_mature - premature).masked_fill(implausible, -torch.inf), chosen


DecoderFactory = Callable[[DecodingSettings, Backbone], Decoder]

DECODERS: Registry[DecoderFactory] = Registry("decoder")
DECODERS.register("greedy", Decoder)
DECODERS.register("cd", Contrastive)
DECODERS.register("cad", ContextAware)
DECODERS.register("dola", DoLa)


def make_decoder(decoder: str | DecoderFactory, settings: DecodingSettings, backbone: Backbone) -> Decoder:
    """A decoder by its name in :data:`DECODERS`, or by what makes it."""
    return (DECODERS[decoder] if isinstance(decoder, str) else decoder)(settings, backbone)
