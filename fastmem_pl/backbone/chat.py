"""The two token sequences FastMem needs, from the chat pieces of a tokenizer's template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastmem_pl.backbone.template import (
    ChatTemplate,
    control_tokens,
    derive_pieces,
    pattern,
    unmarked_tokens,
)


@dataclass(frozen=True)
class ChatSettings:
    """How texts become token sequences.

    Args:
        template: use the tokenizer's chat template; off, prompts are plain text.
        system_prompt: text of a system turn before the question; none by default, as in the paper.
        template_kwargs: settings of the model's chat template, such as {enable_thinking: false} for Qwen3;
            what its own page lists for apply_chat_template.
    """

    template: bool = True
    system_prompt: str | None = None
    template_kwargs: dict[str, Any] | None = None


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
        templated, kwargs = self.settings.template and tokenizer.chat_template, self.settings.template_kwargs
        self.pieces = derive_pieces(tokenizer, templated, kwargs)
        self._control = pattern(control_tokens(tokenizer))
        self._unmarked = pattern(unmarked_tokens(tokenizer))
        self._added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        with_bos, without = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        self._bos = with_bos[: len(with_bos) - len(without)] if with_bos[-1:] == without[-1:] else []
        # A template that writes what the tokenizer adds must not bring a second one.
        bos = tokenizer.decode(self._bos)
        self.pieces = replace(
            self.pieces,
            start=self.pieces.start.removeprefix(bos),
            user_header=self.pieces.user_header.removeprefix(bos),
        )
        self._header = (self.pieces.start + self.pieces.assistant_header, True)
        opening = self.pieces.start + self.pieces.preamble + self.pieces.user_header
        self._opening = [(opening, True)]
        if self.settings.system_prompt:
            system = self.settings.system_prompt
            around = ChatTemplate(tokenizer, kwargs).system_turn() if templated else None
            self._opening += [(f"{system}\n\n", False)]
            if around:
                self._opening = [(around[0].removeprefix(bos), True), (system, False), (around[1], True)]

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
        header = self._bos + self.encode([self._header])
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
        ids = self.encode([self._header, (text, False), (self.pieces.end_of_turn, True)])
        return EncodedContext(self._bos + ids, len(self._bos + self.encode([self._header])), kept, cut)

    def prompt(self, user_text: str, answer_prefix: str = "") -> list[int]:
        """Encode a user turn, after a system turn if there is one, and the opened assistant turn."""
        end = (self.pieces.answer_start if answer_prefix else self.pieces.user_end, True)
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
        if not self._control.search(untrusted):
            return self.tokenizer("".join(t for t, _ in segments), add_special_tokens=False).input_ids
        ids: list[int] = []
        plain, strip_next = "", False
        for text, trusted in segments:
            start = 0
            for match in self._control.finditer(text) if trusted else ():
                plain += text[start : match.start()]
                number, token = self._added[match.group()]
                plain = plain.lstrip() if strip_next else plain
                ids += self._plain(plain.rstrip() if token.lstrip else plain).input_ids
                ids.append(number)
                plain, strip_next, start = "", token.rstrip, match.end()
            plain += text[start:]
        return ids + self._plain(plain.lstrip() if strip_next else plain).input_ids

    def _plain(self, text: str | list[str], **kwargs):
        looks = self._unmarked.search(text if isinstance(text, str) else "\n".join(text))
        tokenizer = self._literal if looks else self.tokenizer
        # verbose=False: transformers warns of texts over the model's length, which are cut after this.
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **kwargs)

    @cached_property
    def _literal(self) -> PreTrainedTokenizerBase:
        """The tokenizer with all control tokens marked as special, so that text can be kept from them.

        It takes a second or two, and few texts need it.
        """
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] |= bool(self._unmarked.fullmatch(token["content"]))
        state |= {"truncation": None, "padding": None}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token id lists to ``(ids, mask)``, both ``(B, T)``; mask is 1 on real tokens."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, pad_id, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    if side == "right" and device.type != "cpu":
        # To a multiple of 8: the matrix units of GPUs are several times slower on other shapes.
        more = -ids.shape[1] % 8
        ids, mask = F.pad(ids, (0, more), value=pad_id), F.pad(mask, (0, more))
    return ids.to(device), mask.to(device)
