"""Memory files: safetensors with a header, a digest over both, and several forms of the deltas.

Nothing in a file is executed. What it holds is checked before it is used: names, shapes, types, values,
and a SHA-256 over header and tensors, which shows damage and alteration (it is no signature: who rewrites
the whole file can rewrite the digest).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import write_whole
from fastmem_pl.memory.attach import check_shapes
from fastmem_pl.memory.settings import POLICIES, MemorizationSettings

FORMAT_VERSION = "3"
# By form: what the names of a delta's tensors end in, and their types, as safetensors calls them.
_LAYOUTS = {
    "float32": (("",), {("F32",)}),
    "bfloat16": (("",), {("BF16",)}),
    "int8": (("", ".scale"), {("I8", "F32")}),
    "low-rank": ((".outer", ".inner"), {("F32", "F32"), ("BF16", "BF16")}),
}
FORMS = tuple(_LAYOUTS)
_CURVE = {"cross_entropy", "kl", "grad_norm"}
_MOST_SHOWN = 300
# Of all deltas: three times what one layer of a 70B model has.
_MOST_NUMBERS = 1 << 31


def pack(
    name: str, delta: Tensor, form: str, low_rank: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors that stand for one delta ``(out, in)`` in a file.

    ``int8`` keeps a float32 scale for each output row; ``low-rank`` takes factors ``(out, r)`` and
    ``(r, in)``, kept in their own type.

    Raises:
        FastMemError: for an unknown form, or one without its factors.
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
    names = (name + suffix for suffix in _LAYOUTS[form][0])
    return {n: t.detach().to("cpu").contiguous() for n, t in zip(names, tensors, strict=True)}


def unpack(name: str, tensors: Mapping[str, Tensor], form: str) -> Tensor:
    """Inverse of :func:`pack`, up to what the form loses."""
    parts = [tensors[name + suffix] for suffix in _LAYOUTS[form][0]]
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
    """Write a safetensors file down to the disk, with the permissions of any new file."""
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
    path: str | Path, fingerprint: str | None = None, anatomy: Anatomy | None = None
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The header's values (:func:`checked`), and deltas ``(out, in)`` by layer and part.

    A memory of another ``fingerprint``, or of other shapes than those of a model's ``anatomy``, is refused
    before any tensor is read.

    Raises:
        FastMemError: when the file is missing, damaged, altered, or belongs to another model.
    """
    with _opened(path, fingerprint) as (file, values):
        form = values["form"]
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = _shapes({n: (t.get_dtype(), tuple(t.get_shape())) for n, t in stored.items()}, form)
        if anatomy is not None:
            check_shapes(shapes, anatomy)
        tensors = {name: file.get_tensor(name) for name in stored}
        if digest(tensors, file.metadata()) != file.metadata().get("digest"):
            raise ValueError("its digest is not that of its content")
        deltas = [{p: unpack(f"{i}.{p}", tensors, form) for p in parts} for i, parts in enumerate(shapes)]
        if not all(delta.isfinite().all() for parts in deltas for delta in parts.values()):
            raise ValueError("it holds values that are not finite")
    return values, deltas


def read_header(path: str | Path, fingerprint: str | None = None) -> dict[str, str]:
    """The header of a memory file, read without its tensors.

    Raises:
        FastMemError: when the file is missing, damaged, or belongs to another model than ``fingerprint``'s.
    """
    with _opened(path, fingerprint) as (file, _):
        return file.metadata()


def other_model(what: str, made_with: str, fingerprint: str, other: str) -> FastMemError:
    """The error for a memory of another model."""
    same = "so give that model, in the quantization it had"
    hint = f"; it was made with {made_with!r}, {same}" if made_with else ""
    return FastMemError(
        f"{what} belongs to another model: its fingerprint is {fingerprint}, this model's {other}{hint}"
    )


@contextmanager
def _opened(path: str | Path, fingerprint: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and the values of its header; a ``ValueError`` while it is open counts as damage to it."""
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
            values = checked(header)
            if fingerprint is not None and values["fingerprint"] != fingerprint:
                raise other_model(f"memory {path}", values["backbone"], values["fingerprint"], fingerprint)
            yield file, values
    except FastMemError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FastMemError(
            f"memory {path} is damaged ({reason}), or no memory at all; give what fastmem memorize wrote, or "
            "memorize it again"
        ) from error


def _shapes(stored: Mapping[str, tuple[str, tuple[int, ...]]], form: str) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the deltas by layer and part, from types and shapes of the tensors that are stored.

    Raises:
        ValueError: when they are not those of a memory in this form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}")
    suffixes, allowed = _LAYOUTS[form]
    layers: list[dict[str, tuple[int, ...]]] = []
    left = set(stored)
    while left:
        layers.append({})
        for part in ("gate", "up", "down"):
            names = [f"{len(layers) - 1}.{part}{suffix}" for suffix in suffixes]
            if part == "gate" and left.isdisjoint(names):
                continue
            if not left.issuperset(names):
                raise ValueError(f"it lacks {names[0]}, or holds other tensors than a memory's")
            left.difference_update(names)
            dtypes, shapes = zip(*(stored[name] for name in names), strict=True)
            if dtypes not in allowed or not all(len(shape) == 2 and all(shape) for shape in shapes):
                raise ValueError(f"{names[0]} is no matrix of {form} numbers")
            (out, inner), last = shapes[0], shapes[-1]
            if (form == "low-rank" and last[0] != inner) or (form == "int8" and last != (out, 1)):
                raise ValueError(f"{names[0]} does not fit its scale or factor")
            layers[-1][part] = (out, last[1]) if form == "low-rank" else (out, inner)
    # Factors are small and what they stand for is not.
    if not layers or sum(out * width for parts in layers for out, width in parts.values()) > _MOST_NUMBERS:
        raise ValueError("it holds no deltas, or more than any model has")
    return layers


def checked(header: Mapping[str, str]) -> dict[str, Any]:
    """The values of a header; ``None`` for ``windows``, ``text`` and ``context_hash`` where it lacks them.

    Raises:
        ValueError: naming what no memory's header holds.
    """
    for name in ("fingerprint", "form", "settings", "curve", "status", "backbone"):
        if name not in header:
            raise ValueError(f"its header lacks {name!r}")
    if not re.fullmatch(r"[0-9a-f]{8,64}", header["fingerprint"]):
        raise ValueError("its fingerprint is none")
    for name in ("form", "status", "backbone"):
        # These are shown to people: one line, and nothing that a terminal would act on.
        if not (header[name].isprintable() and len(header[name]) <= _MOST_SHOWN):
            raise ValueError(f"its {name} is no short line of text")
    return {
        **{name: header[name] for name in ("fingerprint", "form", "status", "backbone")},
        **{name: header.get(name) for name in ("text", "context_hash")},
        "settings": _settings(_parsed(header, "settings")),
        "curve": _curve(_parsed(header, "curve")),
        "windows": _windows(_parsed(header, "windows")) if "windows" in header else None,
    }


def trained_layers(header: Mapping[str, str]) -> int:
    """Number of layers that a checked header's memory was trained with."""
    return checked(header)["settings"]["num_layers"]


def _parsed(header: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(header[name])
    except (ValueError, RecursionError):
        raise ValueError(f"its {name} are no JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"its {name} are no mapping")
    return value


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that :class:`MemorizationSettings` takes, each of its default's type."""
    defaults = MemorizationSettings().as_dict()
    # No setting of memorizing alone: runs write them where there are any.
    quirks = settings.pop("published_quirks", [])
    if not isinstance(quirks, list) or not all(isinstance(name, str) for name in quirks):
        raise ValueError("its setting 'published_quirks' does not fit")
    for name, value in settings.items():
        like = type(defaults.get(name))
        if type(value) not in ({like} if like in (bool, int, str) else {int, float, like}):
            raise ValueError(f"its setting {name!r} does not fit")
    try:
        MemorizationSettings(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its settings do not fit, {error}") from None
    if missing := defaults.keys() - settings.keys():
        raise ValueError(f"its settings lack {min(missing)!r}")
    # Lists hold the settings of several rows.
    return settings | ({"published_quirks": tuple(quirks)} if quirks else {})


def _curve(curve: dict[str, Any]) -> dict[str, list[float | None]]:
    numbers = all(
        isinstance(values, list) and all(type(value) in (float, int, type(None)) for value in values)
        for values in curve.values()
    )
    if not numbers or not _CURVE <= curve.keys() <= {*_CURVE, "kl_coeff"}:
        raise ValueError("its curve is none")
    return curve


def _windows(windows: dict[str, Any]) -> dict[str, Any]:
    lengths = windows.get("lengths")
    counts = [windows.get(name) for name in ("window", "overlap", "count", "tokens", "updates", "planned")]
    fits = isinstance(lengths, list) and windows.get("policy") in POLICIES
    if not fits or not all(type(n) is int and n >= 0 for n in [*lengths, *counts]):
        raise ValueError("its windows are none")
    return windows
