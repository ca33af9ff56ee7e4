"""One memory of a text of any length: windows of it, memorized together or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fastmem_pl.backbone import EncodedContext, TailInputs
from fastmem_pl.backbone.footprint import usable_bytes
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError
from fastmem_pl.memory.loss import MemorizationBatch
from fastmem_pl.memory.memorizer import Memorizer, context_hash
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import WindowSettings

# Tokens whose activations one backward pass goes through.
_TOKENS_AT_ONCE = 8192
# Stands between several texts where they are shown as one.
BETWEEN = "\n\n"


class DocumentFit:
    """Memorizes one text, or several, as one memory, update by update; see :func:`memorize_document`.

    Attributes:
        encoded: the windows.
        num_updates: updates in all.
        num_done: updates taken.
    """

    def __init__(
        self, memorizer: Memorizer, texts: str | Sequence[str], windows: WindowSettings | None = None
    ) -> None:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(text.strip() for text in texts):
            raise FastMemError("there is nothing to memorize; give texts that are not empty")
        self._memorizer, chat = memorizer, memorizer.backbone.chat
        windows = windows or WindowSettings()
        window, overlap = windows.resolved(memorizer.context_limit)
        policy = windows.policy
        if policy == "cut":
            self.encoded = [chat.context(texts[0], window)]
            skipped = sum(chat.count_tokens(texts[1:])) if texts[1:] else 0
            self.encoded[0] = replace(self.encoded[0], truncated=self.encoded[0].truncated + skipped)
        else:
            self.encoded = [part for text in texts for part in chat.windows(text, window, overlap)]
        if not all(part.header_length < len(part.input_ids) for part in self.encoded):
            raise FastMemError(f"window: {window} leaves windows without a token to learn; give a larger one")
        self._texts = texts
        self._layout = {"policy": policy, "window": window, "overlap": overlap}
        # To find the texts again in the one that is kept.
        self._layout["lengths"] = [len(text) for text in texts]
        settings = memorizer.settings
        if policy == "joint" and len(self.encoded) > 1 and settings.num_layers > 1:
            raise FastMemError(
                f"windows: joint trains one layer, not num_layers {settings.num_layers}, where a text takes "
                f"{len(self.encoded)} windows; use sequential"
            )
        groups = [[part] for part in self.encoded] if policy == "sequential" else [self.encoded]
        self._groups = groups if settings.steps else []
        self.num_updates, self.num_done = settings.steps * len(groups), 0
        self._module: MemorizationModule | None = None
        # Of the windows before the one in progress.
        self._earlier: list[Curve] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of the text that are memorized."""
        return sum(part.context_tokens for part in self.encoded)

    def run(self) -> Iterator[int]:
        """Take the updates one by one; yields how many are done. It may be left before the end.

        Raises:
            OutOfMemoryError: when the activations have no room.
        """
        if self.num_done:
            raise FastMemError("this fit has taken its updates; start another")
        memorizer = self._memorizer
        for group in self._groups:
            memory = self._module and self._module.memory()
            if memory:
                if memory.status[0] != "ok":
                    return
                self._earlier.append(memory.curve)
            parts = [memorizer.prepare(group)] if len(group) == 1 else self._parts(group)
            self._module = memorizer.module_class(
                memorizer.backbone, 1, memorizer.settings, start=memory, dense_gradients=len(parts) > 1
            )
            for _ in memorizer.run(self._module, parts):
                self.num_done += 1
                yield self.num_done

    def memory(self) -> Memory:
        """The memory of the updates so far."""
        memorizer = self._memorizer
        memory = (self._module or memorizer.module_class(memorizer.backbone, 1, memorizer.settings)).memory()
        # The module may go on training its own.
        memory.deltas = [{n: t.clone() for n, t in layer.items()} for layer in memory.deltas]
        memory.curves = [Curve.joined([*self._earlier, memory.curve])]
        if len(self._groups) == 1 and memory.status[0] == "ok":
            # Fewer updates are the beginning of more; of windows one after the other they are not.
            memory.settings["steps"] = self.num_done
        memory.texts = [BETWEEN.join(self._texts)]
        memory.context_hashes = [context_hash(self.encoded)]
        counts = {"count": len(self.encoded), "tokens": self.num_tokens}
        memory.windows = {**self._layout, **counts, "updates": self.num_done, "planned": self.num_updates}
        return memory

    def _parts(self, group: Sequence[EncodedContext]) -> list[MemorizationBatch]:
        """The batches whose losses add up to one update's, on all windows of the group."""
        self._check_room()
        read = list(self._memorizer.read_windows(group))
        with self._memorizer.backbone.numerics():
            residual = torch.cat([inputs.residual for inputs, _, _ in read], 1)
            ffn_input = torch.cat([inputs.ffn_input for inputs, _, _ in read], 1)
            labels = torch.cat([predicted for _, predicted, _ in read], 1)
        del read
        total, kept_bytes = labels.shape[1], 0
        parts: list[MemorizationBatch] = []
        for start in range(0, total, _TOKENS_AT_ONCE):
            place = slice(start, start + _TOKENS_AT_ONCE)
            row, here = TailInputs(residual[:, place], ffn_input[:, place]), labels[:, place]
            every = torch.ones_like(here, dtype=torch.bool)
            batch = self._memorizer.prepare_read(row, here, every, kept_bytes)
            batch.weights = torch.full_like(batch.weights, 1 / total)
            kept_bytes += sum(prediction.nbytes for prediction in batch.predictions if prediction)
            if parts and parts[0].scratch.shape[0] >= batch.scratch.shape[0]:
                batch.scratch = parts[0].scratch
            parts.append(batch)
        return parts

    def _check_room(self) -> None:
        """Refuse a text whose activations, which stay for all updates, do not fit the free memory."""
        backbone = self._memorizer.backbone
        wide, narrow = (backbone.tail().ffns[0].shapes["up"][i] for i in (0, 1))
        size = backbone.compute_dtype.itemsize
        # Products with gate and up, what becomes of them, and the residual stream.
        needed = self.num_tokens * ((2 * size + 4) * wide + (2 * size + 8) * narrow)
        free = usable_bytes(backbone.device)
        if needed > free:
            raise OutOfMemoryError(
                f"windows: joint needs {needed / 1e9:.1f} GB for {self.num_tokens} tokens, "
                f"{free / 1e9:.1f} GB are free; use --windows sequential, or a shorter text"
            )


def memorize_document(
    memorizer: Memorizer,
    texts: str | Sequence[str],
    windows: WindowSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Memory:
    """Memorize a text of any length, or several, as one memory.

    Args:
        memorizer: of the model.
        texts: what to memorize; each text begins a window of its own.
        windows: how they are cut.
        progress: called with the number of updates done and of all, after each.

    Returns:
        a memory of one row. Of a text that fits one window, the same as that of ``memorizer(text)``.

    Raises:
        FastMemError: when there is nothing to memorize, or the policy does not fit the settings.
    """
    fit = DocumentFit(memorizer, texts, windows)
    for done in fit.run():
        if progress:
            progress(done, fit.num_updates)
    return fit.memory()


def encoded_text(memory: Memory, memorizer: Memorizer, text: str | None = None) -> list[EncodedContext]:
    """The windows that a memory of one row was made from; ``text`` where it does not hold its text.

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
