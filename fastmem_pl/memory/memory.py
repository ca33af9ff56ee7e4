"""What memorizing leaves behind, in process and on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.memory import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastmem_pl.backbone import Backbone
    from fastmem_pl.backbone.families import Anatomy

# Attributes of a memory that hold a value for each row.
_BY_ROW = ("curves", "status", "texts", "context_hashes")


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


@dataclass(repr=False)
class Memory:
    """Memorized contexts: one row a sample.

    Attributes:
        deltas: per trained layer (lowest first) ``{"gate": (B, F, D), "up": (B, F, D), "down": (B, D, F)}``.
        curves: one a row.
        status: ``"ok"`` or what failed, one a row; a failed row holds zero deltas (the base model).
        settings: those of memorizing.
        fingerprint: of the backbone that the deltas belong to.
        texts: what was memorized, one a row, where it is known.
        context_hashes: of the memorized token ids, one a row, where they are known.
        backbone: what the model was called.
        windows: how a long text was cut, on the memory of a document.
    """

    deltas: list[dict[str, Tensor]]
    curves: list[Curve]
    status: list[str]
    settings: dict[str, Any]
    fingerprint: str
    texts: list[str | None] = field(default_factory=list)
    context_hashes: list[str | None] = field(default_factory=list)
    backbone: str = ""
    windows: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.texts = self.texts or [None] * len(self.curves)
        self.context_hashes = self.context_hashes or [None] * len(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def __repr__(self) -> str:
        rows = "1 context" if len(self) == 1 else f"{len(self)} contexts"
        losses = [curve.cross_entropy for curve in self.curves if curve.cross_entropy]
        means = [sum(loss[i] for loss in losses) / len(losses) for i in (0, -1)] if losses else []
        fell = f", cross-entropy {means[0]:.2f} -> {means[1]:.2f}" if means else ""
        megabytes = sum(tensor.nbytes for layer in self.deltas for tensor in layer.values()) / 1e6
        steps = f"{self.settings.get('steps')} steps"
        return f"Memory({rows}, {steps}{fell}, {megabytes:.1f} MB, model {self.backbone!r})"

    @property
    def num_layers(self) -> int:
        """Trained layers."""
        return len(self.deltas)

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of one row's deltas by layer."""
        return [{name: tuple(t.shape[1:]) for name, t in layer.items()} for layer in self.deltas]

    @property
    def curve(self) -> Curve:
        """The curve of a memory of one row.

        Raises:
            FastMemError: when there are several.
        """
        if len(self) != 1:
            raise FastMemError(f"memory.curve: there are {len(self)}; take one of memory.curves")
        return self.curves[0]

    @property
    def context_hash(self) -> str | None:
        """Hash of the token ids that a memory of one row was made from, where it is known."""
        return self.context_hashes[0] if len(self) == 1 else None

    def plot(self) -> Figure:
        """Cross-entropy and KL (nats a token) over the steps, a line a row."""
        from fastmem_pl.memory.chart import Chart

        figure = Chart(figsize=(7, 2.6), layout="constrained")
        for axes, name, title in zip(
            figure.subplots(1, 2),
            ("cross_entropy", "kl"),
            ("cross-entropy of the context", "KL from the base model"),
            strict=True,
        ):
            for row, curve in enumerate(self.curves):
                axes.plot(getattr(curve, name), marker=".", label=f"row {row}")
            axes.set(title=title, xlabel="step", ylabel="nats a token")
            if 1 < len(self) <= 10:
                axes.legend(fontsize="small")
        return figure

    def rows(self, indices: Sequence[int]) -> Memory:
        """Pick rows, repeats allowed: ``memory.rows([0, 0])`` serves two questions on one context."""
        index = torch.tensor(indices, device=next(iter(self.deltas[0].values())).device)
        return replace(
            self,
            deltas=[{n: t.index_select(0, index) for n, t in layer.items()} for layer in self.deltas],
            settings=_by_row(self.settings, indices),
            **{name: [getattr(self, name)[i] for i in indices] for name in _BY_ROW},
        )

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Memory:
        """The same memory with deltas of another type, or elsewhere."""
        return replace(
            self, deltas=[{n: t.to(device=device, dtype=dtype) for n, t in d.items()} for d in self.deltas]
        )

    @classmethod
    def stack(cls, memories: Sequence[Memory]) -> Memory:
        """Join memories of one backbone into one batch, one row after the other.

        Raises:
            FastMemError: when they are of several models, or of different layers.
        """
        if not memories:
            raise FastMemError("Memory.stack: no memories; give one or more")
        first = memories[0]
        for other in memories[1:]:
            if other.fingerprint != first.fingerprint:
                raise FastMemError(
                    f"Memory.stack: memories of two models, {first.fingerprint} and {other.fingerprint}; "
                    "a batch has one"
                )
            if other.num_layers != first.num_layers:
                raise FastMemError(
                    f"Memory.stack: memories of {first.num_layers} and of {other.num_layers} trained layers; "
                    "a batch has one number"
                )
        deltas = [
            {name: torch.cat([m.deltas[layer][name] for m in memories]) for name in first.deltas[layer]}
            for layer in range(first.num_layers)
        ]
        joined = {name: [value for memory in memories for value in getattr(memory, name)] for name in _BY_ROW}
        return replace(first, deltas=deltas, settings=_joined_settings(memories), windows=None, **joined)

    def check(self, backbone: Backbone) -> None:
        """Refuse to serve another model.

        Raises:
            FastMemError: with both fingerprints, or with the shapes that differ.
        """
        if self.fingerprint != backbone.fingerprint():
            raise files.other_model("the memory", self.backbone, self.fingerprint, backbone.fingerprint())
        check_shapes(self.shapes, backbone.anatomy)

    def serving(self, backbone: Backbone, count: int) -> list[dict[str, Tensor]]:
        """The deltas for ``count`` sequences, in the type of the backbone's products.

        One row serves all of them without copies; each of several rows serves as many, side by side.

        Args:
            backbone: the model.
            count: a multiple of the number of rows.

        Raises:
            FastMemError: when the memory is of another model, or the rows do not share out evenly.
        """
        self.check(backbone)
        if count % len(self):
            raise FastMemError(
                f"the memory has {len(self)} rows for {count} sequences; give one row, or one for each prompt"
            )
        return [
            {name: spread(t.to(backbone.device, backbone.compute_dtype), count) for name, t in layer.items()}
            for layer in self.deltas
        ]

    def attached(self, model: Any) -> AbstractContextManager[None]:
        """Let a transformers model use this memory; see :func:`fastmem_pl.decoding.generate.attached`."""
        from fastmem_pl.decoding.generate import attached

        return attached(model, self)

    def save(
        self,
        path: str | Path,
        row: int = 0,
        form: str | torch.dtype = "float32",
        text: bool = True,
        factors: Sequence[Mapping[str, tuple[Tensor, Tensor]]] | None = None,
        **extra: str,
    ) -> None:
        """Write one row as a safetensors file; a reader sees the whole file or none.

        Args:
            path: of the file.
            row: which sample.
            form: ``float32``; ``bfloat16`` (half the size; products with a memory run in the backbone's
                compute type, so for a bfloat16 model nothing is lost); ``int8`` (a quarter); ``low-rank``. A
                type of PyTorch does as well.
            text: keep the memorized text, where it is known, in the file.
            factors: of every delta by layer, ``(out, r)`` and ``(r, in)``, for ``low-rank``.
            extra: further text for the header.

        Raises:
            FastMemError: when the file cannot be written.
        """
        form = str(form).removeprefix("torch.")
        tensors: dict[str, Tensor] = {}
        for layer, deltas in enumerate(self.deltas):
            for name, delta in deltas.items():
                low_rank = factors[layer][name] if factors else None
                tensors |= files.pack(f"{layer}.{name}", delta[row], form, low_rank)
        header = {
            "fingerprint": self.fingerprint,
            "form": form,
            "settings": json.dumps(_by_row(self.settings, [row])),
            "curve": json.dumps(self.curves[row].as_dict()),
            "status": self.status[row],
            "backbone": self.backbone,
            **({"windows": json.dumps(self.windows)} if self.windows else {}),
            **({"text": self.texts[row]} if text and self.texts[row] is not None else {}),
            **({"context_hash": self.context_hashes[row]} if self.context_hashes[row] else {}),
            **extra,
        }
        files.write(Path(path), tensors, header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        fingerprint: str | Backbone | None = None,
        device: str | torch.device = "cpu",
    ) -> Memory:
        """Read one memory (nothing in the file is executed).

        Args:
            path: of the file.
            fingerprint: refuse a memory of another backbone; given a backbone itself, also one of other
                shapes.
            device: where to put the deltas.

        Raises:
            FastMemError: when the file is missing, damaged, altered, or belongs to another model.
        """
        backbone = None if fingerprint is None or isinstance(fingerprint, str) else fingerprint
        values, deltas = files.read(
            path,
            backbone.fingerprint() if backbone else fingerprint,
            (lambda shapes: check_shapes(shapes, backbone.anatomy)) if backbone else None,
        )
        return cls(
            [{name: t.to(device)[None] for name, t in layer.items()} for layer in deltas],
            [Curve.from_dict(values["curve"])],
            [values["status"]],
            values["settings"],
            values["fingerprint"],
            [values["text"]],
            [values["context_hash"]],
            values["backbone"],
            values["windows"],
        )


def spread(delta: Tensor, count: int) -> Tensor:
    """Rows of a delta for ``count`` sequences, a multiple of its rows."""
    if len(delta) == 1:
        return delta.expand(count, -1, -1)
    return delta if len(delta) == count else delta.repeat_interleave(count // len(delta), 0)


def check_shapes(shapes: Sequence[Mapping[str, tuple[int, ...]]], anatomy: Anatomy) -> None:
    """Refuse deltas ``(out, in)`` by layer that are not those of the model's last feed-forward networks.

    Raises:
        FastMemError: naming what does not fit.
    """
    total = len(anatomy.blocks)
    if not 1 <= len(shapes) <= total:
        raise FastMemError(f"the memory is of {len(shapes)} layers, this model has {total}")
    for layer, found in enumerate(shapes, total - len(shapes)):
        expected = {name: tuple(p.weight.shape) for name, p in anatomy.projections(layer).items()}
        if dict(found) != expected:
            raise FastMemError(
                f"the memory does not fit this model: its deltas are {dict(found)}, the weights of block "
                f"{layer} are {expected}"
            )


def _by_row(settings: Mapping[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """Settings of some rows: a list where rows differed, one value where these agree."""
    chosen = {}
    for name, value in settings.items():
        values = [value[i] for i in index] if isinstance(value, list) else [value]
        chosen[name] = values[0] if all(one == values[0] for one in values) else values
    return chosen


def _joined_settings(memories: Sequence[Memory]) -> dict[str, Any]:
    """Settings of the rows of several memories."""
    every = {
        name: [
            value[row] if isinstance(value := memory.settings.get(name), list) else value
            for memory in memories
            for row in range(len(memory))
        ]
        for name in memories[0].settings
    }
    return _by_row(every, range(sum(map(len, memories))))
