"""From scores to tokens: repetition penalty, the highest score, or a draw."""

from __future__ import annotations

import copy
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

from fastmem_pl.decoding.decoders import Decoder
from fastmem_pl.decoding.prefill import Prefill


class TokenChooser:
    """Chooses the next token of every row.

    Draws come from uniform numbers made beforehand, by row from the seed and the row's key. So an answer
    does not depend on what else is in its batch, and no step waits for the host.

    Args:
        decoder: whose settings, penalty and number of tokens apply.
        prefill: of the prompts, whose tokens count as said.
        keys: one number a row, such as the sample's place in the data; by default a hash of the prompt.
        vocabulary: number of scores.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefill: Prefill,
        keys: Sequence[int] | None,
        vocabulary: int,
    ) -> None:
        settings, ids = decoder.settings, prefill.ids
        self._penalty = decoder.repetition_penalty
        self._seen: Tensor | None = None
        self._uniform: Tensor | None = None
        self._step = torch.zeros(1, dtype=torch.long, device=ids.device)
        self._warp = LogitsProcessorList()
        if self._penalty != 1:
            # Fill tokens of shorter prompts must not count as said: the last token stands in for them.
            said = torch.where(prefill.mask.bool(), ids, ids[:, -1:])
            seen = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
            self._seen = seen.scatter_(1, said, True)
        if settings.temperature > 0:
            seeds = [[settings.seed, key] for key in (prefill.keys if keys is None else keys)]
            draws = [np.random.default_rng(seed).random(decoder.max_new_tokens) for seed in seeds]
            self._uniform = torch.tensor(np.stack(draws), device=ids.device)
            self._warp.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                self._warp.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._warp.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the next tokens ``(B,)`` for ``scores`` ``(B, V)``."""
        if self._seen is not None:
            penalized = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(self._seen, penalized, scores)
        if self._uniform is None:
            token = scores.argmax(-1)
        else:
            # The processors that warp look at no token ids.
            token = draw(self._warp(None, scores), self._uniform.index_select(1, self._step).squeeze(1))
            self._step += 1
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return token

    def tensors(self) -> list[Tensor]:
        """All that persists from step to step."""
        return [self._step, *(tensor for tensor in (self._seen, self._uniform) if tensor is not None)]

    def rows(self, index: Tensor) -> TokenChooser:
        """A copy with some rows only."""
        twin = copy.copy(self)
        twin._step = self._step.clone()
        twin._seen, twin._uniform = (None if t is None else t[index] for t in (self._seen, self._uniform))
        return twin


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token of each row from the softmax of ``scores`` ``(B, V)`` by its number in [0, 1).

    >>> draw(torch.tensor([[0.0, 0.0, -torch.inf]] * 3), torch.tensor([0.0, 0.49, 0.99])).tolist()
    [0, 0, 1]
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # Against the sum as it came out, so that rounding cannot lead past the last possible token.
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
