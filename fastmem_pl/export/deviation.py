"""What an export states about itself, and the measure of what it loses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone, Delta, EncodedContext
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import MANIFEST, size_of
from fastmem_pl.memory import Memorizer, Memory, encoded_text
from fastmem_pl.memory.attach import spread
from fastmem_pl.memory.loss import predict

_PACKAGES = ("fastmem-pl", "torch", "transformers", "peft", "safetensors")
# Label tokens whose logits are formed together.
_LABELS = 512


@dataclass
class ExportReport:
    """What was written, and what of the memory it keeps.

    Attributes:
        to: ``lora``, ``checkpoint`` or ``memory``.
        path: file or folder that was written.
        form: of the numbers in it.
        bytes: on disk.
        relative_error: norm of what the deltas lose, relative to theirs.
        kl: ``KL(exact memory || export)`` on the memorized text, nats a token; ``None`` where the text is
            not known.
        kl_base: the same for the base model, which holds nothing of the memory.
        memory: what the export holds, to answer with.
        rank: of low-rank forms.
        tried: ranks that ``auto`` looked at, with their KL.
    """

    to: str
    path: Path
    form: str
    bytes: int
    relative_error: float
    kl: float | None
    kl_base: float | None
    memory: Memory
    rank: int | None = None
    tried: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for export.json."""
        stated = ("to", "form", "rank", "bytes", "relative_error", "kl", "kl_base")
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in stated},
            **({"tried": self.tried} if self.tried else {}),
            **{"model": memory.backbone, "fingerprint": memory.fingerprint, "settings": memory.settings},
            "packages": {name: _version(name) for name in _PACKAGES},
        }

    def lines(self) -> list[str]:
        """The same in words."""
        rank = f", rank {self.rank}" if self.rank else ""
        lines = [f"{self.path}: {self.to}, {self.form}{rank}, {self.bytes:,} bytes"]
        lines.append(f"relative error of the deltas: {self.relative_error:.2e}")
        if self.kl is None:
            lines.append("KL on the memorized text: not known, as the file does not hold it (--context FILE)")
        else:
            lines.append(
                f"KL from the exact memory on its text: {self.kl:.2e} nats a token (the base model's: "
                f"{self.kl_base:.2e})"
            )
        return lines


class Deviation:
    """Measures how far an approximation of a memory of one row is from it.

    The memorized text is ``context`` where the memory does not hold it.

    Attributes:
        encoded: the windows of the memorized text; empty where it is not known.
        kl_base: :meth:`kl` of the base model.

    Raises:
        FastMemError: when the memory is of another model, holds nothing, or the text is another.
    """

    def __init__(self, memory: Memory, backbone: Backbone, context: str | None = None) -> None:
        if len(memory) != 1:
            raise FastMemError(f"export: the memory has {len(memory)} rows; take one, memory.rows([i])")
        memory.check(backbone)
        if memory.status[0] != "ok":
            raise FastMemError(f"export: memorizing it {memory.status[0].split(';')[0]}; memorize it again")
        self._memory, self._backbone = memory, backbone
        self._tail = backbone.tail(memory.num_layers)
        self.encoded: list[EncodedContext] = []
        if context is not None or memory.texts[0] is not None:
            limit = memory.settings["max_context_tokens"]
            memorizer = Memorizer(backbone, num_layers=memory.num_layers, max_context_tokens=limit)
            self.encoded = encoded_text(memory, memorizer, context)
            with backbone.numerics():
                read = list(memorizer.read_windows(self.encoded))
                self._groups = [(inputs, self._tail.base(inputs), mask) for inputs, _, mask in read]
                self._labels = torch.cat([labels[mask] for _, labels, mask in read])
                self._exact = self._hidden(memory.deltas)
        self.kl_base = self.kl(None)

    def kl(self, deltas: Sequence[Delta] | None) -> float | None:
        """``KL(p_memory || p_other)``, nats a token, averaged over the label tokens of the memorized text.

        The other's ``deltas`` are ``(1, out, in)`` each, by layer; ``None`` stands for the base model. The
        result is ``None`` where the text is not known.
        """
        if not self.encoded:
            return None
        tail, total = self._tail, 0.0
        with self._backbone.numerics():
            changes = self._hidden(deltas) - self._exact
            for start in range(0, len(changes), _LABELS):
                place = slice(start, start + _LABELS)
                hidden = self._exact[place]
                ones = hidden.new_ones(len(hidden))
                out = tail.head_weight.new_empty(len(hidden), tail.head_weight.shape[0])
                _, kl = predict(tail, hidden, self._labels[place]).loss(tail, changes[place], ones, ones, out)
                total += kl.sum().item()
        # Rounding may leave a tiny negative sum where nothing differs.
        return max(total, 0.0) / len(changes)

    def _hidden(self, deltas: Sequence[Delta] | None) -> Tensor:
        """The head's input at all label tokens, ``(N, D)``."""
        backbone, parts = self._backbone, []
        # Cast once: a copy for every row would be made of what is cast after it is expanded.
        cast = deltas and [
            {n: t.to(backbone.device, backbone.compute_dtype) for n, t in layer.items()} for layer in deltas
        ]
        for inputs, base, mask in self._groups:
            served = cast and [spread(layer, len(mask)) for layer in cast]
            parts.append(self._tail.hidden(inputs, base, served)[mask])
        return torch.cat(parts)

    def report(
        self, to: str, out: Path, form: str, deltas: list[Delta], written: Path | None = None, **further: Any
    ) -> ExportReport:
        """What an export states that holds these deltas.

        ``written`` is the folder that takes the place of ``out``; it gets the statement as ``export.json``.
        ``further`` are ``kl``, where it is not that of the deltas, ``rank`` and ``tried``.
        """
        if "kl" not in further:
            further["kl"] = self.kl(deltas)
        report = ExportReport(
            to=to,
            path=out,
            form=form,
            bytes=size_of(written or out),
            relative_error=relative_error(self._memory.deltas, deltas),
            kl_base=self.kl_base,
            memory=replace(self._memory, deltas=deltas),
            **further,
        )
        if written is not None:
            # With the names of the files that are the export, so that it can be replaced.
            stated = {**report.as_dict(), "files": sorted(path.name for path in written.iterdir())}
            (written / MANIFEST).write_text(json.dumps(stated, indent=2) + "\n")
        return report


def relative_error(exact: Sequence[Delta], other: Sequence[Delta]) -> float:
    """Norm of the difference of deltas, relative to that of the exact ones."""
    pairs = [(a[name].float(), b[name].float()) for a, b in zip(exact, other, strict=True) for name in a]

    def square(tensor: Tensor) -> float:
        return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2

    whole = sum(square(a) for a, _ in pairs)
    return (sum(square(a - b.to(a.device)) for a, b in pairs) / whole) ** 0.5 if whole else 0.0


def as_matrix(parts: tuple[str, ...], deltas: Delta) -> Tensor:
    """The delta of a module whose rows are these projections, ``(out, in)`` float32."""
    return torch.cat([deltas[part][0] for part in parts]).float()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
