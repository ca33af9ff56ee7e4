"""Decoders: how one step's logits become next-token scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastmem_pl.errors import FastMemError
from fastmem_pl.registry import Registry


@dataclass(frozen=True)
class DecodingSettings:
    """What decoders are built from.

    Args:
        max_new_tokens: most tokens of an answer, the end token included.
        alpha: strength of contrastive decoding; 0 is greedy decoding.

    Raises:
        FastMemError: when a value is out of its range.
    """

    max_new_tokens: int = 100
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FastMemError(
                f"model.max_new_tokens: {self.max_new_tokens} is out of range; allowed: at least 1"
            )
        if not 0 <= self.alpha < float("inf"):
            raise FastMemError(f"model.alpha: {self.alpha} is out of range; allowed: 0 or above")


@dataclass(frozen=True)
class StepLogits:
    """Logits of the next token, ``(B, V)`` float32.

    Attributes:
        model: of the model that answers: with its memory if it has one, else the base model.
        base: of the base model on the same prompt. Equal to ``model`` where the answer has no memory, or
            the decoder does not ask for it.
    """

    model: Tensor
    base: Tensor


class Decoder(Protocol):
    """Turns :class:`StepLogits` into scores whose argmax is the next token."""

    needs_base: bool

    def scores(self, logits: StepLogits) -> Tensor:
        """Return ``(B, V)`` scores."""
        ...


class Greedy:
    """Most likely token of the model."""

    needs_base = False

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the model's logits ``(B, V)``."""
        return logits.model


class Contrastive:
    """FastMem+CD: ``(1 + alpha) * logits(memorized) - alpha * logits(base)``, same prompt for both.

    Source: Zhu et al., arXiv 2406.16069, section 3.3.
    """

    needs_base = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def scores(self, logits: StepLogits) -> Tensor:
        """Return the contrasted logits ``(B, V)``."""
        return logits.model + self.alpha * (logits.model - logits.base)


DECODERS: Registry[Callable[[DecodingSettings], Decoder]] = Registry("decoder")
DECODERS.register("greedy", lambda settings: Greedy())
DECODERS.register("cd", lambda settings: Contrastive(settings.alpha))
