"""Methods that a run compares: memory or not, a decoder, and a form of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry

BASELINE = "zero-shot"


@dataclass(frozen=True)
class Method:
    """One way to answer."""

    name: str
    memory: bool  # whether the context is memorized first
    decoder: str  # name in DECODERS
    description: str
    prompt: str = "prompt"  # form of the task's prompt: this, "one_shot" or "without_context"


METHODS: Registry[Method] = Registry("model.methods")
for _method in (
    Method(BASELINE, False, "greedy", "the model as it is, context in the prompt"),
    Method("one-shot", False, "greedy", "one worked example in the prompt", "one_shot"),
    Method("cad", False, "cad", "contrast logits with and without the context"),
    Method("adacad", False, "adacad", "cad, as strong as the context changes the prediction"),
    Method("coiecd", False, "coiecd", "cad for the tokens whose information is out of bounds"),
    Method("cocoa", False, "cocoa", "between with and without the context, by how sure the context makes"),
    Method("ck-plug", False, "ck-plug", "own knowledge or context where the context makes less sure"),
    Method("dola", False, "dola", "contrast the last layer with a premature one"),
    Method("fastmem", True, "greedy", "memorize the context first"),
    Method("fastmem+cd", True, "cd", "memorize, then contrast memorized with base logits"),
    Method("fastmem+adacd", True, "adacd", "memorize, then cd, as strong as the memory moves the prediction"),
    Method("fastmem+cad", True, "cad", "memorize, then contrast with the base model without the context"),
    Method("fastmem+adacad", True, "adacad", "memorize, then adacad with the base model without the context"),
    Method("fastmem+coiecd", True, "coiecd", "memorize, then coiecd with the base model without the context"),
    Method("fastmem+dola", True, "dola", "memorize, then contrast layers"),
):
    METHODS.register(_method.name, _method)


def select_methods(names: Sequence[str]) -> list[Method]:
    """Look up methods by name, in the given order; an unknown, a repeated or no name is refused."""
    if not names:
        raise FastMemError(f"model.methods: empty; allowed: {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise FastMemError(f"model.methods: a method is named twice in {list(names)}")
    return [METHODS[name] for name in names]
