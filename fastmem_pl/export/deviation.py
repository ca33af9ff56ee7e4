"""What an export states of itself, and the measure of what it loses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone, Delta, EncodedContext
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import MANIFEST
from fastmem_pl.memory import ContextProbe, Memorizer, Memory, encoded_text

_PACKAGES = ("fastmem-pl", "torch", "transformers", "peft", "safetensors")


@dataclass
class ExportReport:
    """What was written, and what of the memory it keeps.

    Attributes:
        to: ``lora``, ``checkpoint`` or ``memory``.
        path: of what was written.
        form: of the numbers in it.
        bytes: on disk.
        relative_error: norm of what the deltas lose, relative to theirs.
        kl: ``KL(exact memory || export)`` on the memorized text, nats a token; ``None`` where the text is
            not known.
        kl_base: the same for the base model, which holds nothing of the memory.
        rank: of low-rank forms.
        tried: ranks that ``auto`` looked at, with their KL.
        memory: what the export holds, to answer with.
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
        stated = {
            n: getattr(self, n) for n in ("to", "form", "rank", "bytes", "relative_error", "kl", "kl_base")
        }
        return {
            **stated,
            **({"tried": self.tried} if self.tried else {}),
            "model": self.memory.backbone,
            "fingerprint": self.memory.fingerprint,
            "settings": self.memory.settings,
            "packages": {name: _version(name) for name in _PACKAGES},
        }

    def write(self, folder: Path) -> None:
        """Leave it as ``export.json``, with the names of the files that are the export."""
        stated = {**self.as_dict(), "files": sorted(path.name for path in folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(stated, indent=2) + "\n")

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

    Args:
        memory: the exact one.
        backbone: its model.
        context: what was memorized, where the memory does not hold it.

    Attributes:
        encoded: the windows of the memorized text; empty where it is not known.

    Raises:
        FastMemError: when the memory is of another model, holds nothing, or the text is another.
    """

    def __init__(self, memory: Memory, backbone: Backbone, context: str | None = None) -> None:
        if len(memory) != 1:
            raise FastMemError(f"export: the memory has {len(memory)} rows; take one, memory.rows([i])")
        memory.check(backbone)
        if memory.status[0] != "ok":
            raise FastMemError(f"export: memorizing it {memory.status[0].split(';')[0]}; memorize it again")
        self.memory = memory
        self.encoded: list[EncodedContext] = []
        self._probe: ContextProbe | None = None
        if context is not None or memory.texts[0] is not None:
            limit = memory.settings.get("max_context_tokens", 7500)
            memorizer = Memorizer(backbone, num_layers=memory.num_layers, max_context_tokens=limit)
            self.encoded = encoded_text(memory, memorizer, context)
            self._probe = ContextProbe(memorizer, memory, self.encoded)
        self.kl_base = self.kl(None)

    @property
    def text_known(self) -> bool:
        """Whether KL can be measured."""
        return self._probe is not None

    def kl(self, deltas: list[Delta] | None) -> float | None:
        """KL from the exact memory on its text."""
        return None if self._probe is None else self._probe.kl(deltas)

    def relative_error(self, deltas: Sequence[Delta]) -> float:
        """Norm of the difference of the deltas, relative to theirs."""
        return relative_error(self.memory.deltas, deltas)


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
