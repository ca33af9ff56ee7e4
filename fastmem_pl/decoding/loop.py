"""The decoding loop: one trunk pass per token, whatever is contrasted with what."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastmem_pl.backbone import Backbone, Delta, TailInputs, fork
from fastmem_pl.backbone.backbone import pad
from fastmem_pl.decoding.decoders import DECODERS, Decoder, StepLogits
from fastmem_pl.decoding.sampling import TokenChooser
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.errors import FastMemError
from fastmem_pl.phases import PhaseMeter

# Looking whether all rows have stopped waits for the device, so elsewhere it is done every few tokens.
_STOP_CHECK_EVERY = {"cpu": 1, "other": 8}


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
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        num_layers: int = 1,
        early_layers: Sequence[int] = (),
    ) -> None:
        self.backbone = backbone
        self.num_layers = num_layers
        # Those above the first trained block depend on the memory and come from the tail.
        self.trunk_layers = [n for n in early_layers if n <= backbone.num_blocks - num_layers]
        self.ids, self.mask = pad(prompts, backbone.pad_id, "left", backbone.device)
        self.keys = [zlib.crc32(" ".join(map(str, prompt)).encode()) for prompt in prompts]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = positions[:, -1:] + 1
        self.cache = backbone.new_cache()
        # Filled by the blocks above the first trained FFN; empty for one trained layer.
        self.inputs = backbone.run_trunk(
            num_layers, self.ids, self.mask, positions, self.cache, self.trunk_layers
        ).last()

    def __len__(self) -> int:
        return self.mask.shape[0]


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
            with self._meter.measure("decode") as timing:
                self._kept[form] = self._make(form)
            self.seconds[form] = timing["seconds"]
        return self._kept[form]


class Continuation:
    """A prefill that grows token by token; the prefill itself stays as it was."""

    def __init__(self, prefill: Prefill) -> None:
        self._prefill = prefill
        self._cache = fork(prefill.cache)
        self._mask, self._position = prefill.mask, prefill.next_position
        self.inputs: TailInputs = prefill.inputs

    def advance(self, tokens: Tensor) -> None:
        """Read one more token ``(B,)`` of every row."""
        prefill = self._prefill
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(prefill), 1)], dim=1)
        self.inputs = prefill.backbone.run_trunk(
            prefill.num_layers,
            tokens[:, None],
            self._mask,
            self._position,
            self._cache,
            prefill.trunk_layers,
        )
        self._position = self._position + 1


class Decoding:
    """One decode of ``B`` prompts in progress.

    Args:
        prefill: of the prompts.
        decoder: name in :data:`~fastmem_pl.decoding.decoders.DECODERS`.
        settings: of decoding.
        deltas: one per trained layer with a row a prompt, or ``None`` for the base model.
        without_context: prefill of the prompts without their contexts, for decoders that look at it.
        keys: one number a row that its draws depend on; by default a hash of its prompt.

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
        penalty = settings.repetition_penalty
        self._backbone = backbone
        self._views = _Views(prefill, self.decoder, deltas)
        self._paths = [Continuation(prefill)]
        if self.decoder.needs_without_context:
            self._paths.append(Continuation(without_context))
        self._choose = TokenChooser(
            settings,
            self.decoder.repetition_penalty if penalty is None else penalty,
            prefill.ids,
            prefill.mask,
            prefill.keys if keys is None else keys,
            self.max_new_tokens,
        )
        # A stop text that is a control token is not part of any text, but can be told by its id.
        controls = {t.content: i for i, t in backbone.tokenizer.added_tokens_decoder.items() if t.special}
        self._stop_texts = [text for text in settings.stop if text not in controls]
        self._end_ids = {*backbone.stop_ids, *(controls[t] for t in settings.stop if t in controls)}
        self._stop_ids = torch.tensor(sorted(self._end_ids), device=backbone.device)
        # A character takes four tokens at most.
        self._window = 4 * max(map(len, self._stop_texts), default=0)
        self._ends: dict[int, int] = {}
        self._seen = [0] * len(prefill)
        self._ended = torch.zeros(len(prefill), dtype=torch.bool, device=backbone.device)
        self._tokens: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every row."""
        if self._tokens:
            for path in self._paths:
                path.advance(self._tokens[-1])
        logits = self._views.logits(*(path.inputs for path in self._paths))
        token = self._choose(self.decoder.scores(logits), len(self._tokens))
        self._tokens.append(token)
        self._ended |= torch.isin(token, self._stop_ids)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do; waits for the device."""
        if len(self._tokens) >= self.max_new_tokens or bool(self._ended.all()):
            return True
        return bool(self._stop_texts) and all(
            self._end(i, row) is not None for i, row in enumerate(self._all())
        )

    def run(self) -> list[Generated]:
        """Decode to the end."""
        interval = _STOP_CHECK_EVERY["cpu" if self._backbone.device.type == "cpu" else "other"]
        while True:
            self.step()
            count = len(self._tokens)
            if count >= self.max_new_tokens or (count % interval == 0 and self.finished):
                return self.results()

    def texts(self) -> Iterator[str]:
        """Decode a single answer and yield its text piece by piece.

        Raises:
            FastMemError: for more than one prompt.
        """
        if len(self._ended) != 1:
            raise FastMemError(f"only a single answer can be streamed, not {len(self._ended)}")
        # A piece that may be the start of a stop text waits for the next token.
        held = max((len(text) - 1 for text in self._stop_texts), default=0)
        shown = ""
        while True:
            self.step()
            text, done = self._text(self._rows()[0]), self.finished
            if not done:
                text = text.rstrip("\ufffd")
                text = text[: len(text) - held]
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if done:
                return

    def results(self) -> list[Generated]:
        """The answers so far."""
        rows = self._rows()
        details = self.decoder.details([len(row) for row in rows])
        return [Generated(row, self._text(row), extra) for row, extra in zip(rows, details, strict=True)]

    def _text(self, row: list[int]) -> str:
        text = self._backbone.chat.decode(row)
        return text[: self._stop_place(text)]

    def _all(self) -> list[list[int]]:
        return torch.stack(self._tokens, dim=1).tolist()

    def _rows(self) -> list[list[int]]:
        """Token ids by row, up to the end token or the token that completes a stop text."""
        return [row[: self._end(place, row)] for place, row in enumerate(self._all())]

    def _end(self, place: int, row: list[int]) -> int | None:
        """Number of tokens of a row that has come to its end, else ``None``.

        Tokens are looked at once: a stop text is searched for in the new ones and as many before as its
        characters may take, and what was found is kept.
        """
        seen = self._seen[place]
        while place not in self._ends and seen < len(row):
            seen += 1
            start = max(0, seen - self._window)
            recent = self._backbone.chat.decode(row[start:seen]) if self._stop_texts else ""
            if row[seen - 1] in self._end_ids or self._stop_place(recent) < len(recent):
                self._ends[place] = seen
        self._seen[place] = seen
        return self._ends.get(place)

    def _stop_place(self, text: str) -> int:
        places = [text.find(stop) for stop in self._stop_texts]
        return min((place for place in places if place >= 0), default=len(text))


class _Views:
    """The logits that one decoder looks at: with the memory, of the base model, of premature layers."""

    def __init__(self, prefill: Prefill, decoder: Decoder, deltas: Sequence[Delta] | None) -> None:
        self.backbone = backbone = prefill.backbone
        self.tail = backbone.tail(prefill.num_layers)
        self.decoder = decoder
        # Products with a memory run in the compute type: cast once, not at every token.
        self.deltas = deltas and [
            {name: tensor.to(backbone.compute_dtype) for name, tensor in layer.items()} for layer in deltas
        ]
        # bfloat16 products lose small changes, so memorized logits are the base's plus the head's product
        # with the change of the hidden state, whatever the decoder; float32 needs that only to contrast.
        exact = backbone.compute_dtype is torch.float32
        self.with_base = deltas is not None and (decoder.needs_base or not exact)
        # Keys and values of blocks above a trained FFN depend on the memory: one cache a view.
        upper = prefill.num_layers > 1
        self.caches: list[Cache | None] = [backbone.new_cache() if upper else None for _ in range(3)]

    def logits(self, inputs: TailInputs, without_context: TailInputs | None = None) -> StepLogits:
        """Logits ``(B, V)`` at the last position of the inputs."""
        tail = self.tail
        with self.backbone.numerics():
            base = tail.base(inputs)
            states = [s[:, -1] for s in tail.residuals(inputs, base, self.deltas, self.caches[0])]
            hidden = tail.final_norm(states[-1])
            if self.with_base:
                base_hidden = tail.hidden(inputs, base, None, self.caches[1])[:, -1]
                base_raw, change = tail.raw_logits(torch.stack([base_hidden, hidden - base_hidden]))
                model, base_logits = tail.finish_logits(base_raw + change), tail.finish_logits(base_raw)
            else:
                model = self._through_head(hidden)
                base_logits = model if self.deltas is None else None
            other = None
            if without_context is not None:
                other_base = tail.base(without_context)
                other = self._through_head(
                    tail.hidden(without_context, other_base, None, self.caches[2])[:, -1]
                )
            return StepLogits(model, base_logits, other, self._early(inputs, states))

    def _early(self, inputs: TailInputs, states: Sequence[Tensor]) -> Tensor | None:
        if not self.decoder.early_layers:
            return None
        first = self.tail.layers[0]
        hidden = [
            inputs.early[number][:, -1] if number <= first else states[number - first - 1]
            for number in self.decoder.early_layers
        ]
        return self._through_head(torch.stack([h.float() for h in hidden]))

    def _through_head(self, hidden: Tensor) -> Tensor:
        return self.tail.finish_logits(self.tail.raw_logits(hidden))
