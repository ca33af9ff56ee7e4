"""From scores to tokens: repetition penalty, the highest score, or a draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastmem_pl.decoding.settings import DecodingSettings


class TokenChooser:
    """Chooses the next token of every row.

    Draws come from uniform numbers made beforehand, by row from the seed and the row's key. So an answer
    does not depend on what else is in its batch, and no step waits for the host.

    Args:
        settings: temperature, top_p, top_k and seed.
        repetition_penalty: 1 for none.
        ids: prompt tokens, ``(B, T)``.
        mask: 1 on real tokens of ``ids``.
        keys: one number a row, such as the sample's place in the data.
        max_new_tokens: most draws of a row.
    """

    def __init__(
        self,
        settings: DecodingSettings,
        repetition_penalty: float,
        ids: Tensor,
        mask: Tensor,
        keys: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self._penalty = repetition_penalty
        # Fill tokens of shorter prompts must not count as said: the last token stands in for them.
        self._prompt = torch.where(mask.bool(), ids, ids[:, -1:])
        self._seen: Tensor | None = None
        self._uniform: Tensor | None = None
        if settings.temperature > 0:
            draws = [np.random.default_rng([settings.seed, key]).random(max_new_tokens) for key in keys]
            self._uniform = torch.tensor(np.stack(draws), device=ids.device)
            self._warp = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
            if settings.top_k:
                self._warp.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._warp.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, scores: Tensor, step: int) -> Tensor:
        """Return the tokens ``(B,)`` of step ``step`` for ``scores`` ``(B, V)``."""
        if self._penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, self._prompt, True)
            penalized = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(self._seen, penalized, scores)
        if self._uniform is None:
            token = scores.argmax(-1)
        else:
            token = draw(self._warp(self._prompt, scores), self._uniform[:, step])
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return token


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token of each row from the softmax of ``scores`` ``(B, V)`` by its number in [0, 1).

    >>> draw(torch.tensor([[0.0, 0.0, -torch.inf]] * 3), torch.tensor([0.0, 0.49, 0.99])).tolist()
    [0, 0, 1]
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # Against the sum as it came out, so that rounding cannot lead past the last possible token.
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
