"""Asking a backbone questions, with or without a memory, from Python."""

from __future__ import annotations

from collections.abc import Sequence

from fastmem_pl.backbone import Backbone
from fastmem_pl.data import TASKS
from fastmem_pl.decoding import DECODERS, DecodingSettings, Prefill
from fastmem_pl.errors import FastMemError
from fastmem_pl.memory import Memory


def answer(
    backbone: Backbone,
    questions: str | Sequence[str],
    context: str | Sequence[str] | None = None,
    memory: Memory | None = None,
    decoder: str = "greedy",
    max_new_tokens: int = 100,
    alpha: float = 0.5,
    answer_prefix: str = "",
) -> list[str]:
    """Answer questions together.

    Args:
        backbone: the model.
        questions: one or several.
        context: put in the prompt; one for all questions or one each. Without it the question alone.
        memory: of one context for all questions, or one row a question.
        decoder: ``"greedy"`` or ``"cd"`` (contrast memorized with base logits).
        max_new_tokens: most tokens of an answer.
        alpha: strength of ``"cd"``.
        answer_prefix: text that opens the answer; part of what is returned.

    Returns:
        one text a question.

    Raises:
        FastMemError: when counts do not match, or the memory is of another model.
    """
    questions = [questions] if isinstance(questions, str) else list(questions)
    contexts = [context] * len(questions) if context is None or isinstance(context, str) else list(context)
    if len(contexts) != len(questions):
        raise FastMemError(f"answer: {len(questions)} questions but {len(contexts)} contexts")
    if memory is not None:
        if memory.fingerprint != backbone.fingerprint():
            raise FastMemError(
                f"answer: the memory belongs to the model {memory.fingerprint}, "
                f"this one is {backbone.fingerprint()}"
            )
        if len(memory) not in (1, len(questions)):
            raise FastMemError(f"answer: {len(questions)} questions but {len(memory)} memories")
        if len(memory) < len(questions):
            memory = memory.rows([0] * len(questions))
    qa = TASKS["qa"]
    texts = [q if c is None else qa.prompt_text(c, q) for q, c in zip(questions, contexts, strict=True)]
    prompts = [backbone.chat.prompt(text, answer_prefix) for text in texts]
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > backbone.context_length:
        raise FastMemError(
            f"answer: prompt and answer take {longest} tokens, allowed: {backbone.context_length}; "
            "shorten the context or lower max_new_tokens"
        )
    chosen = DECODERS[decoder](DecodingSettings(max_new_tokens, alpha))
    prefill = Prefill(backbone, prompts, memory.num_layers if memory else 1)
    if chosen.needs_base and memory is None:
        raise FastMemError(
            f"answer: decoder {decoder!r} contrasts a memory with the base model; give a memory"
        )
    answers = prefill.decode(chosen, memory and memory.deltas, max_new_tokens)
    return [answer_prefix + backbone.chat.decode(ids) for ids in answers]
