"""Faults and habits of the published code that its results carry, off unless asked for by name.

The sound behaviour is the default everywhere. These exist to reproduce published traces.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry

QUIRKS: Registry[str] = Registry("model.published_quirks")
for _name, _effect in {
    "norm-every-layer": "num_layers above 1: final norm after every trained layer from the second step on",
    "round-weights": "weights are rounded to float32 after every update, so updates of one size round alike",
    "dola-unlimited": "dola without repetition penalty, and 399 tokens whatever max_new_tokens says",
    "context-round-trip": "contexts are encoded with special tokens, cut and decoded before use: a bos stays "
    "inside, spaces go where the tokenizer cleans up",
    "parse-special-tokens": "text in data that looks like a control token becomes one",
}.items():
    QUIRKS.register(_name, _effect)


ANSWER_QUIRKS = {"dola-unlimited"}
"""Quirks that memories do not depend on."""


def select_quirks(names: Sequence[str]) -> set[str]:
    """Check names of quirks.

    Raises:
        FastMemError: for an unknown name.
    """
    if isinstance(names, str):
        raise FastMemError(f"model.published_quirks: give a list, such as [{names}]")
    for name in names:
        QUIRKS[name]
    return set(names)
