"""The decoding loop: one trunk pass per token, whatever is contrasted with what."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone, Delta
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.progress import report
from fastmem_pl.decoding.decoders import DecoderFactory, make_decoder
from fastmem_pl.decoding.graphs import GraphPool, Lease
from fastmem_pl.decoding.prefill import Prefill, Prefills
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.decoding.state import DecodeState, TokenChooser


@dataclass(frozen=True)
class Generated:
    """One decoded answer, and what the decoder keeps beside it."""

    token_ids: list[int]  # with the end token, where one was produced
    text: str  # without control tokens, cut before a stop text
    details: dict[str, Any] = field(default_factory=dict)


class AnswerRows:
    """The tokens of every answer as the host has seen them, with the decoder's notes, and where each ends."""

    def __init__(self, backbone: Backbone, stop: Sequence[str], num_rows: int) -> None:
        self._chat = backbone.chat
        # A control token is not part of any text, but its id is known.
        controls = {t.content: i for i, t in backbone.tokenizer.added_tokens_decoder.items() if t.special}
        self.stop_texts = [text for text in stop if text not in controls]
        self._end_ids = {*backbone.stop_ids, *(controls[t] for t in stop if t in controls)}
        # A character takes four tokens at most.
        self._window = 4 * max(map(len, self.stop_texts), default=0)
        self._done = [False] * num_rows
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        # Rows of the batch that are still being decoded.
        self.live = list(range(num_rows))
        self.tokens, self.notes = ([[] for _ in self.live] for _ in range(2))

    def take(self, last: Tensor | None = None) -> None:
        """Take tokens and notes ``(2, R)`` of the live rows: at once on a CPU, one step late from a GPU.

        Without any, wait for those that are still to come.
        """
        coming, self._coming = self._coming, None
        if last is not None and last.device.type == "cpu":
            self._add(last)
        elif last is not None:
            copy, event = torch.empty(last.shape, dtype=last.dtype, pin_memory=True), torch.cuda.Event()
            copy.copy_(last, non_blocking=True)
            event.record()
            self._coming = copy, event
        if coming is not None:
            coming[1].synchronize()
            self._add(coming[0])

    def open_rows(self) -> list[int]:
        """Live rows that have not come to their end."""
        return [row for row in self.live if not self._done[row]]

    def text(self, row: int) -> str:
        """An answer without control tokens, cut before a stop text."""
        return self._before_stop(self.tokens[row])[0]

    def _add(self, last: Tensor) -> None:
        for row, token, note in zip(self.live, *last.tolist(), strict=True):
            if not self._done[row]:
                self.tokens[row].append(token)
                self.notes[row].append(note)
                # A stop text is in the last tokens, as many as its characters may take.
                stops = self.stop_texts and self._before_stop(self.tokens[row][-self._window :])[1]
                self._done[row] = token in self._end_ids or bool(stops)

    def _before_stop(self, tokens: list[int]) -> tuple[str, bool]:
        """The text of tokens up to a stop text, and whether there is one."""
        text = self._chat.decode(tokens)
        places = [text.find(stop) for stop in self.stop_texts]
        end = min((place for place in places if place >= 0), default=len(text))
        return text[:end], end < len(text)


class Decoding:
    """One decode of ``B`` prompts in progress; on a GPU, the device never waits for the host.

    Args:
        decoder: name in :data:`~fastmem_pl.decoding.decoders.DECODERS`, or what makes a decoder.
        deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
        without_context: prefill of the prompts without their contexts, for decoders that look at it.
        keys: one number a row that its draws depend on; by default a hash of its prompt.
        graphs: recorded steps of earlier decodes with this backbone, to use again on a GPU.
        chooser: takes scores ``(B, V)`` to tokens ``(B,)`` in place of what the settings say.
    """

    def __init__(
        self,
        prefill: Prefill,
        decoder: str | DecoderFactory,
        settings: DecodingSettings,
        deltas: Sequence[Delta] | None = None,
        without_context: Prefill | None = None,
        keys: Sequence[int] | None = None,
        graphs: GraphPool | None = None,
        chooser: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        backbone = prefill.backbone
        self.decoder = make_decoder(decoder, settings, backbone)
        if self.decoder.needs_without_context and without_context is None:
            raise FastMemError(f"decoder {decoder!r} contrasts with the prompt without its context; give it")
        needed = [n for n in self.decoder.early_layers if n <= backbone.num_blocks - prefill.num_layers]
        if not set(needed) <= set(prefill.trunk_layers):
            raise FastMemError(f"decoder {decoder!r} looks at layers {needed}; give them to the prefill")
        self._backbone, self._name, self._settings = backbone, decoder, settings
        self._prefills = [prefill] + ([without_context] if self.decoder.needs_without_context else [])
        self._deltas, self._keys, self._chooser = deltas, keys, chooser
        recordable = backbone.recordable and chooser is None
        self._graphs = (GraphPool() if graphs is None else graphs) if recordable else None
        self._lease: Lease | None = None
        # Tokens that are still to be chosen.
        self._left = self.decoder.max_new_tokens
        self._answers = AnswerRows(backbone, settings.stop, len(prefill))

    def step(self) -> None:
        """Choose the next token of every row; refused after the last of ``max_new_tokens``."""
        if not self._left:
            raise FastMemError(f"this decode has its {self.decoder.max_new_tokens} tokens; start another")
        # What steps write to must not be made under a surrounding inference_mode: graphs outlive it.
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            if self._lease is None:
                chooser = self._chooser or TokenChooser(self.decoder, self._prefills[0], self._keys)
                state = DecodeState(self._prefills, self.decoder, self._deltas, chooser)
                self._prefills = []
                self._lease = self._borrow(state)
            else:
                self._lease.step()
            self._left -= 1
            self._answers.take(self._lease.state.last)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, as far as the host has seen."""
        return not self._left or not self._answers.open_rows()

    def run(self) -> list[Generated]:
        """Decode to the end."""
        while not self.finished:
            self.step()
            report("answering", self.decoder.max_new_tokens - self._left, self.decoder.max_new_tokens)
            self._drop_ended_rows()
        results = self.results()
        # Others may have the recorded steps.
        self._lease, self._left = None, 0
        return results

    def texts(self) -> Iterator[str]:
        """Decode a single answer and yield its text piece by piece."""
        if len(self._answers.live) != 1:
            raise FastMemError(f"only a single answer can be streamed, not {len(self._answers.live)}")
        # A piece that may be the start of a stop text waits for the next token.
        held = max((len(text) - 1 for text in self._answers.stop_texts), default=0)
        shown = ""
        while not self.finished:
            self.step()
            text = self._answers.text(0).rstrip("\ufffd")
            text = text[: max(0, len(text) - held)]
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        yield self.results()[0].text[len(shown) :]

    def results(self) -> list[Generated]:
        """The answers so far."""
        self._answers.take()
        return [
            Generated(tokens, self._answers.text(row), self.decoder.details(notes))
            for row, (tokens, notes) in enumerate(zip(self._answers.tokens, self.notes, strict=True))
        ]

    @property
    def notes(self) -> list[list[float]]:
        """The decoder's note to every token, by row."""
        note = self.decoder.note
        if note is None or not note.is_floating_point():
            return self._answers.notes
        return [np.array(row, np.int64).view(np.float64).tolist() for row in self._answers.notes]

    def _borrow(self, state: DecodeState) -> Lease:
        if self._graphs is None or not all(sequences.fixed for sequences in state.sequences):
            return Lease(state, state.step)
        rooms = tuple(sequences.mask.shape[1] for sequences in state.sequences)
        early, without_memory = tuple(state.sequences[0].early), state.views.deltas is None
        # The tail is one of its backbone's, for one number of trained layers.
        experts = None if without_memory else state.views.deltas[0]["down"].shape
        key = (id(state.views.tail), self._name, self._settings, rooms, early, without_memory, experts)
        return self._graphs.take(key, state)

    def _drop_ended_rows(self) -> None:
        """Go on with the rows that have not ended, when they are so few that it pays."""
        before, live = self._answers.live, self._answers.open_rows()
        # Copying them pays for enough tokens to come: a step may be recorded anew for it (docs/LOG.md).
        pays = self._left >= (4 if self._graphs is None else 128)
        if not (live and 2 * len(live) <= len(before) and pays):
            return
        self._answers.take()
        self._answers.live = live
        if self._graphs is not None:
            # The next batch is as large as this one was: its graphs stay.
            self._graphs = GraphPool()
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            places = torch.tensor([before.index(row) for row in live], device=self._backbone.device)
            self._lease = self._borrow(self._lease.state.rows(places))


def begin(
    prefills: Prefills,
    decoder: str | DecoderFactory,
    settings: DecodingSettings,
    deltas: Sequence[Delta] | None = None,
    form: str = "prompt",
    rows: int | None = None,
    **options: Any,
) -> Decoding:
    """A decode to take step by step or as a stream; arguments as :func:`decode`."""
    forms = make_decoder(decoder, settings, prefills.backbone).forms(form)
    prompt, *others = (prefills.take(name, rows) for name in forms)
    return Decoding(prompt, decoder, settings, deltas, *others, **options)


def decode(
    prefills: Prefills,
    decoder: str | DecoderFactory,
    settings: DecodingSettings,
    deltas: Sequence[Delta] | None = None,
    form: str = "prompt",
    part: str = "",
    **options: Any,
) -> tuple[list[Generated], float, float]:
    """Answer a batch of prompts by one decoder: the way of all answers from token ids to texts.

    ``part`` names the decode in the meter's entries, such as the method. ``options`` are ``rows``, how many
    memories answer a single prompt, and ``keys`` and ``graphs`` of the decoding. Returns the answers, the
    seconds of their decode, and those of the trunk passes, in full for each method that reads them.
    """
    decoding = begin(prefills, decoder, settings, deltas, form, **options)
    with prefills.measure("decode", part) as timing:
        answers = decoding.run()
        lengths = [len(answer.token_ids) for answer in answers]
        timing.update(samples=len(answers), tokens=sum(lengths), steps=max(lengths))
    prefill_seconds = sum(prefills.seconds[name] for name in decoding.decoder.forms(form))
    return answers, timing["seconds"], prefill_seconds
