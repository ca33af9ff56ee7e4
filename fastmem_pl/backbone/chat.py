"""Chat pieces derived from a tokenizer's template, and the two token sequences FastMem needs.

System turns that a template injects on its own are left out, as the paper uses none.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fastmem_pl.base.errors import FastMemError, one_line

_QUESTION, _ANSWER, _NEXT, _SYSTEM = "sentinelquestion", "sentinelanswer", "sentinelnext", "sentinelsystem"
# Of a template's own code, some hundred times what any needs.
_MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class ChatSettings:
    """How texts become token sequences.

    Args:
        template: use the tokenizer's chat template; off, prompts are plain text.
        system_prompt: text of a system turn before the question; none by default, as in the paper.
    """

    template: bool = True
    system_prompt: str | None = None


@dataclass(frozen=True)
class ChatPieces:
    """The texts around the turns of a chat."""

    user_header: str
    user_end: str  # and the assistant's header
    assistant_header: str  # of a turn that nothing precedes
    end_of_turn: str  # of the assistant


def derive_pieces(tokenizer: PreTrainedTokenizerBase, use_template: bool = True) -> ChatPieces:
    """Cut the chat pieces out of the template, rendered with sentinels; of plain text without one."""
    if not (tokenizer.chat_template and use_template):
        return ChatPieces("", "\n", "", tokenizer.eos_token or "")
    user = {"role": "user", "content": _QUESTION}
    turns = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    chat = _render(tokenizer, turns)
    try:
        before, rest = chat.split(_QUESTION)
        user_end, rest = rest.split(_ANSWER)
        between, _ = rest.split(_NEXT)
    except ValueError:
        raise FastMemError(
            "model.backbone: the tokenizer's chat template does not keep a user and an assistant turn; "
            "give the tokenizer another template or none"
        ) from None
    opened = _render(tokenizer, [user], add_generation_prompt=True)
    closed = _render(tokenizer, [user])
    special = _special_pattern(tokenizer).search(between)
    end_of_turn = special.group() if special else between.strip() or (tokenizer.eos_token or "")
    generation = opened.split(_QUESTION)[-1]
    if opened.startswith(closed):
        header = opened[len(closed) :]
    else:
        # Phi-3 ends a chat that does not go on with eos: cut after the user's own end of turn instead.
        header = generation.partition(end_of_turn)[2].lstrip()
    # The template's own generation prompt, unless it has none although its turns have a header.
    if header or user_end.strip() == generation.strip():
        user_end = generation
    # What stands before both user turns: an injected system turn or bos stands before the first only.
    next_header = between.split(end_of_turn, 1)[-1].lstrip()
    suffixes = (before[start:] for start in range(len(before) + 1))
    user_header = next(suffix for suffix in suffixes if next_header.endswith(suffix))
    return ChatPieces(user_header, user_end, header, end_of_turn)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    """A chat as the template has it. A template is a program that comes with the model: it runs in a sandbox
    of transformers, and here in a bounded number of steps.
    """
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
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:
        raise FastMemError(
            f"model.backbone: the tokenizer's chat template fails ({one_line(error)}); give the tokenizer "
            "another template or none"
        ) from error
    finally:
        sys.settrace(before)


def _system_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    # What stands before and after the system prompt, up to the user's text, if it has a place.
    turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _QUESTION}]
    try:
        # Bos is the encoder's to add.
        chat = _render(tokenizer, turns, bos_token="")
    except FastMemError:
        return None
    around = chat.split(_QUESTION)[0].split(_SYSTEM)
    return tuple(around) if len(around) == 2 else None


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)")


@dataclass(frozen=True)
class EncodedContext:
    """Token ids of a memorization sequence; the first ``header_length`` of them carry no loss."""

    input_ids: list[int]
    header_length: int
    context_tokens: int  # without those around it
    truncated: int  # tokens that were cut off


class ChatEncoder:
    """Builds token ids; text that comes from data is never parsed as control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or ChatSettings()
        templated = self.settings.template and tokenizer.chat_template
        self.pieces = derive_pieces(tokenizer, templated)
        self._special = _special_pattern(tokenizer)
        self._added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        with_bos, without = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._bos = with_bos[: len(with_bos) - len(without)] if with_bos[-1:] == without[-1:] else []
        if self._bos:
            # A template that puts bos before each user turn must not bring a second one.
            header = self.pieces.user_header.removeprefix(tokenizer.decode(self._bos))
            self.pieces = replace(self.pieces, user_header=header)
        self._opening = [(self.pieces.user_header, True)]
        if self.settings.system_prompt:
            system = self.settings.system_prompt
            around = _system_turn(tokenizer) if templated else None
            self._opening += [(f"{system}\n\n", False)]
            if around:
                opening = around[0].removeprefix(tokenizer.decode(self._bos))
                self._opening = [(opening, True), (system, False), (around[1], True)]

    def context(self, context: str, limit: int) -> EncodedContext:
        """Encode ``[bos] assistant_header + context + end_of_turn`` (paper, section 3.1); cut to a limit."""
        return self.whole_context(*self.cut(context, limit))

    def windows(self, text: str, window: int, overlap: int) -> list[EncodedContext]:
        """Encode a text in windows of up to ``window`` tokens; each token has a loss in one of them.

        A window repeats the last ``overlap`` of the one before, after the header and like it without loss.
        """
        ids = self._plain(text).input_ids
        if len(ids) <= window:
            return [self.context(text, window)]
        header = self._bos + self.encode([(self.pieces.assistant_header, True)])
        closing = self.encode([(self.pieces.end_of_turn, True)])
        encoded, start = [], 0
        while start < len(ids):
            repeated = min(overlap, start)
            end = start - repeated + window
            # Only the last one ends the turn.
            part = ids[start - repeated : end] + (closing if end >= len(ids) else [])
            new = min(end, len(ids)) - start
            encoded.append(EncodedContext(header + part, len(header) + repeated, new, 0))
            start = end
        return encoded

    def whole_context(self, text: str, kept: int, cut: int) -> EncodedContext:
        """Encode what :meth:`cut` returned."""
        header = (self.pieces.assistant_header, True)
        ids = self.encode([header, (text, False), (self.pieces.end_of_turn, True)])
        return EncodedContext(self._bos + ids, len(self._bos + self.encode([header])), kept, cut)

    def prompt(self, user_text: str, answer_prefix: str = "") -> list[int]:
        """Encode a user turn, after a system turn if there is one, and the opened assistant turn."""
        end = (self.pieces.user_end, True)
        return self._bos + self.encode([*self._opening, (user_text, False), end, (answer_prefix, False)])

    def cut(self, text: str, limit: int) -> tuple[str, int, int]:
        """Cut ``text`` after ``limit`` tokens, as it is written: ``(text, kept tokens, tokens cut off)``."""
        encoded = self._plain(text, return_offsets_mapping=True)
        count = len(encoded.input_ids)
        if count <= limit:
            return text, count, 0
        return text[: encoded.offset_mapping[limit - 1][1]], limit, count - limit

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text by itself."""
        return [len(ids) for ids in self._plain(texts).input_ids]

    def decode(self, token_ids: list[int]) -> str:
        """Decode generated ids without control tokens; spaces stay as generated."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Encode the joined segments; only those marked trusted may hold control tokens."""
        untrusted = "".join(text for text, trusted in segments if not trusted)
        if not self._special.search(untrusted):
            return self.tokenizer("".join(t for t, _ in segments), add_special_tokens=False).input_ids
        ids: list[int] = []
        plain, strip_next = "", False
        for text, trusted in segments:
            start = 0
            for match in self._special.finditer(text) if trusted else ():
                plain += text[start : match.start()]
                number, token = self._added[match.group()]
                plain = plain.lstrip() if strip_next else plain
                ids += self._plain(plain.rstrip() if token.lstrip else plain).input_ids
                ids.append(number)
                plain, strip_next, start = "", token.rstrip, match.end()
            plain += text[start:]
        return ids + self._plain(plain.lstrip() if strip_next else plain).input_ids

    def _plain(self, text: str | list[str], **kwargs):
        # verbose=False: transformers warns of texts over the model's length, which are cut after this.
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, **kwargs
        )


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token id lists to ``(ids, mask)``, both ``(B, T)``; mask is 1 on real tokens."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, pad_id, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    if side == "right" and device.type != "cpu":
        # To a multiple of 8: the matrix units of GPUs are several times slower on other shapes.
        more = -ids.shape[1] % 8
        ids, mask = F.pad(ids, (0, more), value=pad_id), F.pad(mask, (0, more))
    return ids.to(device), mask.to(device)
