"""A folder of saved memories, one file a sample of a data file."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.memory.files import read_header
from fastmem_pl.memory.memory import Memory


class MemoryFolder:
    """Memories by the index of their sample in the data, as files of the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, path: Path) -> Self:
        """The folder of memories at ``path``, or in the run folder there."""
        folder = path / "memories" if (path / "memories").is_dir() else path
        if not any(folder.glob("*.safetensors")):
            raise FastMemError(f"model.memories: no memories in {path}; make them with fastmem fit")
        return cls(folder)

    def file(self, index: int) -> Path:
        """The file of a sample."""
        return self.path / f"{index:06d}.safetensors"

    def headers(self, indices: Sequence[int], fingerprint: str | None = None) -> dict[int, dict[str, str]]:
        """Headers by index; those of damaged and missing files, or of another model, are left out."""
        headers = {}
        for index in indices:
            with suppress(FastMemError):
                headers[index] = read_header(self.file(index), fingerprint)
        return headers

    def check(
        self, index: int, sample_id: str, context_hash: str, fingerprint: str, settings: Mapping[str, Any]
    ) -> None:
        """Refuse a missing memory, or one of another model, context or settings."""
        path = self.file(index)
        if not path.is_file():
            raise FastMemError(
                f"no memory of sample {sample_id} in {self.path}; run fastmem fit on this data first"
            )
        header = read_header(path, fingerprint)
        made = json.loads(header["settings"])
        for name, value in settings.items():
            there = made.get(name, [])
            if value != there:
                option = "model.published_quirks" if name == "published_quirks" else f"model.memorize.{name}"
                raise FastMemError(
                    f"{option}: {_shown(value)}, but the memories in {self.path} were made with "
                    f"{_shown(there)}; give --{option} {_shown(there)}, or run fastmem fit again"
                )
        if header.get("context_hash") != context_hash:
            raise FastMemError(
                f"memory {path} is of another context than sample {sample_id}'s; "
                "run fastmem fit on this data first"
            )

    def load(self, indices: Sequence[int], fingerprint: str, device: torch.device) -> Memory:
        """Read the memories of these samples as the rows of one."""
        return Memory.stack([Memory.load(self.file(index), fingerprint, device) for index in indices])


def _shown(value: Any) -> str:
    """A setting as the command line takes it."""
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
