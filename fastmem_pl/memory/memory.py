"""What memorizing leaves behind, in process and on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.errors import FastMemError

FORMAT_VERSION = "2"


@dataclass
class Curve:
    """One value a step, taken before that step's update, as the paper reports them.

    ``kl_coeff`` is kept where it is adapted from step to step.
    """

    cross_entropy: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    kl_coeff: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float | None]]:
        """The lists by name, for JSON: values that are not finite become ``None``."""
        return {
            field.name: [value if math.isfinite(value) else None for value in getattr(self, field.name)]
            for field in fields(self)
            if field.name != "kl_coeff" or self.kl_coeff
        }

    @classmethod
    def from_dict(cls, values: dict[str, list[float | None]]) -> Curve:
        """Inverse of :meth:`as_dict`."""
        return cls(**{n: [math.nan if v is None else v for v in values[n]] for n in values})


@dataclass
class Memory:
    """Memorized contexts: one row a sample.

    Attributes:
        deltas: per trained layer (lowest first) ``{"gate": (B, F, D), "up": (B, F, D), "down": (B, D, F)}``.
        curves: one a row.
        status: ``"ok"`` or what failed, one a row; a failed row holds zero deltas (the base model).
        settings: those of memorizing.
        fingerprint: of the backbone that the deltas belong to.
        context_hash: of the memorized token ids, on a memory loaded from a file that states it.
    """

    deltas: list[dict[str, Tensor]]
    curves: list[Curve]
    status: list[str]
    settings: dict[str, Any]
    fingerprint: str
    context_hash: str | None = None

    def __len__(self) -> int:
        return len(self.curves)

    @property
    def num_layers(self) -> int:
        """Trained layers."""
        return len(self.deltas)

    def rows(self, indices: Sequence[int]) -> Memory:
        """Pick rows, repeats allowed: ``memory.rows([0, 0])`` serves two questions on one context."""
        index = torch.tensor(indices, device=next(iter(self.deltas[0].values())).device)
        return Memory(
            [{n: t.index_select(0, index) for n, t in layer.items()} for layer in self.deltas],
            [self.curves[i] for i in indices],
            [self.status[i] for i in indices],
            self.settings,
            self.fingerprint,
        )

    def to(self, dtype: torch.dtype) -> Memory:
        """The same memory with deltas of another type."""
        return replace(self, deltas=[{n: t.to(dtype) for n, t in layer.items()} for layer in self.deltas])

    @classmethod
    def stack(cls, memories: Sequence[Memory]) -> Memory:
        """Join memories of one backbone into one batch."""
        first = memories[0]
        return cls(
            [
                {name: torch.cat([m.deltas[layer][name] for m in memories]) for name in first.deltas[layer]}
                for layer in range(first.num_layers)
            ],
            [curve for m in memories for curve in m.curves],
            [status for m in memories for status in m.status],
            first.settings,
            first.fingerprint,
        )

    def save(self, path: str | Path, row: int = 0, dtype: torch.dtype = torch.float32, **extra: str) -> None:
        """Write one row as a safetensors file; a reader sees the whole file or none.

        Args:
            path: of the file.
            row: which sample.
            dtype: of the stored deltas. Products with a memory run in the backbone's compute type, so
                storing that type loses nothing for answering.
            extra: further text for the header.

        Raises:
            FastMemError: when the file cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        tensors = {
            f"{layer}.{name}": tensor[row].detach().to("cpu", dtype).contiguous()
            for layer, deltas in enumerate(self.deltas)
            for name, tensor in deltas.items()
        }
        header = {
            "format": "fastmem",
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "settings": json.dumps(self.settings),
            "curve": json.dumps(self.curves[row].as_dict()),
            "status": self.status[row],
            **extra,
        }
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                file.write(save(tensors, metadata=header))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise FastMemError(f"cannot write the memory {path}: {error.strerror}") from error

    @classmethod
    def load(
        cls, path: str | Path, fingerprint: str | None = None, device: str | torch.device = "cpu"
    ) -> Memory:
        """Read one memory (nothing in the file is executed).

        Args:
            path: of the file.
            fingerprint: refuse a memory of another backbone.
            device: where to put the deltas.

        Raises:
            FastMemError: when the file is missing, damaged, or belongs to another model.
        """
        with _opened(path, fingerprint) as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            num_layers = 1 + max(int(name.split(".", 1)[0]) for name in tensors)
            deltas: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
            for name, tensor in tensors.items():
                layer, part = name.split(".", 1)
                deltas[int(layer)][part] = tensor.to(device)[None]
            return cls(
                deltas,
                [Curve.from_dict(json.loads(header["curve"]))],
                [header["status"]],
                json.loads(header["settings"]),
                header["fingerprint"],
                header.get("context_hash"),
            )
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise FastMemError(f"memory {path} is damaged ({error!r}); memorize it again") from error


def read_header(path: str | Path, fingerprint: str | None = None) -> dict[str, str]:
    """Read the header of a memory file, not its tensors.

    Args:
        path: of the file.
        fingerprint: refuse a memory of another backbone.

    Raises:
        FastMemError: when the file is missing, damaged, or belongs to another model.
    """
    with _opened(path, fingerprint) as file:
        return file.metadata()


@contextmanager
def _opened(path: str | Path, fingerprint: str | None) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FastMemError(f"no such memory: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != "fastmem" or header.get("version") != FORMAT_VERSION:
                raise FastMemError(f"{path} is not a FastMem memory of format version {FORMAT_VERSION}")
            if fingerprint is not None and header.get("fingerprint") != fingerprint:
                raise FastMemError(
                    f"memory {path} belongs to another model: its fingerprint is "
                    f"{header.get('fingerprint')}, this model's {fingerprint}"
                )
            yield file
    except (SafetensorError, OSError) as error:
        raise FastMemError(
            f"memory {path} is damaged ({error}); memorize it again with fastmem fit"
        ) from error
