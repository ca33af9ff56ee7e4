"""What an export states of itself, and the measure of what it loses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone, Delta
from fastmem_pl.errors import FastMemError
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
        """Leave it as ``export.json``."""
        (folder / "export.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n")

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


class Loss:
    """Measures what an approximation of a memory of one row loses.

    Args:
        memory: the exact one.
        backbone: its model.
        context: what was memorized, where the memory does not hold it.

    Raises:
        FastMemError: when the memory is of another model, or the text another.
    """

    def __init__(self, memory: Memory, backbone: Backbone, context: str | None = None) -> None:
        if len(memory) != 1:
            raise FastMemError(f"export: the memory has {len(memory)} rows; take one, memory.rows([i])")
        memory.check(backbone)
        self.memory = memory
        self._probe: ContextProbe | None = None
        if context is not None or memory.texts[0] is not None:
            limit = memory.settings.get("max_context_tokens", 7500)
            memorizer = Memorizer(backbone, num_layers=memory.num_layers, max_context_tokens=limit)
            self._probe = ContextProbe(memorizer, memory, encoded_text(memory, memorizer, context))
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


def check_target(path: Path, force: bool, folder: bool) -> None:
    """Refuse to write over what exists, before anything is computed.

    Args:
        path: to write.
        force: replace a file, or a folder that an export wrote.
        folder: whether it will be one.

    Raises:
        FastMemError: when it exists and may not be replaced, or the folder around it does not.
    """
    if path.exists():
        if not force:
            raise FastMemError(f"{path} exists; give --force to replace it, or another --out")
        is_own = path.is_file() if not folder else path.is_dir() and _is_export(path)
        if not is_own:
            what = "folder that fastmem export did not write" if path.is_dir() else "file"
            raise FastMemError(f"{path} is a {what}, which --force does not replace; give another --out")
    if not path.absolute().parent.is_dir():
        raise FastMemError(f"there is no folder {path.absolute().parent} to write {path.name} into")


def _is_export(path: Path) -> bool:
    """Whether a folder holds an export, or nothing."""
    return not any(path.iterdir()) or (path / "export.json").is_file()


@contextmanager
def new_folder(path: Path, bytes_needed: int) -> Iterator[Path]:
    """A folder to write to that takes its place when all is written, and is removed when it is not.

    Raises:
        FastMemError: when there is no room, or it cannot be written.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if free < bytes_needed:
        raise FastMemError(
            f"cannot write {path}: it takes {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some disk or give another --out"
        )
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        partial.rename(path)
    except OSError as error:
        raise FastMemError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def as_matrix(parts: tuple[str, ...], deltas: Delta) -> Tensor:
    """The delta of a module whose rows are these projections, ``(out, in)`` float32."""
    return torch.cat([deltas[part][0] for part in parts]).float()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
