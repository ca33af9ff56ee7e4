"""What an export states about itself, and the measure of what it loses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fastmem_pl.backbone import Backbone, Delta, EncodedContext
from fastmem_pl.backbone.experts import cast
from fastmem_pl.base.environment import versions
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import MANIFEST, size_of
from fastmem_pl.memory import Memorizer, Memory, encoded_text
from fastmem_pl.memory.attach import spread
from fastmem_pl.memory.loss import predict

_PACKAGES = ("fastmem-pl", "torch", "transformers", "peft", "safetensors")
# Label tokens whose logits are formed together.
_LABELS = 512


@dataclass
class ExportReport:
    """What was written, and what of the memory it keeps."""

    to: str  # "lora", "checkpoint" or "memory"
    path: Path
    form: str  # of the numbers
    bytes: int
    relative_error: float  # norm of what the deltas lose, relative to theirs
    kl: float | None  # KL(exact memory || export) on the memorized text, nats a token, where that is known
    kl_base: float | None  # the same for the base model, which holds nothing of the memory
    memory: Memory  # what the export holds, to answer with
    rank: int | None = None
    tried: list[dict[str, float]] = field(default_factory=list)  # ranks that "auto" looked at, with their KL

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for export.json."""
        names = ["to", "form", "rank", "bytes", "relative_error", "kl", "kl_base"]
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in names + ["tried"] * bool(self.tried)},
            **{"model": memory.backbone, "fingerprint": memory.fingerprint, "settings": memory.settings},
            "packages": versions(_PACKAGES),
        }

    def lines(self) -> list[str]:
        """The same in words."""
        rank = f", rank {self.rank}" if self.rank else ""
        kl = "not known, as the file does not hold it (--context FILE)"
        if self.kl is not None:
            kl = f"{self.kl:.2e} nats a token (the base model's: {self.kl_base:.2e})"
        return [
            f"{self.path}: {self.to}, {self.form}{rank}, {self.bytes:,} bytes",
            f"relative error of the deltas: {self.relative_error:.2e}",
            f"KL from the exact memory on its text: {kl}",
        ]


class Deviation:
    """Measures how far an approximation of a memory of one row is from it.

    The memorized text is ``context`` where the memory does not hold it; its windows are ``encoded``, none
    where it is not known. ``kl_base`` is :meth:`kl` of the base model.
    """

    def __init__(self, memory: Memory, backbone: Backbone, context: str | None = None) -> None:
        if len(memory) != 1:
            raise FastMemError(f"export: the memory has {len(memory)} rows; take one, memory.rows([i])")
        memory.check(backbone)
        if memory.status[0] != "ok":
            raise FastMemError(f"export: memorizing it {memory.status[0].split(';')[0]}; memorize it again")
        self._memory, self._backbone = memory, backbone
        self._tail = backbone.tail(memory.num_layers)
        self.encoded: list[EncodedContext] = []
        if context is not None or memory.texts[0] is not None:
            limit = memory.settings["max_context_tokens"]
            experts = {"experts": backbone.experts, "max_experts": backbone.max_experts}
            memorizer = Memorizer(backbone, num_layers=memory.num_layers, max_context_tokens=limit, **experts)
            self.encoded = encoded_text(memory, memorizer, context)
            with backbone.numerics():
                read = list(memorizer.read_windows(self.encoded))
                self._groups = [
                    (inputs, self._tail.base(inputs, memory.deltas), mask) for inputs, _, mask in read
                ]
                self._labels = torch.cat([labels[mask] for _, labels, mask in read])
                self._exact = self._hidden(memory.deltas)
        self.kl_base = self.kl(None)

    def kl(self, deltas: Sequence[Delta] | None) -> float | None:
        """``KL(p_memory || p_other)``, nats a token, averaged over the label tokens of the memorized text.

        The other's ``deltas`` are ``(1, out, in)`` each, by layer, or ``None`` for the base model. The result
        is ``None`` where the text is not known.
        """
        if not self.encoded:
            return None
        tail, total = self._tail, 0.0
        with self._backbone.numerics():
            changes = self._hidden(deltas) - self._exact
            split = (tensor.split(_LABELS) for tensor in (self._exact, changes, self._labels))
            for hidden, change, labels in zip(*split, strict=True):
                ones = hidden.new_ones(len(hidden))
                out = tail.head_weight.new_empty(len(hidden), tail.head_weight.shape[0])
                _, kl = predict(tail, hidden, labels).loss(tail, change, ones, ones, out)
                total += kl.sum().item()
        # Rounding may leave a tiny negative sum where nothing differs.
        return max(total, 0.0) / len(changes)

    @torch.no_grad()
    def kl_of_weights(self, state: dict[str, Tensor]) -> float | None:
        """The same of the model with other weights, by the model's own code."""
        backbone, total, count = self._backbone, 0.0, 0
        # Window by window: the probabilities of a whole vocabulary are large.
        for part in self.encoded:
            given = {"input_ids": torch.tensor([part.input_ids], device=backbone.device), "use_cache": False}
            with backbone.numerics(), backbone.autocast(), self._memory.attached(backbone):
                memorized = backbone.model(**given).logits
            with backbone.numerics():
                rewritten = functional_call(backbone.model, state, (), given).logits
            # (N, V) each, at the positions that have a label.
            labelled = slice(part.header_length - 1, -1)
            exact, other = (x[0, labelled].float().log_softmax(-1) for x in (memorized, rewritten))
            total += (exact.exp() * (exact - other)).sum().item()
            count += len(exact)
        return max(total, 0.0) / count if count else None

    def _hidden(self, deltas: Sequence[Delta] | None) -> Tensor:
        """The head's input at all label tokens, ``(N, D)``."""
        device, dtype = self._backbone.device, self._backbone.compute_dtype
        # Cast once: a copy for every row would be made of what is cast after it is expanded.
        placed = deltas and [cast(layer, dtype, device) for layer in deltas]
        parts = []
        for inputs, base, mask in self._groups:
            served = placed and [spread(layer, len(mask)) for layer in placed]
            parts.append(self._tail.hidden(inputs, base, served)[mask])
        return torch.cat(parts)

    def report(
        self, to: str, out: Path, form: str, deltas: list[Delta], written: Path | None = None, **further: Any
    ) -> ExportReport:
        """What an export states that holds these deltas; ``kl`` is theirs unless it is given.

        ``written`` is the folder that takes the place of ``out``; it gets the statement as ``export.json``.
        """
        further = further if "kl" in further else {"kl": self.kl(deltas), **further}
        error, memory = relative_error(self._memory.deltas, deltas), replace(self._memory, deltas=deltas)
        report = ExportReport(
            to, out, form, size_of(written or out), error, kl_base=self.kl_base, memory=memory, **further
        )
        if written is not None:
            # With the names of the files that are the export, so that it can be replaced.
            stated = {**report.as_dict(), "files": sorted(path.name for path in written.iterdir())}
            (written / MANIFEST).write_text(json.dumps(stated, indent=2) + "\n")
        return report


def relative_error(exact: Sequence[Delta], other: Sequence[Delta]) -> float:
    """Norm of the difference of deltas, relative to that of the exact ones."""
    lost = whole = 0.0
    for ours, theirs in zip(exact, other, strict=True):
        for name, delta in ours.items():
            if not delta.is_floating_point():
                continue
            wide = delta.double()
            whole += wide.square().sum().item()
            lost += (wide - theirs[name].to(wide.device)).square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0
