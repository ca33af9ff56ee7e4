"""One memory of a text of any length: windows of it, memorized together or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from fastmem_pl.backbone import EncodedContext, Tail, TailInputs
from fastmem_pl.backbone.footprint import usable_bytes
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError
from fastmem_pl.memory.loss import MemorizationBatch, prepare
from fastmem_pl.memory.memorizer import Memorizer, context_hash
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import WindowSettings

# Tokens of one trunk pass, and of the activations that one backward pass goes through.
_TOKENS_AT_ONCE = 8192
# Stands between several texts where they are shown as one.
BETWEEN = "\n\n"


class DocumentFit:
    """Memorizes one text, or several, as one memory, update by update.

    Args:
        memorizer: of the model.
        texts: what to memorize; each text begins a window of its own.
        windows: how they are cut.

    Attributes:
        encoded: the windows.
        num_updates: to come in all.

    Raises:
        FastMemError: when there is nothing to memorize, or the policy does not fit the settings.
    """

    def __init__(
        self, memorizer: Memorizer, texts: str | Sequence[str], windows: WindowSettings | None = None
    ) -> None:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(text.strip() for text in texts):
            raise FastMemError("there is nothing to memorize; give texts that are not empty")
        self._memorizer, self._windows = memorizer, windows or WindowSettings()
        policy = self._windows.policy
        window, overlap = self._windows.resolved(memorizer.context_limit)
        chat = memorizer.backbone.chat
        if policy == "cut":
            self.encoded = [chat.context(texts[0], window)]
            skipped = sum(chat.count_tokens(texts[1:])) if texts[1:] else 0
            self.encoded[0] = replace(self.encoded[0], truncated=self.encoded[0].truncated + skipped)
        else:
            self.encoded = [part for text in texts for part in chat.windows(text, window, overlap)]
        if not all(part.header_length < len(part.input_ids) for part in self.encoded):
            raise FastMemError(f"window: {window} leaves windows without a token to learn; give a larger one")
        self._texts = texts
        self._layout = {**asdict(self._windows), "window": window, "overlap": overlap}
        # To find the texts again in the one that is kept.
        self._layout["lengths"] = [len(text) for text in texts]
        settings = memorizer.settings
        if policy == "joint" and len(self.encoded) > 1 and settings.num_layers > 1:
            raise FastMemError(
                f"windows: joint trains one layer, not num_layers {settings.num_layers}, where a text takes "
                f"{len(self.encoded)} windows; use sequential"
            )
        self._passes = len(self.encoded) if policy == "sequential" else 1
        self.num_updates = settings.steps * self._passes
        self._module: MemorizationModule | None = None
        self._earlier: list[Curve] = []
        self._done = 0

    @property
    def num_done(self) -> int:
        """Updates taken."""
        return self._done

    @property
    def num_tokens(self) -> int:
        """Tokens of the text that are memorized."""
        return sum(part.context_tokens for part in self.encoded)

    def run(self) -> Iterator[int]:
        """Take the updates one by one; yields how many are done. It may be left before the end.

        Raises:
            FastMemError: when they have been taken, or the activations have no room.
        """
        if self._done:
            raise FastMemError("this fit has taken its updates; start another")
        memorizer, steps = self._memorizer, self._memorizer.settings.steps
        groups = [[part] for part in self.encoded] if self._passes > 1 else [self.encoded]
        memory: Memory | None = None
        for group in groups if steps else ():
            with memorizer.backbone.numerics(grad=True):
                parts = self._parts(group)
                module = MemorizationModule(
                    memorizer.backbone, 1, memorizer.settings, start=memory, dense_gradients=len(parts) > 1
                )
            self._module = module
            updates = memorizer.run(module, parts, steps)
            while True:
                with memorizer.backbone.numerics(grad=True):
                    if next(updates, None) is None:
                        break
                self._done += 1
                yield self._done
            memory = module.memory()
            if len(groups) > 1:
                self._earlier.append(memory.curve)
                if memory.status[0] != "ok":
                    return

    def memory(self) -> Memory:
        """The memory of the updates so far."""
        memorizer = self._memorizer
        with memorizer.backbone.numerics():
            module = self._module or MemorizationModule(memorizer.backbone, 1, memorizer.settings)
            memory = module.memory()
            # The module may go on training its own.
            memory.deltas = [{n: t.clone() for n, t in layer.items()} for layer in memory.deltas]
        if self._passes > 1:
            going = [] if len(self._earlier) * memorizer.settings.steps == self._done else memory.curves
            memory.curves = [_joined([*self._earlier, *going])]
        if self._passes == 1 and memory.status[0] == "ok":
            # Fewer updates are the beginning of more; of windows one after the other they are not.
            memory.settings["steps"] = self._done
        memory.texts = [BETWEEN.join(self._texts)]
        memory.context_hashes = [context_hash(self.encoded)]
        memory.windows = {
            **self._layout,
            "count": len(self.encoded),
            "tokens": self.num_tokens,
            "updates": self._done,
            "planned": self.num_updates,
        }
        return memory

    def _parts(self, group: Sequence[EncodedContext]) -> list[MemorizationBatch]:
        """The batches whose losses add up to one update's, on all windows of the group."""
        memorizer, budget = self._memorizer, self._memorizer.reference_budget()
        tail = memorizer.backbone.tail(memorizer.settings.num_layers)
        if len(group) == 1:
            return [memorizer.prepare(group)]
        self._check_room(tail)
        inputs, labels = self._read(group)
        total = len(labels)
        parts: list[MemorizationBatch] = []
        with memorizer.backbone.numerics():
            for start in range(0, total, _TOKENS_AT_ONCE):
                place = slice(start, start + _TOKENS_AT_ONCE)
                # Without attention above the trunk, windows are positions of one row like any others.
                row = TailInputs(inputs.residual[:, place], inputs.ffn_input[:, place])
                here = labels[None, place]
                batch = prepare(tail, row, here, torch.ones_like(here, dtype=torch.bool), budget)
                batch.weights = torch.full_like(batch.weights, 1 / total)
                budget -= sum(chunk.nbytes for chunk in batch.reference.chunks if chunk)
                if parts and parts[0].scratch.shape[0] >= batch.scratch.shape[0]:
                    batch.scratch = parts[0].scratch
                parts.append(batch)
        return parts

    def _check_room(self, tail: Tail) -> None:
        """Refuse a text whose activations, which stay for all updates, do not fit the free memory."""
        backbone = self._memorizer.backbone
        wide, narrow = (tail.ffns[0].shapes["up"][i] for i in (0, 1))
        size = backbone.compute_dtype.itemsize
        # Products with gate and up, what becomes of them, and the residual stream.
        needed = self.num_tokens * ((2 * size + 4) * wide + (2 * size + 8) * narrow)
        free = usable_bytes(backbone.device)
        if needed > free:
            raise OutOfMemoryError(
                f"windows: joint needs {needed / 1e9:.1f} GB for {self.num_tokens} tokens, "
                f"{free / 1e9:.1f} GB are free; use --windows sequential, or a shorter text"
            )

    def _read(self, group: Sequence[EncodedContext]) -> tuple[TailInputs, Tensor]:
        """The trunk's results at all positions that have a label, as one row, and the labels ``(N,)``."""
        longest = max(len(part.input_ids) for part in group)
        count = max(1, _TOKENS_AT_ONCE // longest)
        residuals, ffn_inputs, labels = [], [], []
        for start in range(0, len(group), count):
            read = self._memorizer.read(group[start : start + count])
            residuals.append(read.inputs.residual[read.label_mask])
            ffn_inputs.append(read.inputs.ffn_input[read.label_mask])
            labels.append(read.labels[read.label_mask])
        return TailInputs(torch.cat(residuals)[None], torch.cat(ffn_inputs)[None]), torch.cat(labels)


def encoded_text(memory: Memory, memorizer: Memorizer, text: str | None = None) -> list[EncodedContext]:
    """The windows that a memory of one row was made from.

    Args:
        memory: whose text and windows count.
        memorizer: with the settings of the memory.
        text: what was memorized, where the memory does not hold it.

    Raises:
        FastMemError: when the text is not known, or another was memorized.
    """
    text = memory.texts[0] if text is None else text
    if text is None:
        raise FastMemError("the memory does not hold its text; give the memorized text (--context FILE)")
    if memory.windows:
        layout = memory.windows
        windows = WindowSettings(layout["policy"], layout["window"], layout["overlap"])
        starts = [sum(layout["lengths"][:i]) + i * len(BETWEEN) for i in range(len(layout["lengths"]))]
        texts = [text[start : start + n] for start, n in zip(starts, layout["lengths"], strict=True)]
        encoded = DocumentFit(memorizer, [t for t in texts if t.strip()], windows).encoded
    else:
        encoded = [memorizer.encode(text)]
    if memory.context_hashes[0] not in (None, context_hash(encoded)):
        raise FastMemError("this is not the text that was memorized; give the one that was (--context FILE)")
    return encoded


def _joined(curves: Sequence[Curve]) -> Curve:
    """Curves of windows one after the other."""
    return Curve(
        *(
            [value for curve in curves for value in getattr(curve, name)]
            for name in ("cross_entropy", "kl", "grad_norm", "kl_coeff")
        )
    )
