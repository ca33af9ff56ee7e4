"""Memory files: safetensors with a header, a digest over both, and several forms of the deltas.

Nothing in a file is executed. What it holds is checked before it is used: names, shapes, types, values,
and a SHA-256 over header and tensors, which tells damage and alteration (it is no signature: who rewrites
the whole file can rewrite the digest).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import write_whole
from fastmem_pl.memory.header import checked

FORMAT_VERSION = "3"
FORMS = ("float32", "bfloat16", "int8", "low-rank")
_SUFFIXES = {"float32": ("",), "bfloat16": ("",), "int8": ("", ".scale"), "low-rank": (".outer", ".inner")}
# Types of the tensors of each form, as safetensors calls them.
_STORED = {
    "float32": {("F32",)},
    "bfloat16": {("BF16",)},
    "int8": {("I8", "F32")},
    "low-rank": {("F32", "F32"), ("BF16", "BF16")},
}
_PARTS = ("gate", "up", "down")
# Of all deltas: three times what one layer of a 70B model has.
_MOST_NUMBERS = 1 << 31

Deltas = list[dict[str, Tensor]]
Shapes = dict[str, tuple[int, ...]]


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
    try:
        write_whole(path, lambda partial: write_tensors(partial, tensors, header))
    except OSError as error:
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


def read(
    path: str | Path,
    fingerprint: str | None = None,
    check_shapes: Callable[[list[Shapes]], None] | None = None,
) -> tuple[dict[str, Any], Deltas]:
    """Read header and deltas ``(out, in)`` by layer, lowest first, and part.

    Args:
        path: of the file.
        fingerprint: refuse a memory of another backbone.
        check_shapes: refuses, by an error, shapes that do not fit; called before any tensor is read.

    Returns:
        the values of the header (:func:`~fastmem_pl.memory.header.checked`), and the deltas.

    Raises:
        FastMemError: when the file is missing, damaged, altered, or belongs to another model.
    """
    try:
        with _opened(path, fingerprint) as (file, values):
            form = values["form"]
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = _layout({n: (t.get_dtype(), tuple(t.get_shape())) for n, t in stored.items()}, form)
            if check_shapes:
                check_shapes(shapes)
            tensors = {name: file.get_tensor(name) for name in stored}
            if digest(tensors, file.metadata()) != file.metadata().get("digest"):
                raise ValueError("its digest is not that of its content")
        deltas = [
            {part: unpack(f"{layer}.{part}", tensors, form) for part in parts}
            for layer, parts in enumerate(shapes)
        ]
        if not all(delta.isfinite().all() for parts in deltas for delta in parts.values()):
            raise ValueError("it holds values that are not finite")
    except FastMemError:
        raise
    except ValueError as error:
        raise damaged(path, error) from error
    return values, deltas


def _layout(stored: Mapping[str, tuple[str, tuple[int, ...]]], form: str) -> list[Shapes]:
    """Shapes of the deltas by layer and part, from types and shapes of the tensors that are stored.

    Raises:
        ValueError: when they are not those of a memory in this form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}")
    layers: list[Shapes] = []
    left = set(stored)
    while left:
        layer = len(layers)
        layers.append({})
        for part in _PARTS:
            names = [f"{layer}.{part}{suffix}" for suffix in _SUFFIXES[form]]
            if part == "gate" and left.isdisjoint(names):
                continue
            if not left.issuperset(names):
                raise ValueError(f"it lacks {names[0]}, or holds other tensors than a memory's")
            left.difference_update(names)
            dtypes, shapes = zip(*(stored[name] for name in names), strict=True)
            if dtypes not in _STORED[form] or not all(len(shape) == 2 and all(shape) for shape in shapes):
                raise ValueError(f"{names[0]} is no matrix of {form} numbers")
            if form == "low-rank":
                fits, shape = shapes[0][1] == shapes[1][0], (shapes[0][0], shapes[1][1])
            else:
                fits, shape = form != "int8" or shapes[1] == (shapes[0][0], 1), shapes[0]
            if not fits:
                raise ValueError(f"{names[0]} does not fit its scale or factor")
            layers[layer][part] = shape
    # Factors are small and what they stand for is not.
    if not layers or sum(out * width for parts in layers for out, width in parts.values()) > _MOST_NUMBERS:
        raise ValueError("it holds no deltas, or more than any model has")
    return layers


def read_header(path: str | Path, fingerprint: str | None = None) -> dict[str, str]:
    """Read the header of a memory file, not its tensors.

    Args:
        path: of the file.
        fingerprint: refuse a memory of another backbone.

    Raises:
        FastMemError: when the file is missing, damaged, or belongs to another model.
    """
    with _opened(path, fingerprint) as (file, _):
        return file.metadata()


def damaged(path: str | Path, why: object) -> FastMemError:
    """The error for a file whose content cannot be a memory's."""
    return FastMemError(f"memory {path} is damaged ({why}); memorize it again")


def other_model(what: str, made_with: str, fingerprint: str, other: str) -> FastMemError:
    """The error for a memory of another model."""
    same = "so give that model, in the quantization it had"
    hint = f"; it was made with {made_with!r}, {same}" if made_with else ""
    return FastMemError(
        f"{what} belongs to another model: its fingerprint is {fingerprint}, this model's {other}{hint}"
    )


@contextmanager
def _opened(path: str | Path, fingerprint: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file, and the values of its header."""
    from safetensors import SafetensorError, safe_open

    try:
        if not Path(path).is_file():
            raise FastMemError(f"no such memory: {path}")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise FastMemError(f"cannot read the memory {str(path)[:120]}: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != "fastmem":
                raise FastMemError(f"{path} is not a FastMem memory")
            if header.get("version") != FORMAT_VERSION:
                raise FastMemError(
                    f"memory {path} has format version {header.get('version')!r:.20}, this program reads "
                    f"{FORMAT_VERSION}; memorize it again"
                )
            try:
                values = checked(header)
            except ValueError as error:
                raise damaged(path, error) from error
            if fingerprint is not None and values["fingerprint"] != fingerprint:
                raise other_model(f"memory {path}", values["backbone"], values["fingerprint"], fingerprint)
            yield file, values
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FastMemError(
            f"memory {path} is damaged ({reason}), or no memory at all; give what fastmem memorize wrote, or "
            "memorize it again"
        ) from error
