"""Decoders: how one step's logits become next-token scores.

To add one, register a subclass of :class:`Decoder` in :data:`DECODERS`. It declares which logits it looks at
and turns those of one step into scores; repetition penalty, drawing and stopping are the loop's. This one has
a strength that differs from step to step and is kept beside the answer::

    class Adaptive(Decoder):
        needs_without_context = True

        def scores(self, logits):
            gap = logits.model - logits.without_context
            self.note = gap.abs().mean(-1).clamp(max=self.settings.alpha)  # (B,)
            return logits.model + self.note[:, None] * gap

        def details(self, notes):
            return {"strengths": list(notes)}

    DECODERS.register("adaptive", Adaptive)

``scores`` runs inside a CUDA graph where there are any: no branch on a tensor's value, no ``.item()``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmem_pl.backbone import Backbone
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
        max_new_tokens: most tokens of an answer; the settings' unless it has its own limit.
        repetition_penalty: 1 for none; its own where the settings leave it open.
        note: ``(B,)``, whole numbers or floats to keep beside the tokens that the last scores lead to.
    """

    needs_base: bool = False
    needs_without_context: bool = False
    early_layers: Sequence[int] = ()
    note: Tensor | None = None

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        self.settings = settings
        self.max_new_tokens = settings.max_new_tokens
        self.repetition_penalty = 1.0 if settings.repetition_penalty is None else settings.repetition_penalty

    def forms(self, form: str) -> list[str]:
        """Forms of the prompt that it reads to answer one of them."""
        return [form, "without_context"] if self.needs_without_context else [form]

    def scores(self, logits: StepLogits) -> Tensor:
        """Return ``(B, V)`` scores."""
        raise NotImplementedError

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
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

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits ``(B, V)``."""
        return logits.model + self.settings.alpha * (logits.model - logits.base)


class ContextAware(Decoder):
    """CAD: ``(1 + alpha) * logits(with context) - alpha * logits(without context)``.

    Source: Shi et al., arXiv 2305.14739, equation 3. Under a memory, what is subtracted stays the base
    model: with the memory it would know the context even without reading it.
    """

    needs_without_context = True

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits ``(B, V)``."""
        return logits.model + self.settings.alpha * (logits.model - logits.without_context)


class DoLa(Decoder):
    """Contrasts the last layer with the premature layer that differs most from it.

    Source: Chuang et al., arXiv 2309.03883, sections 2.2 and 2.3; the divergence as published with
    FastMem, see :func:`contrast_layers`. The repetition penalty is 1.2, as the paper advises, where the
    settings leave it open.

    Raises:
        FastMemError: when the model lacks one of the layers.
    """

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        if settings.repetition_penalty is None:
            self.repetition_penalty = 1.2
        tied = bool(getattr(backbone.model.config.get_text_config(), "tie_word_embeddings", False))
        self.early_layers = candidate_layers(settings.dola_layers, backbone.num_blocks, tied)

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the log-probability differences ``(B, V)``, ``-inf`` where a token is not plausible.

        The note is the chosen layer's place among ``early_layers``.
        """
        scores, self.note = contrast_layers(logits.model, logits.early, self.settings.relative_top)
        return scores

    def details(self, notes: Sequence[float]) -> dict[str, Any]:
        """How often each premature layer was chosen: ``{"dola_layers": {number: count}}``."""
        count = Counter(notes)
        return {"dola_layers": {str(layer): count[place] for place, layer in enumerate(self.early_layers)}}


DecoderFactory = Callable[[DecodingSettings, Backbone], Decoder]

DECODERS: Registry[DecoderFactory] = Registry("decoder")
DECODERS.register("greedy", Greedy)
DECODERS.register("cd", Contrastive)
DECODERS.register("cad", ContextAware)
DECODERS.register("dola", DoLa)


def make_decoder(decoder: str | DecoderFactory, settings: DecodingSettings, backbone: Backbone) -> Decoder:
    """A decoder by its name in :data:`DECODERS`, or by what makes it."""
    return (DECODERS[decoder] if isinstance(decoder, str) else decoder)(settings, backbone)
