"""What memorizing leaves behind, in process and on disk."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fastmem_pl.backbone import Backbone, find_anatomy, fingerprint_of
from fastmem_pl.backbone.anatomy import Anatomy
from fastmem_pl.backbone.experts import cast
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import as_path
from fastmem_pl.memory import files
from fastmem_pl.memory.attach import attached, check_shapes, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Attributes that hold a value for each row.
_BY_ROW = ("curves", "status", "texts", "context_hashes")


@dataclass
class Curve:
    """One value a step, from before its update; ``kl_coeff`` only where it is adapted."""

    cross_entropy: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    kl_coeff: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float | None]]:
        """The lists by name, for JSON: values that are not finite become ``None``."""
        return {
            name: [value if math.isfinite(value) else None for value in values]
            for name, values in vars(self).items()
            if name != "kl_coeff" or values
        }

    @classmethod
    def from_dict(cls, values: dict[str, list[float | None]]) -> Self:
        """Inverse of :meth:`as_dict`."""
        return cls(**{n: [math.nan if v is None else v for v in row] for n, row in values.items()})


@dataclass(repr=False)
class Memory:
    """Memorized contexts: one row a sample.

    Deltas ``gate`` and ``up`` are ``(B, F, D)``, ``down`` is ``(B, D, F)``.
    """

    deltas: list[dict[str, Tensor]]  # per trained layer, lowest first
    curves: list[Curve]  # one a row, as status, texts and context_hashes
    status: list[str]  # "ok" or what failed; a failed row holds zero deltas (the base model)
    settings: dict[str, Any]  # those of memorizing; a list where rows differ
    fingerprint: str  # of the backbone that the deltas belong to
    texts: list[str | None] = field(default_factory=list)  # what was memorized, where it is known
    context_hashes: list[str | None] = field(default_factory=list)  # of its token ids
    backbone: str = ""  # its name
    windows: dict[str, Any] | None = None  # how a long text was cut, on the memory of a document

    def __post_init__(self) -> None:
        self.texts = self.texts or [None] * len(self.curves)
        self.context_hashes = self.context_hashes or [None] * len(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def __repr__(self) -> str:
        rows = "1 context" if len(self) == 1 else f"{len(self)} contexts"
        losses = [curve.cross_entropy for curve in self.curves if curve.cross_entropy]
        means = [f"{fmean(loss[i] for loss in losses):.2f}" for i in (0, -1)] if losses else []
        fell = f", cross-entropy {' -> '.join(means)}" if means else ""
        megabytes = sum(tensor.nbytes for layer in self.deltas for tensor in layer.values()) / 1e6
        steps = self.settings.get("steps")
        return f"Memory({rows}, {steps} steps{fell}, {megabytes:.1f} MB, model {self.backbone!r})"

    @property
    def num_layers(self) -> int:
        """Number of trained layers."""
        return len(self.deltas)

    @property
    def curve(self) -> Curve:
        """The curve of a memory of one row."""
        if len(self) != 1:
            raise FastMemError(f"memory.curve: there are {len(self)}; take one of memory.curves")
        return self.curves[0]

    def plot(self) -> "Figure":
        """Cross-entropy and KL (nats a token) over the steps, a line a row."""
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
        # Notebooks show what is returned, and what pyplot keeps once more.
        pyplot.close(figure)
        for axes, name in zip(panels, ("cross_entropy", "kl"), strict=True):
            for row, curve in enumerate(self.curves):
                axes.plot(getattr(curve, name), marker=".", label=f"row {row}")
            axes.set(title=name.replace("_", "-"), xlabel="step", ylabel="nats a token")
            if 1 < len(self) <= 10:
                axes.legend(fontsize="small")
        return figure

    def rows(self, indices: Sequence[int]) -> Self:
        """Pick rows, repeats allowed: ``memory.rows([0, 0])`` serves two questions on one context."""
        index = torch.tensor(indices, device=next(iter(self.deltas[0].values())).device)
        return replace(
            self,
            deltas=[{n: t.index_select(0, index) for n, t in layer.items()} for layer in self.deltas],
            settings=joined_settings([self._settings_of(i) for i in indices]),
            **{name: [getattr(self, name)[i] for i in indices] for name in _BY_ROW},
        )

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Self:
        """The same memory with deltas of another type, or elsewhere."""
        return replace(self, deltas=[cast(layer, dtype, device) for layer in self.deltas])

    @classmethod
    def stack(cls, memories: Sequence[Self]) -> Self:
        """Join memories of one backbone and number of layers into one batch, one row after the other."""
        if not memories:
            raise FastMemError("Memory.stack: no memories; give one or more")
        first = memories[0]
        for what in ("fingerprint", "num_layers"):
            values = sorted({getattr(memory, what) for memory in memories})
            if len(values) > 1:
                raise FastMemError(f"Memory.stack: {what}: {values} differ; a batch has one")
        shapes = [[{n: t.shape[1:] for n, t in d.items()} for d in memory.deltas] for memory in memories]
        if any(found != shapes[0] for found in shapes):
            raise FastMemError(
                "Memory.stack: the memories are of different experts, or of different numbers of them; "
                "memorize with the same model.memorize.experts and max_experts"
            )
        deltas = [
            {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}
            for layers in zip(*(memory.deltas for memory in memories), strict=True)
        ]
        settings = joined_settings([m._settings_of(row) for m in memories for row in range(len(m))])
        joined = {name: [value for memory in memories for value in getattr(memory, name)] for name in _BY_ROW}
        return replace(first, deltas=deltas, settings=settings, windows=None, **joined)

    def check(self, model: Any) -> Anatomy:
        """Refuse another model, with both fingerprints or the shapes that differ; returns its anatomy."""
        loaded = isinstance(model, Backbone)
        fingerprint = model.fingerprint() if loaded else fingerprint_of(model)
        if self.fingerprint != fingerprint:
            raise files.other_model("the memory", self.backbone, self.fingerprint, fingerprint)
        routed = "routed" if "experts" in self.deltas[0] else "auto"
        anatomy = self.on(model).anatomy if loaded else find_anatomy(model, routed)
        check_shapes([{n: tuple(t.shape[1:]) for n, t in layer.items()} for layer in self.deltas], anatomy)
        return anatomy

    def on(self, backbone: Backbone) -> Backbone:
        """The backbone with memories on the experts that this one is of, where that is another kind."""
        if (
            self.fingerprint != backbone.fingerprint()
            or ("experts" in self.deltas[0]) == backbone.anatomy.routed
        ):
            return backbone
        return backbone.with_experts("shared" if backbone.anatomy.routed else "routed", backbone.max_experts)

    def serving(self, backbone: Backbone, count: int) -> list[dict[str, Tensor]]:
        """The deltas for ``count`` sequences, a multiple of the rows, in the backbone's compute type."""
        self.check(backbone)
        placed = self.to(backbone.compute_dtype, backbone.device)
        return [spread(layer, count) for layer in placed.deltas]

    def attached(self, model: Any) -> AbstractContextManager[None]:
        """Let a transformers model use this memory: its forward pass, and with it ``generate``.

        A trained last block feeds no attention, so a memory may come and go in the middle of a ``generate``
        call: the KV cache is the same with and without it. With several trained layers it is not, and a
        backbone of the same model must not be asked meanwhile. One row serves all sequences; of ``B`` rows,
        each serves all beams and returned sequences of its prompt. ``model`` may be a ``Backbone``.

        Raises:
            FastMemError: where one is attached already; inside, where the rows do not fit the batch.
        """
        anatomy = self.check(model)
        return attached(anatomy, self.deltas, model.compute_dtype if isinstance(model, Backbone) else None)

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
            form: ``float32``; ``bfloat16`` (half the size; products with a memory run in the backbone's
                compute type, so for a bfloat16 model nothing is lost); ``int8`` (a quarter); ``low-rank``. A
                type of PyTorch does as well.
            text: keep the memorized text, where it is known, in the file.
            factors: of every delta by layer, ``(out, r)`` and ``(r, in)``, for ``low-rank``.
            extra: further text for the header.
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
            "settings": json.dumps(self._settings_of(row)),
            "curve": json.dumps(self.curves[row].as_dict()),
            "status": self.status[row],
            "backbone": self.backbone,
            "windows": json.dumps(self.windows) if self.windows else None,
            "text": self.texts[row] if text else None,
            "context_hash": self.context_hashes[row],
            **extra,
        }
        files.write(as_path(path), tensors, {n: value for n, value in header.items() if value is not None})

    @classmethod
    def load(
        cls,
        path: str | Path,
        fingerprint: str | Backbone | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Read one memory (nothing in the file is executed); its deltas go to ``device``.

        A damaged or altered file is refused, with a ``fingerprint`` also a memory of another backbone, and
        with a backbone also other shapes.
        """
        anatomy = None
        if isinstance(fingerprint, Backbone):
            fingerprint, anatomy = fingerprint.fingerprint(), fingerprint.anatomy
        values, deltas = files.read(path, fingerprint, anatomy)
        return cls(
            [{name: t.to(device)[None] for name, t in layer.items()} for layer in deltas],
            [Curve.from_dict(values["curve"])],
            [values["status"]],
            texts=[values["text"]],
            context_hashes=[values["context_hash"]],
            **{name: values[name] for name in ("settings", "fingerprint", "backbone", "windows")},
        )

    def _settings_of(self, row: int) -> dict[str, Any]:
        return {name: v[row] if isinstance(v, list) else v for name, v in self.settings.items()}


def joined_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of several rows as one mapping, with a list where they differ."""
    joined = {name: [settings.get(name) for settings in rows] for name in rows[0]}
    return {n: values[0] if all(v == values[0] for v in values) else values for n, values in joined.items()}
