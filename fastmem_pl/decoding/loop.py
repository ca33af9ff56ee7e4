"""The decoding loop: one trunk pass per token, whatever is contrasted with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmem_pl.backbone import Delta
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding.answers import AnswerRows, Reader
from fastmem_pl.decoding.decoders import DecoderFactory, make_decoder
from fastmem_pl.decoding.graphs import GraphPool, Lease
from fastmem_pl.decoding.prefill import Prefill, Prefills
from fastmem_pl.decoding.sampling import TokenChooser
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.decoding.state import DecodeState, Views

# Tokens still to come from which copying the unfinished half of a batch pays: on a GPU a step is recorded
# anew for it (docs/LOG.md).
_PAYS_FROM = {"cpu": 4, "other": 128}


@dataclass(frozen=True)
class Generated:
    """One decoded answer.

    Attributes:
        token_ids: generated tokens, the end token included where one was produced.
        text: without control tokens, and cut before a stop text.
        details: what the decoder keeps beside it.
    """

    token_ids: list[int]
    text: str
    details: dict[str, Any] = field(default_factory=dict)


class Decoding:
    """One decode of ``B`` prompts in progress.

    On a GPU the host is always one token ahead of what it has seen, so the device never waits for it.

    Args:
        prefill: of the prompts.
        decoder: name in :data:`~fastmem_pl.decoding.decoders.DECODERS`, or what makes one.
        settings: of decoding.
        deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
        without_context: prefill of the prompts without their contexts, for decoders that look at it.
        keys: one number a row that its draws depend on; by default a hash of its prompt.
        graphs: recorded steps of earlier decodes with this backbone, to use again on a GPU.
        chooser: takes scores ``(B, V)`` to tokens ``(B,)`` in place of what the settings say.

    Raises:
        FastMemError: when the decoder needs a prefill that is not given.
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
        self.settings = settings
        self.decoder = make_decoder(decoder, settings, backbone)
        if self.decoder.needs_without_context and without_context is None:
            raise FastMemError(
                f"decoder {decoder!r} contrasts with the prompt without its context; give both"
            )
        needed = [n for n in self.decoder.early_layers if n <= backbone.num_blocks - prefill.num_layers]
        if not set(needed) <= set(prefill.trunk_layers):
            raise FastMemError(f"decoder {decoder!r} looks at layers {needed}; give them to the prefill")
        self._backbone = backbone
        self._prefills = [prefill] + ([without_context] if self.decoder.needs_without_context else [])
        # What steps write to must not be made under a surrounding inference_mode: graphs outlive it.
        with backbone.on_device(), torch.inference_mode(False):
            self._reader = Reader(len(prefill), backbone.device.type == "cuda")
            self._views = Views(backbone, prefill.num_layers, self.decoder, deltas)
            vocabulary = self._views.tail.head_weight.shape[0]
            self._chooser = chooser or TokenChooser(self.decoder, prefill, keys, vocabulary)
        recordable = backbone.recordable and chooser is None
        self._graphs = (GraphPool() if graphs is None else graphs) if recordable else None
        self._name = decoder
        self._lease: Lease | None = None
        # Tokens that are still to be chosen.
        self._left = self.decoder.max_new_tokens
        self._answers = AnswerRows(backbone, settings.stop, len(prefill))
        # Rows of the batch that are still being decoded.
        self._live = list(range(len(prefill)))

    def step(self) -> None:
        """Choose the next token of every row.

        Raises:
            FastMemError: after the last of ``max_new_tokens``.
        """
        if not self._left:
            limit = self.decoder.max_new_tokens
            raise FastMemError(f"this decode has its {limit} tokens; start another")
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            if self._lease is None:
                state = DecodeState.start(self._prefills, self._views, self._chooser, self._left)
                self._prefills = []
                self._lease = self._borrow(state)
            else:
                self._lease.step()
            self._left -= 1
            self._answers.add(self._live, self._reader.swap(self._lease.state.last))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, as far as the host has seen."""
        return not self._left or self._answers.ended(self._live)

    def run(self) -> list[Generated]:
        """Decode to the end."""
        while not self.finished:
            self.step()
            self._drop_ended_rows()
        results = self.results()
        # Others may have the recorded steps.
        self._lease, self._left = None, 0
        return results

    def texts(self) -> Iterator[str]:
        """Decode a single answer and yield its text piece by piece.

        Raises:
            FastMemError: for more than one prompt.
        """
        if len(self._live) != 1:
            raise FastMemError(f"only a single answer can be streamed, not {len(self._live)}")
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
        self._answers.add(self._live, self._reader.last())
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
        if self._graphs is None:
            return Lease(state, state.step)
        rooms = tuple(sequences.mask.shape[1] for sequences in state.sequences)
        early, without_memory = tuple(state.sequences[0].early), self._views.deltas is None
        # The tail is one of its backbone's, for one number of trained layers.
        key = (id(state.views.tail), self._name, self.settings, rooms, early, without_memory)
        return self._graphs.take(key, state)

    def _drop_ended_rows(self) -> None:
        """Go on with the rows that have not ended, when they are so few that it pays."""
        live = [row for row in self._live if not self._answers.ended([row])]
        pays = self._left >= _PAYS_FROM["cpu" if self._graphs is None else "other"]
        if not (live and 2 * len(live) <= len(self._live) and pays):
            return
        self._answers.add(self._live, self._reader.last())
        places = [self._live.index(row) for row in live]
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            state = self._lease.state.rows(torch.tensor(places, device=self._backbone.device))
            self._reader = Reader(len(live), self._backbone.device.type == "cuda")
            if self._graphs is not None:
                # The next batch is as large as this one was: its graphs stay.
                self._graphs = GraphPool()
            self._lease = self._borrow(state)
        self._live = live


class Decoded(NamedTuple):
    """Answers of a batch, and the seconds of the batch that they took."""

    answers: list[Generated]
    seconds: float
    prefill_seconds: float


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
    taken = [prefills.take(name) for name in forms]
    if rows is not None:
        taken = [prefill.expand(rows) for prefill in taken]
    return Decoding(taken[0], decoder, settings, deltas, *taken[1:], **options)


def decode(
    prefills: Prefills,
    decoder: str | DecoderFactory,
    settings: DecodingSettings,
    deltas: Sequence[Delta] | None = None,
    form: str = "prompt",
    part: str = "",
    **options: Any,
) -> Decoded:
    """Answer a batch of prompts by one decoder: the way of all answers from token ids to texts.

    Encode the prompts in every form that is read, share their :class:`Prefills` among the methods, and decode
    by each::

        prompts = {"prompt": [[1, 5, 7], [1, 9]], "without_context": [[1, 7], [1, 9]]}
        prefills = Prefills(backbone, prompts, memory.num_layers, {"prompt": early_layers}, meter)
        plain = decode(prefills, "greedy", settings)
        tuned = decode(prefills, "cad", settings, memory.deltas)
        seconds = (tuned.seconds + tuned.prefill_seconds) / len(tuned.answers)

    A trunk pass counts in full for each method that reads it, whichever came first.

    Args:
        decoder, settings, deltas: as :class:`Decoding` takes them.
        form: of the prompt that is answered.
        part: names the decode in the meter's entries, such as the method.
        options: ``rows``, how many memories answer a single prompt; ``keys`` and ``graphs`` of the decoding.
    """
    decoding = begin(prefills, decoder, settings, deltas, form, **options)
    with prefills.measure("decode", part) as timing:
        answers = decoding.run()
        lengths = [len(answer.token_ids) for answer in answers]
        timing.update(samples=len(answers), tokens=sum(lengths), steps=max(lengths))
    prefill_seconds = sum(prefills.seconds[name] for name in decoding.decoder.forms(form))
    return Decoded(answers, timing["seconds"], prefill_seconds)
