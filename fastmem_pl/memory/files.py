"""Memory files: safetensors with a header, a digest over both, and several forms of the deltas.

Nothing in a file is executed. What it holds is checked before it is used: names, shapes, types, values,
and a SHA-256 over header and tensors, which shows damage and alteration (it is no signature: who rewrites
the whole file can rewrite the digest).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec.structs import asdict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastmem_pl.backbone.anatomy import Anatomy, find_anatomy
from fastmem_pl.base.errors import FastMemError, one_line, unknown
from fastmem_pl.base.files import as_path, is_remote, write_atomic
from fastmem_pl.base.outside import fit, parse_json, require_file
from fastmem_pl.memory.attach import check_shapes
from fastmem_pl.memory.settings import POLICIES, MemorizationSettings

FORMAT_VERSION = "4"
# By form: what the names of a delta's tensors end in, and their types, as safetensors calls them.
_LAYOUTS = {
    "float32": (("",), {("F32",)}),
    "bfloat16": (("",), {("BF16",)}),
    "int8": (("", ".scale"), {("I8", "F32")}),
    "low-rank": ((".outer", ".inner"), {("F32", "F32"), ("BF16", "BF16")}),
}
FORMS = tuple(_LAYOUTS)
# Which experts of a mixture a delta is of.
EXPERTS = "experts"
# Of all deltas: three times what one layer of a 70B model has.
_MOST_NUMBERS = 1 << 31


# These are shown to people: one line, and nothing that a terminal would act on.
_Line = Annotated[
    str, msgspec.Meta(max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*$")
]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Losses = list[float | None]


class _Curve(msgspec.Struct, forbid_unknown_fields=True):
    cross_entropy: _Losses
    kl: _Losses
    grad_norm: _Losses
    kl_coeff: _Losses = []


class _Windows(msgspec.Struct):
    policy: Literal[POLICIES]
    window: _Count
    overlap: _Count
    count: _Count
    tokens: _Count
    updates: _Count
    planned: _Count
    lengths: list[_Count]


class _Header(msgspec.Struct):
    fingerprint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8,64}$")]
    form: _Line
    status: _Line
    backbone: _Line
    settings: dict[str, Any]
    curve: _Curve
    windows: _Windows | None = None
    text: str | None = None
    context_hash: str | None = None


def pack(
    name: str, delta: Tensor, form: str, low_rank: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors that stand for one delta ``(out, in)``; ``int8`` has a float32 scale for each output row.

    Numbers of experts ``(K, 1)`` are kept as they are.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if not delta.is_floating_point():
        return {name: delta.to("cpu", torch.int64).contiguous()}
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
    if name.endswith(f".{EXPERTS}"):
        return tensors[name]
    parts = [tensors[name + suffix] for suffix in _LAYOUTS[form][0]]
    if form == "low-rank":
        return parts[0].float() @ parts[1].float()
    return parts[0].float() * parts[1] if form == "int8" else parts[0]


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a file; a reader sees the whole file or none."""
    header = {"format": "fastmem", "version": FORMAT_VERSION, **header}
    header["digest"] = digest(tensors, header)
    try:
        write_atomic(path, save(dict(tensors), metadata=header))
    except OSError as error:
        raise FastMemError(f"cannot write the memory {path}: {error.strerror or error}") from error


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
    """
    with _opened(path, fingerprint) as (file, values):
        form = values["form"]
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = _shapes({n: (t.get_dtype(), tuple(t.get_shape())) for n, t in stored.items()}, form)
        if anatomy is not None:
            if ("experts" in shapes[0]) != anatomy.routed:
                anatomy = find_anatomy(anatomy.model, "shared" if anatomy.routed else "routed")
            check_shapes(shapes, anatomy)
        tensors = {name: file.get_tensor(name) for name in stored}
        if digest(tensors, file.metadata()) != file.metadata().get("digest"):
            raise ValueError("its digest is not that of its content")
        deltas = [{p: unpack(f"{i}.{p}", tensors, form) for p in parts} for i, parts in enumerate(shapes)]
        if EXPERTS in deltas[0]:
            total = 1 << 20 if anatomy is None else len(anatomy.experts(-1).down_proj)
            if not ((deltas[0][EXPERTS] >= -1) & (deltas[0][EXPERTS] < total)).all():
                raise ValueError("its numbers of experts are none")
        if not all(delta.isfinite().all() for parts in deltas for delta in parts.values()):
            raise ValueError("it holds values that are not finite")
    return values, deltas


def read_header(path: str | Path, fingerprint: str | None = None) -> dict[str, str]:
    """The header of a memory file, checked, and read without its tensors."""
    with _opened(path, fingerprint, whole=False) as (file, _):
        return file.metadata()


def other_model(what: str, made_with: str, fingerprint: str, other: str) -> FastMemError:
    """The error for a memory of another model."""
    same = "so give that model, in the quantization it had"
    hint = f"; it was made with {made_with!r}, {same}" if made_with else ""
    return FastMemError(
        f"{what} belongs to another model: its fingerprint is {fingerprint}, this model's {other}{hint}"
    )


@contextmanager
def _opened(
    path: str | Path, fingerprint: str | None, whole: bool = True
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and the values of its header; a ``ValueError`` while it is open counts as damage to it."""
    try:
        with _local(path, whole) as local, safe_open(local, framework="pt") as file:
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
            except FastMemError as error:
                raise ValueError(str(error)) from error
            if fingerprint is not None and values["fingerprint"] != fingerprint:
                raise other_model(f"memory {path}", values["backbone"], values["fingerprint"], fingerprint)
            yield file, values
    except FastMemError:
        raise
    except OSError as error:
        raise FastMemError(f"cannot read the memory {str(path)[:120]}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise FastMemError(
            f"memory {path} is damaged ({one_line(error)}), or no memory at all; give what fastmem memorize "
            "wrote, or memorize it again"
        ) from error


@contextmanager
def _local(path: str | Path, whole: bool) -> Iterator[str | Path]:
    """The file, or of one behind a URL a copy that safetensors can map: ``whole``, or with a header alone."""
    path = as_path(path)
    require_file(path)
    with path.open("rb") as file:
        # safe_open does not say what the system has against a file.
        if not is_remote(path):
            yield path
            return
        with NamedTemporaryFile(suffix=".safetensors") as copy:
            length = file.read(8)
            copy.write(length + file.read(-1 if whole else int.from_bytes(length, "little")))
            copy.truncate(path.stat().st_size)
            copy.flush()
            yield copy.name


def _shapes(stored: Mapping[str, tuple[str, tuple[int, ...]]], form: str) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the deltas by layer and part, from types and shapes of the tensors that are stored."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}")
    suffixes, allowed = _LAYOUTS[form]
    layers = range(len({name.partition(".")[0] for name in stored}))
    parts = [part for part in ("gate", "up", "down") if f"0.{part}{suffixes[0]}" in stored]
    expected = {f"{layer}.{part}{suffix}" for layer in layers for part in parts for suffix in suffixes}
    experts = f"0.{EXPERTS}"
    if experts in stored:
        expected.add(experts)
    if not stored or stored.keys() != expected:
        raise ValueError("it holds no deltas, or other tensors than a memory's")

    def shape_of(name: str) -> tuple[int, int]:
        dtypes, shapes = zip(*(stored[name + suffix] for suffix in suffixes), strict=True)
        if dtypes not in allowed or not all(len(shape) == 2 and all(shape) for shape in shapes):
            raise ValueError(f"{name} is no matrix of {form} numbers")
        (out, inner), last = shapes[0], shapes[-1]
        if (form == "low-rank" and last[0] != inner) or (form == "int8" and last != (out, 1)):
            raise ValueError(f"{name} does not fit its scale or factor")
        return (out, last[1]) if form == "low-rank" else (out, inner)

    found = [{part: shape_of(f"{layer}.{part}") for part in parts} for layer in layers]
    if experts in stored:
        kind, shape = stored[experts]
        if kind != "I64" or len(layers) > 1 or len(shape) != 2 or shape[0] < 1 or shape[1] != 1:
            raise ValueError("its numbers of experts are none")
        found[0][EXPERTS] = shape
    # Factors are small and what they stand for is not.
    if sum(out * width for shapes in found for out, width in shapes.values()) > _MOST_NUMBERS:
        raise ValueError("it holds more than any model has")
    return found


def checked(header: Mapping[str, str]) -> dict[str, Any]:
    """The values of a header; ``None`` for ``windows``, ``text`` and ``context_hash`` where it lacks them."""
    parts = {n: parse_json(header[n], f"its {n}") for n in ("settings", "curve", "windows") if n in header}
    values = asdict(fit({**header, **parts}, _Header, "its header"))
    # No setting of memorizing alone: runs write them where there are any.
    settings, defaults = dict(parts["settings"]), MemorizationSettings().as_dict()
    quirks = fit(settings.pop("published_quirks", []), tuple[str, ...], "its published_quirks")
    if settings.keys() != defaults.keys():
        raise FastMemError("its settings are not those of memorizing")
    try:
        fit(settings, MemorizationSettings, "its settings")
    except OverflowError as error:
        raise FastMemError(f"its settings do not fit, {error}") from None
    # Lists hold the settings of several rows.
    return values | parts | {"settings": settings | ({"published_quirks": quirks} if quirks else {})}


def trained_part(header: Mapping[str, str]) -> dict[str, Any]:
    """The settings that say which FFNs the memory of a header is of, as ``Backbone.load`` takes them."""
    settings = checked(header)["settings"]
    return {name: settings[name] for name in ("num_layers", "experts", "max_experts")}
