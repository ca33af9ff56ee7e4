"""Methods that a run compares: memory or not, plus a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmem_pl.errors import FastMemError
from fastmem_pl.registry import Registry

BASELINE = "zero-shot"


@dataclass(frozen=True)
class Method:
    """One way to answer.

    Attributes:
        name: as in ``--model.methods``.
        memory: whether the context is memorized first.
        decoder: name in :data:`~fastmem_pl.decoding.decoders.DECODERS`.
        description: one line for humans.
    """

    name: str
    memory: bool
    decoder: str
    description: str


METHODS: Registry[Method] = Registry("model.methods")
for _method in (
    Method(BASELINE, False, "greedy", "the model as it is, context in the prompt"),
    Method("fastmem", True, "greedy", "memorize the context first"),
    Method("fastmem+cd", True, "cd", "memorize, then contrast memorized with base logits"),
):
    METHODS.register(_method.name, _method)


def select_methods(names: Sequence[str]) -> list[Method]:
    """Look up methods by name, in the given order.

    Raises:
        FastMemError: for an unknown, a repeated or no name.
    """
    if not names:
        raise FastMemError(f"model.methods: empty; allowed: {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise FastMemError(f"model.methods: a method is named twice in {list(names)}")
    return [METHODS[name] for name in names]
