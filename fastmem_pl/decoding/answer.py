"""Asking a backbone questions, with or without a memory, from Python."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data import TASKS
from fastmem_pl.decoding.decoders import DECODERS
from fastmem_pl.decoding.loop import Decoding, begin
from fastmem_pl.decoding.prefill import Prefills, PromptCache
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.memory import Memory


def answer(
    backbone: Backbone,
    questions: str | Sequence[str],
    context: str | Sequence[str] | None = None,
    memory: Memory | None = None,
    decoder: str = "greedy",
    answer_prefix: str = "",
    **settings: Any,
) -> list[str]:
    """Answer questions together; returns one text a question.

    Args:
        context: put in the prompt; one for all questions or one each. Without it the question alone.
        memory: of one context for all questions, or one row a question.
        decoder: ``"greedy"``, ``"cd"`` or ``"adacd"`` (contrast memorized with base logits), ``"cad"``,
            ``"adacad"``, ``"coiecd"``, ``"cocoa"`` or ``"ck-plug"`` (hold logits with and without the
            context against each other), or ``"dola"`` (contrast layers).
        answer_prefix: text that opens the answer; part of what is returned.
        settings: of :class:`DecodingSettings`, such as ``max_new_tokens``, ``alpha``, ``seed`` or ``stop``.

    Raises:
        FastMemError: when counts do not match, a setting is out of its range, the decoder lacks what it
            contrasts, or the memory is of another model.
    """
    questions = [questions] if isinstance(questions, str) else list(questions)
    decoding = _begin(backbone, questions, context, memory, decoder, settings, answer_prefix)
    return [answer_prefix + generated.text for generated in decoding.run()]


def stream_answer(
    backbone: Backbone,
    question: str,
    context: str | None = None,
    memory: Memory | None = None,
    decoder: str = "greedy",
    answer_prefix: str = "",
    prompts: PromptCache | None = None,
    **settings: Any,
) -> Iterator[str]:
    """Answer one question piece by piece, as the tokens come; arguments as :func:`answer`.

    Joined, the pieces are what :func:`answer` returns. Given the same ``prompts``, calls one after the other
    read what their prompts begin with, the context above all, only once.
    """
    decoding = _begin(backbone, [question], context, memory, decoder, settings, answer_prefix, prompts)
    if answer_prefix:
        yield answer_prefix
    yield from decoding.texts()


def encode_prompt(
    backbone: Backbone, question: str, context: str | None = None, answer_prefix: str = ""
) -> list[int]:
    """Token ids of the prompt that :func:`answer` asks with."""
    text = question if context is None else TASKS["qa"].prompt_text(context, question)
    return backbone.chat.prompt(text, answer_prefix)


def _begin(
    backbone: Backbone,
    questions: Sequence[str],
    context: str | Sequence[str] | None,
    memory: Memory | None,
    decoder: str,
    given: dict[str, Any],
    prefix: str,
    cache: PromptCache | None = None,
) -> Decoding:
    settings = DecodingSettings(**given)
    backbone = memory.on(backbone) if memory else backbone
    contexts = [context] * len(questions) if context is None or isinstance(context, str) else list(context)
    if not questions:
        raise FastMemError("answer: no questions; give one or more")
    if len(contexts) != len(questions):
        raise FastMemError(f"answer: {len(questions)} questions but {len(contexts)} contexts")
    if memory is not None and len(memory) not in (1, len(questions)):
        raise FastMemError(f"answer: {len(questions)} questions but {len(memory)} memories")
    deltas = memory and memory.serving(backbone, len(questions))
    asked = zip(questions, contexts, strict=True)
    prompts = {"prompt": [encode_prompt(backbone, question, shown, prefix) for question, shown in asked]}
    chosen = DECODERS[decoder](settings, backbone)
    longest = max(map(len, prompts["prompt"])) + chosen.max_new_tokens
    if longest > backbone.context_length:
        raise FastMemError(
            f"answer: prompt and answer take {longest} tokens, allowed: {backbone.context_length}; "
            "shorten the context or lower max_new_tokens"
        )
    if chosen.needs_base and memory is None:
        raise FastMemError(
            f"answer: decoder {decoder!r} contrasts a memory with the base model; give a memory"
        )
    if chosen.needs_without_context:
        if context is None:
            raise FastMemError(f"answer: decoder {decoder!r} contrasts with and without context; give one")
        bare = [TASKS["qa"].prompt_text("", question, "without_context") for question in questions]
        prompts["without_context"] = [backbone.chat.prompt(text, prefix) for text in bare]
    num_layers, early_layers = memory.num_layers if memory else 1, {"prompt": chosen.early_layers}
    return begin(
        Prefills(backbone, prompts, num_layers, early_layers, cache=cache), decoder, settings, deltas
    )
