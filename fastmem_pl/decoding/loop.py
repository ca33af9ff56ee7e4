"""The decoding loop: one trunk pass per token, whatever is contrasted with what."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from fastmem_pl.backbone import Backbone, Delta, pad
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.decoding.answers import AnswerRows, Reader
from fastmem_pl.decoding.decoders import DECODERS
from fastmem_pl.decoding.graphs import GraphPool, Lease
from fastmem_pl.decoding.sampling import TokenChooser
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.decoding.state import DecodeState, Path, Views

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


class Prefill:
    """The trunk's pass over a batch of prompts, from which several methods continue.

    The trunk and its KV cache are the same with and without memories, so methods share them.

    Args:
        backbone: the frozen model.
        prompts: token ids of ``B`` prompts.
        num_layers: trained layers of the memories that will be used.
        early_layers: numbers of the hidden states that decoders will look at.
        earlier: prefill of a prompt that began alike, which is used up: its KV cache becomes this one's.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        num_layers: int = 1,
        early_layers: Sequence[int] = (),
        earlier: Prefill | None = None,
    ) -> None:
        self.backbone = backbone
        self.num_layers = num_layers
        # Those above the first trained block depend on the memory and come from the tail.
        self.trunk_layers = [n for n in early_layers if n <= backbone.num_blocks - num_layers]
        self.num_tokens = sum(map(len, prompts))
        self.ids, self.mask = pad(prompts, backbone.pad_id, "left", backbone.device)
        self.keys = [zlib.crc32(" ".join(map(str, prompt)).encode()) for prompt in prompts]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = positions[:, -1:] + 1
        self.cache, known = self._beginning(earlier)
        # Filled by the blocks above the first trained FFN; empty for one trained layer.
        self.inputs = backbone.run_trunk(
            num_layers, self.ids[:, known:], self.mask, positions[:, known:], self.cache, self.trunk_layers
        ).last()

    def __len__(self) -> int:
        return self.mask.shape[0]

    def _beginning(self, earlier: Prefill | None) -> tuple[Cache, int]:
        """A KV cache, and how many tokens of the prompt it holds already."""
        # Blocks above a trained FFN need all of the prompt's hidden states, and windows slide on.
        fits = earlier is not None and len(earlier) == len(self) == self.num_layers == 1
        fits = fits and earlier.backbone is self.backbone
        if not (fits and all(type(layer) is DynamicLayer for layer in earlier.cache.layers)):
            return self.backbone.new_cache(), 0
        width = min(self.ids.shape[1] - 1, earlier.ids.shape[1])
        same = self.ids[0, :width] == earlier.ids[0, :width]
        known = int(same.int().cumprod(0).sum())
        cache, earlier.cache = earlier.cache, None
        if known < cache.get_seq_length():
            # A positive number has other meanings in other versions.
            cache.crop(known - cache.get_seq_length())
        return cache, known

    def path(self, max_new_tokens: int) -> Path:
        """Go on from the prompts; the prefill stays as it is."""
        return Path.of(self, max_new_tokens)


class PromptCache:
    """Keeps the last prompt's prefill, so that the next prompt's pass begins where the two differ.

    Questions about one text share all that comes before the question.
    """

    def __init__(self) -> None:
        self._last: Prefill | None = None

    def prefill(
        self, backbone: Backbone, prompt: Sequence[int], num_layers: int, early_layers: Sequence[int]
    ) -> Prefill:
        """The prefill of one prompt; the one before must not be used any more."""
        last, self._last = self._last, None
        self._last = Prefill(backbone, [prompt], num_layers, early_layers, last)
        return self._last


class PrefillCache:
    """Prefills of a batch by form of the prompt, made when they are first needed.

    Of the forms with contexts only the last one used is kept, as their KV caches are large.

    Args:
        make: makes the prefill of a form.
        meter: measures how long each takes, as part of decoding.
    """

    def __init__(self, make: Callable[[str], Prefill], meter: PhaseMeter) -> None:
        self._make, self._meter = make, meter
        self._kept: dict[str, Prefill] = {}
        self.seconds: dict[str, float] = {}

    def take(self, form: str) -> Prefill:
        """The prefill of one form."""
        if form not in self._kept:
            if form != "without_context":
                self._kept = {name: p for name, p in self._kept.items() if name == "without_context"}
            with self._meter.measure("decode", name="prefill", part=form) as timing:
                prefill = self._kept[form] = self._make(form)
                timing.update(samples=len(prefill), tokens=prefill.num_tokens)
            self.seconds[form] = timing["seconds"]
        return self._kept[form]


class Decoding:
    """One decode of ``B`` prompts in progress.

    On a GPU the host is always one token ahead of what it has seen, so the device never waits for it.

    Args:
        prefill: of the prompts.
        decoder: name in :data:`~fastmem_pl.decoding.decoders.DECODERS`.
        settings: of decoding.
        deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
        without_context: prefill of the prompts without their contexts, for decoders that look at it.
        keys: one number a row that its draws depend on; by default a hash of its prompt.
        graphs: recorded steps of earlier decodes with this backbone, to use again on a GPU.

    Raises:
        FastMemError: when the decoder needs a prefill that is not given.
    """

    def __init__(
        self,
        prefill: Prefill,
        decoder: str,
        settings: DecodingSettings,
        deltas: Sequence[Delta] | None = None,
        without_context: Prefill | None = None,
        keys: Sequence[int] | None = None,
        graphs: GraphPool | None = None,
    ) -> None:
        backbone = prefill.backbone
        self.settings = settings
        self.decoder = DECODERS[decoder](settings, backbone)
        if self.decoder.needs_without_context and without_context is None:
            raise FastMemError(
                f"decoder {decoder!r} contrasts with the prompt without its context; give both"
            )
        needed = [n for n in self.decoder.early_layers if n <= backbone.num_blocks - prefill.num_layers]
        if not set(needed) <= set(prefill.trunk_layers):
            raise FastMemError(f"decoder {decoder!r} looks at layers {needed}; give them to the prefill")
        self.max_new_tokens = self.decoder.max_new_tokens or settings.max_new_tokens
        self._backbone = backbone
        self._prefills = [prefill] + ([without_context] if self.decoder.needs_without_context else [])
        penalty = settings.repetition_penalty
        # What steps write to must not be made under a surrounding inference_mode: graphs outlive it.
        on_gpu = backbone.device.type == "cuda"
        with backbone.on_device(), torch.inference_mode(False):
            self._reader = Reader(len(prefill), on_gpu)
            self._views = Views(backbone, prefill.num_layers, self.decoder, deltas)
            self._chooser = TokenChooser(
                settings,
                self.decoder.repetition_penalty if penalty is None else penalty,
                prefill.ids,
                prefill.mask,
                prefill.keys if keys is None else keys,
                self.max_new_tokens,
                self._views.tail.head_weight.shape[0],
            )
        self._graphs = (GraphPool() if graphs is None else graphs) if backbone.recordable else None
        self._name = decoder
        self._lease: Lease | None = None
        self._count = 0
        self._answers = AnswerRows(backbone, settings.stop, len(prefill))
        # Rows of the batch that are still being decoded.
        self._live = list(range(len(prefill)))

    def step(self) -> None:
        """Choose the next token of every row.

        Raises:
            FastMemError: after the last of ``max_new_tokens``.
        """
        if self._count >= self.max_new_tokens:
            raise FastMemError(f"this decode has its {self.max_new_tokens} tokens; start another")
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            if self._lease is None:
                state = DecodeState.start(self._prefills, self._views, self._chooser, self.max_new_tokens)
                self._prefills = []
                self._lease = self._borrow(state)
            else:
                self._lease.step()
            self._count += 1
            read = self._reader.swap(self._lease.state.last)
        if read is not None:
            self._answers.add(self._live, *read)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, as far as the host has seen."""
        return self._count >= self.max_new_tokens or self._answers.ended(self._live)

    def run(self) -> list[Generated]:
        """Decode to the end."""
        while not self.finished:
            self.step()
            self._drop_ended_rows()
        results = self.results()
        # Others may have the recorded steps.
        self._lease, self._count = None, self.max_new_tokens
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
        read = self._reader.last()
        if read is not None:
            self._answers.add(self._live, *read)
        rows = range(len(self._answers.tokens))
        return [
            Generated(
                self._answers.tokens[row],
                self._answers.text(row),
                self.decoder.details(self._answers.notes[row]),
            )
            for row in rows
        ]

    @property
    def notes(self) -> list[list[int]]:
        """The decoder's note to every token, by row."""
        return self._answers.notes

    def _borrow(self, state: DecodeState) -> Lease:
        if self._graphs is None:
            return Lease(state, state.step)
        rooms = tuple(path.mask.shape[1] for path in state.paths)
        early, without_memory = tuple(state.paths[0].early), self._views.deltas is None
        # The tail is one of its backbone's, for one number of trained layers.
        key = (id(state.views.tail), self._name, self.settings, rooms, early, without_memory)
        return self._graphs.take(key, state)

    def _drop_ended_rows(self) -> None:
        """Go on with the rows that have not ended, when they are so few that it pays."""
        live = [row for row in self._live if not self._answers.ended([row])]
        shrinks = 2 * len(live) <= len(self._live)
        left = self.max_new_tokens - self._count
        if not (live and shrinks and left >= _PAYS_FROM["cpu" if self._graphs is None else "other"]):
            return
        read = self._reader.last()
        if read is not None:
            self._answers.add(self._live, *read)
        places = [self._live.index(row) for row in live]
        with self._backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            state = self._lease.state.rows(torch.tensor(places, device=self._backbone.device))
            self._reader = Reader(len(live), self._backbone.device.type == "cuda")
            if self._graphs is not None:
                # The next batch is as large as this one was: its graphs stay.
                self._graphs = GraphPool()
            self._lease = self._borrow(state)
        self._live = live
