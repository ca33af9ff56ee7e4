"""Chat pieces derived from a tokenizer's template, and the two token sequences FastMem needs.

The pieces are found by rendering sentinels through the chat template and cutting the text at them,
never from the model's name. System turns that a template injects on its own are left out, as the paper
uses none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from fastmem_pl.errors import FastMemError

_QUESTION, _ANSWER, _NEXT = "sentinelquestion", "sentinelanswer", "sentinelnext"


@dataclass(frozen=True)
class ChatPieces:
    """The texts around the turns of a chat.

    Attributes:
        user_header: before the user's text.
        user_end: between the user's text and the assistant's (its header included).
        assistant_header: opens an assistant turn that nothing precedes.
        end_of_turn: closes the assistant's turn.
    """

    user_header: str
    user_end: str
    assistant_header: str
    end_of_turn: str


def derive_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces:
    """Cut the chat pieces out of the tokenizer's template; plain text where it has none.

    Raises:
        FastMemError: when the template drops or reorders the turns.
    """
    if not tokenizer.chat_template:
        return ChatPieces("", "\n", "", tokenizer.eos_token or "")
    user = {"role": "user", "content": _QUESTION}
    turns = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    render = tokenizer.apply_chat_template
    chat = render(turns, tokenize=False)
    try:
        before, rest = chat.split(_QUESTION)
        user_end, rest = rest.split(_ANSWER)
        between, _ = rest.split(_NEXT)
    except ValueError:
        raise FastMemError(
            "model.backbone: the tokenizer's chat template does not keep a user and an assistant turn; "
            "give the tokenizer another template or none"
        ) from None
    opened = render([user], tokenize=False, add_generation_prompt=True)
    closed = render([user], tokenize=False)
    header = opened[len(closed) :] if opened.startswith(closed) else ""
    # The template's own generation prompt, unless it has none although its turns have a header.
    generation = opened.split(_QUESTION)[-1]
    if header or user_end.strip() == generation.strip():
        user_end = generation
    end_of_turn = _first_special(tokenizer, between) or between.strip() or (tokenizer.eos_token or "")
    # What stands before both user turns: an injected system turn or bos stands before the first only.
    next_header = between.split(end_of_turn, 1)[-1].lstrip()
    user_header = _common_suffix(before, next_header)
    return ChatPieces(user_header, user_end, header, end_of_turn)


def _common_suffix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    pattern = _special_pattern(tokenizer)
    found = pattern.search(text) if pattern else None
    return found.group() if found else None


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not texts:
        return None
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)))


@dataclass(frozen=True)
class EncodedContext:
    """Token ids of a memorization sequence; the first ``header_length`` of them carry no loss.

    ``context_tokens`` counts the context's own tokens and ``truncated`` how many were cut off.
    """

    input_ids: list[int]
    header_length: int
    context_tokens: int
    truncated: int


class ChatEncoder:
    """Builds memorization and prompt token ids for one tokenizer.

    Text that comes from data is never parsed as special tokens: a context that contains
    ``<|im_end|>`` literally is encoded as those characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pieces = derive_pieces(tokenizer)
        self._special = _special_pattern(tokenizer)
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        with_bos, without = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._bos = with_bos[: len(with_bos) - len(without)] if with_bos[-1:] == without[-1:] else []
        if self._bos:
            # A template that puts bos before each user turn must not bring a second one.
            header = self.pieces.user_header.removeprefix(tokenizer.decode(self._bos))
            self.pieces = replace(self.pieces, user_header=header)

    def context(self, context: str, limit: int) -> EncodedContext:
        """Encode ``[bos] assistant_header + context + end_of_turn`` (paper, section 3.1).

        Args:
            context: the text to memorize.
            limit: most context tokens to keep; the rest is cut off at the end.
        """
        text, kept, cut = self.truncate(context, limit)
        pieces = self.pieces
        header_length = len(self._bos) + len(self._encode([(pieces.assistant_header, True)]))
        ids = self._encode([(pieces.assistant_header, True), (text, False), (pieces.end_of_turn, True)])
        return EncodedContext(self._bos + ids, header_length, kept, cut)

    def prompt(self, user_text: str, answer_prefix: str = "") -> list[int]:
        """Encode a user turn and the opened assistant turn that starts with ``answer_prefix``."""
        pieces = self.pieces
        return self._bos + self._encode(
            [
                (pieces.user_header, True),
                (user_text, False),
                (pieces.user_end, True),
                (answer_prefix, False),
            ]
        )

    def truncate(self, text: str, limit: int) -> tuple[str, int, int]:
        """Cut ``text`` after ``limit`` tokens and return ``(text, kept tokens, tokens cut off)``.

        The text is cut by character offset, so what is kept stays as it was written.
        """
        encoded = self._plain(text, return_offsets_mapping=True)
        count = len(encoded.input_ids)
        if count <= limit:
            return text, count, 0
        end = encoded.offset_mapping[limit - 1][1]
        return text[:end], limit, count - limit

    def decode(self, token_ids: list[int]) -> str:
        """Decode generated ids without control tokens; spaces stay as generated."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, segments: list[tuple[str, bool]]) -> list[int]:
        """Encode the joined segments; only those marked trusted may hold control tokens."""
        untrusted = "".join(text for text, trusted in segments if not trusted)
        if self._special is None or not self._special.search(untrusted):
            return self.tokenizer("".join(t for t, _ in segments), add_special_tokens=False).input_ids
        ids: list[int] = []
        plain = ""
        strip_next = False
        for text, trusted in segments:
            start = 0
            for match in self._special.finditer(text) if trusted else ():
                plain += text[start : match.start()]
                token = self._added[match.group()]
                plain = plain.lstrip() if strip_next else plain
                ids += self._plain(plain.rstrip() if token.lstrip else plain).input_ids
                ids.append(self._ids[token.content])
                plain, strip_next, start = "", token.rstrip, match.end()
            plain += text[start:]
        return ids + self._plain(plain.lstrip() if strip_next else plain).input_ids

    def _plain(self, text: str, **kwargs):
        # verbose=False: transformers warns of texts over the model's length, which are cut after this.
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, **kwargs
        )
