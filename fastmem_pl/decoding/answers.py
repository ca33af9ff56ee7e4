"""What the host sees of a decode: tokens as they arrive, and where each answer ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone


class AnswerRows:
    """The tokens of every answer as the host has seen them, and where each ends.

    Attributes:
        tokens: by row, up to the end token or the token that completes a stop text.
        notes: the decoder's note to each of them.
        stop_texts: those that are no control tokens.
    """

    def __init__(self, backbone: Backbone, stop: Sequence[str], num_rows: int) -> None:
        self._chat = backbone.chat
        # A control token is not part of any text, but its id is known.
        controls = {t.content: i for i, t in backbone.tokenizer.added_tokens_decoder.items() if t.special}
        self.stop_texts = [text for text in stop if text not in controls]
        self._end_ids = {*backbone.stop_ids, *(controls[t] for t in stop if t in controls)}
        # A character takes four tokens at most.
        self._window = 4 * max(map(len, self.stop_texts), default=0)
        self._done = [False] * num_rows
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.notes: list[list[int]] = [[] for _ in range(num_rows)]

    def add(self, rows: Sequence[int], last: Sequence[Sequence[int]] | None) -> None:
        """Take one more token and note of some rows, if they have come; rows that ended stay as they are."""
        for row, token, note in zip(rows, *last, strict=True) if last else ():
            if not self._done[row]:
                self.tokens[row].append(token)
                self.notes[row].append(note)
                self._done[row] = token in self._end_ids or self._stops(self.tokens[row])

    def ended(self, rows: Sequence[int]) -> bool:
        """Whether all of these rows have come to their end."""
        return all(self._done[row] for row in rows)

    def text(self, row: int) -> str:
        """An answer without control tokens, cut before a stop text."""
        text = self._chat.decode(self.tokens[row])
        return text[: self._stop_place(text)]

    def _stops(self, tokens: list[int]) -> bool:
        """Whether a stop text ends here: it is in the last tokens, as many as its characters may take."""
        if not self.stop_texts:
            return False
        recent = self._chat.decode(tokens[max(0, len(tokens) - self._window) :])
        return self._stop_place(recent) < len(recent)

    def _stop_place(self, text: str) -> int:
        places = [text.find(stop) for stop in self.stop_texts]
        return min((place for place in places if place >= 0), default=len(text))


class Reader:
    """Brings what each step chose to the host: at once on a CPU, one step late from a GPU."""

    def __init__(self, num_rows: int, on_gpu: bool) -> None:
        self._slots = [torch.empty(2, num_rows, dtype=torch.long, pin_memory=True) for _ in range(2 * on_gpu)]
        self._events = [torch.cuda.Event() for _ in self._slots]
        self._sent = self._received = 0

    def swap(self, last: Tensor) -> list[list[int]] | None:
        """Send for the newest values, and return the next that have come."""
        if not self._slots:
            return last.tolist()
        slot = self._sent % 2
        self._slots[slot].copy_(last, non_blocking=True)
        self._events[slot].record()
        self._sent += 1
        return self.last() if self._sent - self._received > 1 else None

    def last(self) -> list[list[int]] | None:
        """Wait for the oldest values that were sent for and not returned yet."""
        if self._received == self._sent:
            return None
        slot = self._received % 2
        self._events[slot].synchronize()
        self._received += 1
        return self._slots[slot].tolist()
