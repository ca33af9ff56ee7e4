"""Chat pieces: the texts around the turns of a chat, cut out of a tokenizer's template.

System turns that a template injects on its own are left out, as the paper uses none; those that the
settings for the template ask for stay.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastmem_pl.base.errors import FastMemError, one_line

_QUESTION, _ANSWER, _NEXT, _SYSTEM = "sentinelquestion", "sentinelanswer", "sentinelnext", "sentinelsystem"
_USER = {"role": "user", "content": _QUESTION}
_ASSISTANT = {"role": "assistant", "content": _ANSWER}
# Of a template's own code, some hundred times what any needs.
_MOST_STEPS = 1_000_000
_RESERVED = ("messages", "add_generation_prompt", "bos_token", "eos_token")
# What tells a thinking part from other ways to open an answer, such as a channel.
_THINKING = re.compile("think|thought|reason", re.IGNORECASE)
_OPEN_THINKING = re.compile(r"<(\w*think\w*)>(\s*)$")
_MARKUP = re.compile(r"[<\[].*[>\]]", re.DOTALL)


@dataclass(frozen=True)
class ChatPieces:
    """The texts around the turns of a chat.

    Args:
        user_header: opens a user's turn.
        user_end: ends it, and opens the assistant's for the model to go on.
        assistant_header: opens a turn of the assistant that nothing precedes, up to where an answer stands:
            after an empty thinking part, or in the channel of answers.
        end_of_turn: what the model ends an answer with.
        answer_start: what stands in place of ``user_end`` when the first words of the answer are given.
        start: control tokens that every sequence begins with, bos aside (GLM's ``[gMASK]<sop>``).
        preamble: a system turn that the settings for the template ask for.
        turn_ends: texts at which a generated turn is over.
    """

    user_header: str
    user_end: str
    assistant_header: str
    end_of_turn: str
    answer_start: str
    start: str = ""
    preamble: str = ""
    turn_ends: tuple[str, ...] = ()


class ChatTemplate:
    """A tokenizer's chat template, with what the user hands to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs or {})
        source = _source(tokenizer)
        for name in self._kwargs:
            # Jinja drops what a template does not use, and a slip would have no effect.
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", source):
                problem = "is not for you to set" if name in _RESERVED else "is not used by the chat template"
                raise FastMemError(f"model.chat.template_kwargs: {name!r} {problem}; leave it out")

    def render(self, *turns: Mapping[str, str], **options: Any) -> str:
        """Text of a chat."""
        given = {**self._kwargs, **options}
        try:
            with _bounded_steps():
                return self._tokenizer.apply_chat_template(list(turns), tokenize=False, **given)
        except Exception as error:  # it is a program that comes with the model
            raise FastMemError(
                f"model.chat: the tokenizer's chat template cannot be used: {one_line(error)}; give what it "
                "asks for in model.chat.template_kwargs, or --model.chat.template false"
            ) from error

    def system_turn(self) -> tuple[str, str] | None:
        """What stands before and after a system text, up to the user's text, if it has a place."""
        try:
            # Bos is the encoder's to add.
            chat = self.render({"role": "system", "content": _SYSTEM}, _USER, bos_token="")
        except FastMemError:
            return None
        around = chat.split(_QUESTION)[0].split(_SYSTEM)
        return (around[0], around[1]) if len(around) == 2 else None

    def pieces(self) -> ChatPieces:
        """Cut the chat pieces out of chats of sentinels."""
        control = pattern(control_tokens(self._tokenizer))

        def first(text: str) -> str:
            found = control.search(text)
            return found.group() if found else ""

        before, turn, between, _ = self._split(_QUESTION, _ANSWER, _NEXT)
        # Qwen3 and gpt-oss write the last turn otherwise than those before it, and as the model does.
        try:
            _, turn, closing = self._split(_QUESTION, _ANSWER)
        except FastMemError:
            closing = ""
        opened = self.render(_USER, add_generation_prompt=True).split(_QUESTION)[-1]
        closed = self.render(_USER).split(_QUESTION)[-1]
        # GLM has no end of turn: a turn is over where the next one begins.
        end_of_turn = first(closing) or first(between) or between.strip() or self._tokenizer.eos_token or ""
        if opened.startswith(closed) and opened != closed:
            opening = opened[len(closed) :]
        else:
            # Phi-3 ends a chat that does not go on with eos, Command R7B opens a turn in any case: cut after
            # the user's own end of turn instead.
            end = first(opened)
            opening = opened.partition(end)[2].lstrip() if end else ""
        user_close = opened.removesuffix(opening)
        user_end, header = _join(opened, user_close, opening, turn, control)
        user_header = _user_header(before, between, {first(closing), first(closed)})
        start, preamble = self._beginning(before.removesuffix(user_header), control)
        ends = tuple(dict.fromkeys(end for end in (end_of_turn, first(between)) if end))
        return ChatPieces(
            user_header,
            user_end,
            header,
            end_of_turn,
            answer_start=user_close + header,
            start=start,
            preamble=preamble,
            turn_ends=ends,
        )

    def _split(self, *sentinels: str) -> list[str]:
        turns = [_USER, _ASSISTANT, {"role": "user", "content": _NEXT}]
        rest, parts = self.render(*turns[: len(sentinels)]), []
        for sentinel in sentinels:
            if rest.count(sentinel) != 1:
                raise FastMemError(
                    "model.backbone: the tokenizer's chat template does not keep a user and an assistant "
                    "turn; give the tokenizer another template, or --model.chat.template false"
                )
            part, rest = rest.split(sentinel)
            parts.append(part)
        return [*parts, rest]

    def _beginning(self, text: str, control: re.Pattern[str]) -> tuple[str, str]:
        """Sort what stands before the first user turn into control tokens and a system turn to keep."""
        text = text.removeprefix(self._tokenizer.bos_token or "")
        if not control.sub("", text).strip():
            # Bos is the encoder's to add, wherever it stands among them.
            return text.replace(self._tokenizer.bos_token or " ", "").strip(), ""
        return "", text if self._kwargs and self._differs_without() else ""

    def _differs_without(self) -> bool:
        try:
            plain = ChatTemplate(self._tokenizer).render(_USER)
        except FastMemError:
            return True
        return plain.split(_QUESTION)[0] != self.render(_USER).split(_QUESTION)[0]


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """Let a template, which runs in a sandbox of transformers, take a bounded number of steps."""
    left = _MOST_STEPS

    def count(*event: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"it takes over {_MOST_STEPS} steps")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def derive_pieces(
    tokenizer: PreTrainedTokenizerBase,
    use_template: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPieces:
    """Cut the chat pieces out of the tokenizer's template; of plain text without one."""
    if tokenizer.chat_template and use_template:
        return ChatTemplate(tokenizer, template_kwargs).pieces()
    if template_kwargs:
        raise FastMemError("model.chat.template_kwargs: no chat template is used here; leave it out")
    eos = tokenizer.eos_token or ""
    return ChatPieces("", "\n", "", eos, answer_start="\n", turn_ends=(eos,) if eos else ())


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that the tokenizer marks as special."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def unmarked_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control tokens of the chat template that the tokenizer does not mark as special.

    Those are DeepSeek's ``<｜User｜>`` or the ``</think>`` of Qwen3: in data they would be parsed as well.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    source = _source(tokenizer)
    with suppress(FastMemError):
        # Tokens that it puts together, such as '<|' + role + '|>'.
        source += ChatTemplate(tokenizer).render(_USER, _ASSISTANT)
    # A template may write one of a pair only, as DeepSeek R1's opens a thinking part.
    return [t for t in added if _MARKUP.fullmatch(t) and (t in source or t.replace("</", "<", 1) in source)]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that are control tokens where the template writes them, and plain text in data."""
    return special_tokens(tokenizer) + unmarked_tokens(tokenizer)


def pattern(texts: list[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing without any."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def _join(opened: str, user_close: str, opening: str, turn: str, control: re.Pattern[str]) -> tuple[str, str]:
    """Compare the generation prompt with how an answered turn is written: ``(user_end, header)``.

    ``opening`` is the generation prompt after ``user_close``; ``turn`` is all between question and answer.
    """
    written = turn.removeprefix(user_close) if turn.startswith(user_close) else opening
    if not written.startswith(opening):
        # DeepSeek, thinking: the prompt has <think>, and an answered turn </think> in its place.
        header = written
        if opening.startswith(written):
            # The generation prompt has a thinking part more, which may be left open to be filled.
            thinking = _OPEN_THINKING.search(opening)
            space = thinking.group(2) if thinking else ""
            header = opening + (f"{space}</{thinking.group(1)}>{space * 2}" if thinking else "")
        return opened, header
    more = written[len(opening) :]
    if not more.strip():
        # A space is a part of the answer's first token.
        return opened, written if opening and "\n" in more else opening
    # gpt-oss leaves the choice of a channel to the model, Command R7B that of an action: an answer is opened
    # here. Whether a model thinks first is the template's choice, and by template_kwargs the user's.
    chosen = not _THINKING.search(more) and (control.search(more) or not opening)
    return (user_close + written if chosen else opened), written


def _user_header(before: str, between: str, ends: set[str]) -> str:
    # What stands before both user turns: an injected system turn or bos stands before the first only.
    header, ends = between.lstrip(), ends - {""}
    while end := next((end for end in ends if header.startswith(end)), ""):
        header = header.removeprefix(end).lstrip()
    suffixes = (before[start:] for start in range(len(before) + 1))
    return next(suffix for suffix in suffixes if header.endswith(suffix))
