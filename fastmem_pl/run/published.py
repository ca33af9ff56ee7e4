"""Faults and habits of the published code that its results carry, brought back by name.

The sound behaviour is the default, and its code knows nothing of these: each quirk is a class that takes the
place of one part of a :class:`~fastmem_pl.FastMemModule`. Golden traces hold them to the published code
(``tests/test_golden.py``).
"""

from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fastmem_pl.backbone import Backbone, ChatEncoder, Delta
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import DecodingSettings, DoLa
from fastmem_pl.memory import DeltaAdamW, MemorizationModule
from fastmem_pl.memory.loss import MemorizationBatch
from fastmem_pl.run.encoding import SampleEncoder


class NormEveryLayer(MemorizationModule):
    """num_layers above 1: final norm after every trained layer from the second step on."""

    def hidden(self, batch: MemorizationBatch, deltas: Sequence[Delta], moved: bool) -> Tensor:
        """Hidden states that the losses are computed from, ``(B, T, D)``."""
        to_head = partial(self._tail.to_head, inputs=batch.inputs)
        between = to_head if moved else None
        return to_head(self._tail.states(batch.inputs, batch.base, deltas, between=between)[-1])


class RoundedAdamW(DeltaAdamW):
    """Keeps ``W + delta`` at what float32 weights can hold, as editing them does.

    Updates of one size then round alike (at 1e-5, by +0.14% wherever the weight is between 0.25 and 1).
    """

    def decay(self, delta: Tensor, base: Tensor) -> None:
        """Decay the rounded sum."""
        delta.copy_((base.float() + delta).mul_(self._left) - base)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step, and round."""
        loss = super().step(closure)
        with torch.no_grad():
            for delta, base in self._pairs:
                delta.copy_((base.float() + delta) - base)
        return loss


class RoundWeights(MemorizationModule):
    """Weights are rounded to float32 after every update, so updates of one size round alike."""

    optimizer_class = RoundedAdamW

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The kernel, which takes gradients in factors, does not round.
        super().__init__(*args, **{**kwargs, "dense_gradients": True})


class UnlimitedDoLa(DoLa):
    """DoLa without repetition penalty, and 399 tokens whatever max_new_tokens says."""

    limit = 399

    def __init__(self, settings: DecodingSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        if settings.repetition_penalty is not None:
            raise FastMemError(
                "model.decode.repetition_penalty: dola as published applies none; leave it out or drop "
                "'dola-unlimited'"
            )
        self.max_new_tokens, self.repetition_penalty = self.limit, 1.0


class ContextRoundTrip(SampleEncoder):
    """Contexts are encoded with special tokens, cut and decoded before use.

    A bos stays inside, and spaces go where the tokenizer cleans up.
    """

    def cut(self, sample: ContextSample) -> tuple[str, int, int]:
        """The context, its tokens that are kept, and those that are cut off."""
        text, kept, cut = self._round_trip(sample.context)
        if TASKS[sample.task].is_summary:
            # Articles go through it on loading, and again for every sample.
            text, kept, cut_again = self._round_trip(text)
            cut += cut_again
        return text, kept, cut

    def _round_trip(self, text: str) -> tuple[str, int, int]:
        tokenizer = self._chat.tokenizer
        ids = tokenizer(text, verbose=False).input_ids
        kept = ids[: self._limit]
        return tokenizer.decode(kept), len(kept), len(ids) - len(kept)


class ParseSpecialTokens(ChatEncoder):
    """Text in data that looks like a control token becomes one."""

    def encode(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of the joined segments."""
        return self.tokenizer("".join(text for text, _ in segments), add_special_tokens=False).input_ids


QUIRKS: Registry[type] = Registry("model.published_quirks")
QUIRKS.register("norm-every-layer", NormEveryLayer)
QUIRKS.register("round-weights", RoundWeights)
QUIRKS.register("dola-unlimited", UnlimitedDoLa)
QUIRKS.register("context-round-trip", ContextRoundTrip)
QUIRKS.register("parse-special-tokens", ParseSpecialTokens)


def apply(module: LightningModule, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Give a FastMemModule these quirks, before its backbone is loaded.

    Returns the names of those that memories depend on, and of those that only answers do.
    """
    if isinstance(names, str):
        raise FastMemError(f"model.published_quirks: give a list, such as [{names}]")
    of_memories, of_answers = [], []
    for name, quirk in ((name, QUIRKS[name]) for name in sorted(set(names))):
        if issubclass(quirk, DoLa):
            module.decoders = ChainMap({"dola": quirk}, module.decoders)
            of_answers.append(name)
            continue
        kinds = {ChatEncoder: "chat_class", SampleEncoder: "encoder_class"}
        part = next((kinds[kind] for kind in kinds if issubclass(quirk, kind)), "memorization_class")
        current = getattr(module, part)
        both = quirk if issubclass(quirk, current) else type(quirk.__name__, (quirk, current), {})
        setattr(module, part, both)
        of_memories.append(name)
    return of_memories, of_answers
