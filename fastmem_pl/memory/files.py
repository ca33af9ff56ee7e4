"""Memory files: safetensors with a header, a digest over both, and several forms of the deltas.

Nothing in a file is executed. What it holds is checked before it is used: names, shapes, types, values,
and a SHA-256 over header and tensors, which tells damage and alteration (it is no signature: who rewrites
the whole file can rewrite the digest).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.errors import FastMemError, unknown

FORMAT_VERSION = "3"
FORMS = ("float32", "bfloat16", "int8", "low-rank")
_SUFFIXES = {"float32": ("",), "bfloat16": ("",), "int8": ("", ".scale"), "low-rank": (".outer", ".inner")}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_PARTS = ("gate", "up", "down")
# Of one delta: several times what models of 70B parameters have, and nothing that factors blow up beyond.
_MOST_NUMBERS = 1 << 31

Deltas = list[dict[str, Tensor]]


def pack(
    name: str, delta: Tensor, form: str, low_rank: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors that stand for one delta ``(out, in)`` in a file.

    Args:
        name: of the delta.
        form: one of :data:`FORMS`. ``int8`` keeps a scale for each output row, in float32.
        low_rank: factors ``(out, r)`` and ``(r, in)``, for ``low-rank``; kept in their own type.

    Raises:
        FastMemError: for an unknown form.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if form == "low-rank":
        if low_rank is None:
            raise FastMemError("form: low-rank needs a rank; use fastmem export --to memory --form low-rank")
        tensors: tuple[Tensor, ...] = low_rank
    elif form == "int8":
        delta = delta.float()
        scale = delta.abs().amax(1, keepdim=True) / 127
        tensors = ((delta / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale)
    else:
        tensors = (delta.to(getattr(torch, form)),)
    return {
        name + suffix: tensor.detach().to("cpu").contiguous()
        for suffix, tensor in zip(_SUFFIXES[form], tensors, strict=True)
    }


def unpack(name: str, tensors: Mapping[str, Tensor], form: str) -> Tensor:
    """Inverse of :func:`pack`, up to what the form loses."""
    parts = [tensors[name + suffix] for suffix in _SUFFIXES[form]]
    if form == "low-rank":
        return parts[0].float() @ parts[1].float()
    return parts[0].float() * parts[1] if form == "int8" else parts[0]


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a file; a reader sees the whole file or none.

    Raises:
        FastMemError: when it cannot be written.
    """
    header = {"format": "fastmem", "version": FORMAT_VERSION, **header}
    header["digest"] = digest(tensors, header)
    partial = path.with_name(path.name + ".partial")
    try:
        write_tensors(partial, tensors, header)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FastMemError(f"cannot write the memory {path}: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file down to the disk, with the permissions of any new file.

    Raises:
        OSError: when it cannot be written.
    """
    from safetensors.torch import save

    with open(path, "wb") as file:
        file.write(save(dict(tensors), metadata=dict(metadata)))
        file.flush()
        os.fsync(file.fileno())


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the header, the digest itself aside, and of all tensors."""
    stated = {name: value for name, value in header.items() if name != "digest"}
    result = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: NumPy has no bfloat16.
        result.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def read(path: str | Path, fingerprint: str | None = None) -> tuple[dict[str, str], Deltas]:
    """Read header and deltas ``(out, in)`` by layer, lowest first, and part.

    Raises:
        FastMemError: when the file is missing, damaged, altered, or belongs to another model.
    """
    with _opened(path, fingerprint) as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if digest(tensors, header) != header.get("digest"):
        raise damaged(path, "its digest is not that of its content")
    form = header.get("form", "float32")
    if form not in FORMS:
        raise damaged(path, f"unknown form {form!r}")
    try:
        return header, _deltas(tensors, form)
    except ValueError as error:
        raise damaged(path, error) from error


def _deltas(tensors: dict[str, Tensor], form: str) -> Deltas:
    """Deltas by layer from the tensors of a file; a ``ValueError`` says what is wrong with them."""
    deltas: Deltas = []
    left = set(tensors)
    while left:
        layer = len(deltas)
        deltas.append({})
        for part in _PARTS:
            names = [f"{layer}.{part}{suffix}" for suffix in _SUFFIXES[form]]
            if part == "gate" and left.isdisjoint(names):
                continue
            if not left.issuperset(names):
                raise ValueError(f"it lacks {names[0]}, or holds other tensors than a memory's")
            if not all(tensors[name].ndim == 2 and tensors[name].dtype in _DTYPES for name in names):
                raise ValueError(f"{names[0]} is no matrix of numbers")
            inner = names[1] if form == "low-rank" else names[0]
            if tensors[names[0]].shape[0] * tensors[inner].shape[1] > _MOST_NUMBERS:
                raise ValueError(f"{names[0]} is too large")
            left.difference_update(names)
            try:
                deltas[layer][part] = unpack(f"{layer}.{part}", tensors, form)
            except RuntimeError:
                raise ValueError(f"{names[0]} does not fit its scale or factor") from None
            if not deltas[layer][part].isfinite().all():
                raise ValueError(f"{names[0]} holds values that are not finite")
    if not deltas:
        raise ValueError("it holds no tensors")
    return deltas


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


def damaged(path: str | Path, why: object) -> FastMemError:
    """The error for a file whose content cannot be a memory's."""
    return FastMemError(f"memory {path} is damaged ({why}); memorize it again")


def other_model(what: str, made_with: str, fingerprint: str, other: str) -> FastMemError:
    """The error for a memory of another model."""
    hint = f" It was made with {made_with!r}: give --model {made_with}" if made_with else ""
    return FastMemError(
        f"{what} belongs to another model: its fingerprint is {fingerprint}, this model's {other}.{hint}"
    )


@contextmanager
def _opened(path: str | Path, fingerprint: str | None) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FastMemError(f"no such memory: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != "fastmem":
                raise FastMemError(f"{path} is not a FastMem memory")
            if header.get("version") != FORMAT_VERSION:
                raise FastMemError(
                    f"memory {path} has format version {header.get('version')}, this program reads "
                    f"{FORMAT_VERSION}; memorize it again"
                )
            for name in ("fingerprint", "settings", "curve", "status"):
                if name not in header:
                    raise damaged(path, f"its header lacks {name!r}")
            if fingerprint is not None and header["fingerprint"] != fingerprint:
                raise other_model(
                    f"memory {path}", header.get("backbone", ""), header["fingerprint"], fingerprint
                )
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, " ".join(str(error).split())) from error
