"""One memory of a text of any length: windows of it, memorized together or one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch

from fastmem_pl.backbone import EncodedContext
from fastmem_pl.backbone.footprint import usable_bytes
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError
from fastmem_pl.memory.loss import MemorizationBatch
from fastmem_pl.memory.memorizer import Memorizer, context_hash, listed_texts
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import WindowSettings

# Stands between several texts where they are shown as one.
BETWEEN = "\n\n"


class DocumentFit:
    """Memorizes one text, or several, as one memory, update by update; see :func:`memorize_document`.

    ``encoded`` are the windows; ``num_done`` of ``num_updates`` are taken.
    """

    def __init__(
        self, memorizer: Memorizer, texts: str | Sequence[str], windows: WindowSettings | None = None
    ) -> None:
        self._memorizer, self._texts, chat = memorizer, listed_texts(texts), memorizer.backbone.chat
        windows = windows or WindowSettings()
        window, overlap = windows.resolved(memorizer.context_limit)
        first, *others = self._texts
        if windows.policy == "cut":
            encoded = chat.context(first, window)
            skipped = sum(chat.count_tokens(others)) if others else 0
            self.encoded = [replace(encoded, truncated=encoded.truncated + skipped)]
        else:
            self.encoded = [part for text in self._texts for part in chat.windows(text, window, overlap)]
        if not all(part.header_length < len(part.input_ids) for part in self.encoded):
            raise FastMemError(f"window: {window} leaves windows without a token to learn; give a larger one")
        self.num_tokens = sum(part.context_tokens for part in self.encoded)
        self._layout = {"policy": windows.policy, "window": window, "overlap": overlap}
        # To find the texts again in the one that is kept.
        self._layout["lengths"] = [len(text) for text in self._texts]
        settings = memorizer.settings
        if windows.policy == "joint" and len(self.encoded) > 1 and settings.num_layers > 1:
            raise FastMemError(
                f"windows: joint trains one layer, not num_layers {settings.num_layers}, where a text takes "
                f"{len(self.encoded)} windows; use sequential"
            )
        sequential = windows.policy == "sequential"
        self._groups = [[part] for part in self.encoded] if sequential else [self.encoded]
        self.num_updates, self.num_done = settings.steps * len(self._groups), 0
        self._module: MemorizationModule | None = None
        # Of the windows before the one in progress.
        self._earlier: list[Curve] = []

    def run(self) -> Iterator[int]:
        """Take the updates one by one; yields how many are done. It may be left before the end."""
        if self.num_done:
            raise FastMemError("this fit has taken its updates; start another")
        memorizer = self._memorizer
        for group in self._groups if self.num_updates else ():
            memory = self._module and self._module.memory()
            if memory:
                if memory.status[0] != "ok":
                    return
                self._earlier.append(memory.curve)
            parts = [memorizer.prepare(group, memory)] if len(group) == 1 else self._parts(group)
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
        curves = [*self._earlier, memory.curve]
        memory.curves = [Curve(*([v for c in curves for v in getattr(c, f.name)] for f in fields(Curve)))]
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
        read = self._memorizer.with_experts(list(self._memorizer.read_windows(group)))
        parts = [self._memorizer.prepare_read(*one, share=1 / len(read)) for one in read]
        total = sum(len(part.labels) for part in parts)
        scratch = max((part.scratch for part in parts), key=len)
        for part in parts:
            part.weights, part.scratch = torch.full_like(part.weights, 1 / total), scratch
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
    memorizer: Memorizer, texts: str | Sequence[str], windows: WindowSettings | None = None
) -> Memory:
    """Memorize a text of any length, or several, as one memory of one row.

    A text that fits one window is memorized as by ``memorizer(text)``; each begins a window of its own.
    """
    fit = DocumentFit(memorizer, texts, windows)
    for _ in fit.run():
        pass
    return fit.memory()


def encoded_text(memory: Memory, memorizer: Memorizer, text: str | None = None) -> list[EncodedContext]:
    """The windows that a memory of one row was made from; ``text`` where it does not hold its text."""
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
