"""Decoders: how one step's logits become next-token scores.

To add one, register a subclass of :class:`Decoder` in :data:`DECODERS`; repetition penalty, drawing and
stopping are the loop's. ``scores`` runs inside a CUDA graph where there are any: no branch on a tensor's
value, no ``.item()``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    uses: Sequence[str] = ()  # settings that its scores depend on, beside those of every decoder
    # Its values of the settings that are left open.
    defaults: Mapping[str, float | None] = {"alpha": 0.5, "relative_top": 0.0, "repetition_penalty": 1.0}
    # (B,), whole numbers or floats to keep beside the tokens that the last scores lead to.
    note: Tensor | None = None

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        left_open = {name for name in self.defaults if getattr(settings, name) is None}
        self.settings = replace(settings, **{name: self.defaults[name] for name in left_open})
        # A decoder may have its own.
        self.max_new_tokens = settings.max_new_tokens
        self.repetition_penalty = self.settings.repetition_penalty

    def forms(self, form: str) -> list[str]:
        """Forms of the prompt that it reads to answer one of them."""
        return [form, "without_context"] if self.needs_without_context else [form]

    def scores(self, logits: StepLogits) -> Tensor:
        """Return ``(B, V)`` scores."""
        return logits.model

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
        """What to keep beside an answer, given its notes, one a token."""
        return {}


def difference(logits: Tensor, other: Tensor) -> Tensor:
    """``logits - other``, ``(B, V)``; 0 where either is infinite, as of tokens that must not be chosen."""
    return (logits - other).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def contrast(logits: Tensor, other: Tensor, strength: float | Tensor) -> Tensor:
    """``logits + strength * (logits - other)``, all ``(B, V)``."""
    return logits + strength * difference(logits, other)


def keep_plausible(scores: Tensor, logits: Tensor, relative_top: float) -> Tensor:
    """``scores``, but ``-inf`` where ``logits`` give less than this share of the highest probability.

    All ``(B, V)``; a share of 0 keeps all. Source: Li et al., arXiv 2210.15097, equation 3.
    """
    if not relative_top:
        return scores
    return scores.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(relative_top), -torch.inf)


class Contrastive(Decoder):
    """FastMem+CD: ``(1 + alpha) * logits(memorized) - alpha * logits(base)``, same prompt for both.

    Source: Zhu et al., arXiv 2406.16069, section 3.3.
    """

    needs_base = True
    uses = ("alpha", "relative_top")

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits."""
        scores = contrast(logits.model, logits.base, self.settings.alpha)
        return keep_plausible(scores, logits.model, self.settings.relative_top)


class ContextAware(Decoder):
    """CAD: ``(1 + alpha) * logits(with context) - alpha * logits(without context)``.

    Source: Shi et al., arXiv 2305.14739, equation 3. Under a memory, what is subtracted stays the base
    model: with the memory it would know the context even without reading it.
    """

    needs_without_context = True
    uses = ("alpha", "relative_top")

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits."""
        scores = contrast(logits.model, logits.without_context, self.settings.alpha)
        return keep_plausible(scores, logits.model, self.settings.relative_top)


class DoLa(Decoder):
    """Contrasts the last layer with the premature layer that differs most from it.

    Source: Chuang et al., arXiv 2309.03883, sections 2.2 and 2.3; the divergence as published with FastMem,
    see :func:`contrast_layers`. The repetition penalty is 1.2, as the paper advises, where it is left open.
    """

    uses = ("dola_layers", "relative_top")
    defaults: Mapping[str, float | None] = {
        **Decoder.defaults,
        "relative_top": 0.1,
        "repetition_penalty": 1.2,
    }

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
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
    those of plausible tokens (:func:`keep_plausible`), and the places of the chosen layers, ``(B,)``.
    """
    log_mature, log_early = mature.log_softmax(-1), early.log_softmax(-1)
    mixture = 0.5 * (log_mature.exp() + log_early.exp())
    # The mean of mixture * (log mixture - (log mature + log early) / 2) is half the sum of both terms.
    divergence = torch.xlogy(mixture, mixture) - mixture * (0.5 * (log_mature + log_early))
    chosen = divergence.mean(-1).argmax(0)
    premature = log_early[chosen, torch.arange(len(mature), device=mature.device)]
    return keep_plausible(log_mature - premature, log_mature, relative_top), chosen


DecoderFactory = Callable[[DecodingSettings, Backbone], Decoder]

DECODERS: Registry[DecoderFactory] = Registry("decoder")
DECODERS.register("greedy", Decoder)
DECODERS.register("cd", Contrastive)
DECODERS.register("cad", ContextAware)
DECODERS.register("dola", DoLa)


def decoders_using(setting: str) -> list[str]:
    """Names of the decoders with this setting among those that they use; none for one that all look at."""
    return [name for name, decoder in DECODERS.items() if setting in getattr(decoder, "uses", ())]


def make_decoder(decoder: str | DecoderFactory, settings: DecodingSettings, backbone: Backbone) -> Decoder:
    """A decoder by its name in :data:`DECODERS`, or by what makes it."""
    return (DECODERS[decoder] if isinstance(decoder, str) else decoder)(settings, backbone)
