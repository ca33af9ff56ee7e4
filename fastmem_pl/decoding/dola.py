"""DoLa: which layers to contrast the last one with, and how (Chuang et al., arXiv 2309.03883)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem_pl.base.errors import FastMemError


def candidate_layers(wanted: str | Sequence[float], num_blocks: int, tied: bool) -> tuple[int, ...]:
    """Numbers of the hidden states that DoLa chooses from; number ``l`` is the input of block ``l``.

    Args:
        wanted: ``"high"``, ``"low"``, ``"auto"``, or numbers; those above 0 and below 1 are fractions
            of the depth.
        num_blocks: decoder blocks of the model.
        tied: whether the head is the embedding matrix; the embeddings alone, number 0, then predict the
            token that was read, and the low half starts at 2.

    Raises:
        FastMemError: when a number is no hidden state below the last block's output.

    >>> candidate_layers("high", 32, False)
    (16, 18, 20, 22, 24, 26, 28, 30)
    >>> candidate_layers("auto", 80, False)[0]
    60
    >>> candidate_layers([0.5, 31], 32, False)
    (16, 31)
    """
    middle = num_blocks // 2 // 2 * 2
    if wanted == "low":
        return tuple(range(2 if tied and middle > 2 else 0, max(middle, 1), 2))
    if wanted == "high":
        return tuple(range(middle, num_blocks, 2))
    if wanted == "auto":
        return tuple(range(max(middle, num_blocks - 20), num_blocks, 2))
    numbers = []
    for value in wanted:
        number = min(round(value * num_blocks), num_blocks - 1) if 0 < value < 1 else value
        if not 0 <= number < num_blocks or number != int(number):
            raise FastMemError(
                f"model.decode.dola_layers: {value:g} is no layer; allowed: 0 to {num_blocks - 1}, "
                "fractions of the "
                "depth below 1, or auto, low, high"
            )
        numbers.append(int(number))
    if not numbers:
        raise FastMemError("model.decode.dola_layers: empty; allowed: numbers of layers, or auto, low, high")
    return tuple(sorted(set(numbers)))


def contrast_layers(mature: Tensor, early: Tensor, relative_top: float) -> tuple[Tensor, Tensor]:
    """Score tokens by how much the last layer raises them over the most different premature layer.

    The divergence is the one published with FastMem: both Kullback-Leibler terms run from the mixture, and
    it is the mean over the vocabulary, which leaves the choice as the sum would.

    Args:
        mature: logits of the last layer, ``(B, V)``.
        early: logits of the candidates, ``(L, B, V)``.
        relative_top: tokens below this share of the highest probability get ``-inf``.

    Returns:
        scores ``(B, V)``, and the place of each row's premature layer among the candidates, ``(B,)``.
    """
    log_mature = mature.log_softmax(-1)
    log_early = early.log_softmax(-1)
    mixture = 0.5 * (log_mature.exp() + log_early.exp())
    # The mean of mixture * (log mixture - (log mature + log early) / 2) is half the sum of both terms.
    divergence = torch.xlogy(mixture, mixture) - mixture * (0.5 * (log_mature + log_early))
    chosen = divergence.mean(-1).argmax(0)
    premature = log_early[chosen, torch.arange(mature.shape[0], device=mature.device)]
    implausible = log_mature < log_mature.amax(-1, keepdim=True) + math.log(relative_top)
    return (log_mature - premature).masked_fill(implausible, -torch.inf), chosen
