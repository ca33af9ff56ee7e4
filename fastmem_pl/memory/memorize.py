"""Memorizing: a tiny LightningModule over the deltas, and the Fabric loop that fits it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fastmem_pl import kernels
from fastmem_pl.backbone import Backbone, EncodedContext, TailInputs
from fastmem_pl.backbone.backbone import pad
from fastmem_pl.backbone.fabric import check_fabric
from fastmem_pl.errors import FastMemError
from fastmem_pl.memory.delta import DeltaAdamW, FFNDelta
from fastmem_pl.memory.footprint import usable_bytes
from fastmem_pl.memory.memory import Curve, Memory
from fastmem_pl.memory.objective import Losses, MemorizationBatch, prepare
from fastmem_pl.memory.settings import MemorizationSettings, WindowSettings

# Bound of the step-0 predictions that are kept, alone and as a share of the memory at hand; the others are
# made anew at every step, for another product with the head.
_REFERENCE_BYTES, _REFERENCE_SHARE = 2 << 30, 0.2
# Room beside the context for bos, header and end of turn.
_AROUND_CONTEXT = 32


@dataclass(frozen=True)
class ReadContexts:
    """What the trunk makes of ``B`` contexts.

    Attributes:
        inputs: of the tail, ``(B, T, D)``.
        labels: token that each position predicts, ``(B, T)``.
        label_mask: true where it counts, ``(B, T)``.
    """

    inputs: TailInputs
    labels: Tensor
    label_mask: Tensor


class MemorizationModule(LightningModule):
    """Fits the deltas of ``B`` samples at once; one training step is one update of every sample.

    A plain :class:`lightning.Trainer` can fit it as well as :class:`Memorizer`: give it a loader that
    yields the same :class:`MemorizationBatch` once an epoch and ``max_epochs=settings.steps``.

    Args:
        backbone: whose last FFNs the deltas change.
        num_samples: ``B``.
        settings: of memorizing.
        rows: settings of each sample, where they differ; in ``learning_rate`` and ``kl_coeff`` they may.
        start: a memory to go on from; its KL is still from the base model.
        dense_gradients: give every delta an ordinary gradient, which losses of one's own may add to. On a GPU
            in bfloat16 a delta's gradient is otherwise left as the factors it is a product of, once a step.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_samples: int,
        settings: MemorizationSettings,
        rows: Sequence[MemorizationSettings] | None = None,
        start: Memory | None = None,
        dense_gradients: bool = False,
    ) -> None:
        super().__init__()
        self._rows = [settings] * num_samples if rows is None else list(rows)
        self._backbone = backbone
        self._tail = backbone.tail(settings.num_layers)
        self._settings = settings
        factored = kernels.usable(backbone.device, backbone.compute_dtype)
        factored = factored and not (settings.round_weights or dense_gradients)
        compact = factored and settings.optimizer_state == "auto"
        dtype = torch.bfloat16 if compact else torch.float32
        self._moved = start is not None
        started = start.deltas if start else [None] * len(self._tail.ffns)
        self.deltas = nn.ModuleList(
            FFNDelta(ffn.shapes, num_samples, backbone.device, dtype, factored, values)
            for ffn, values in zip(self._tail.ffns, started, strict=True)
        )
        # Not a buffer: precision plugins would round it.
        self.kl_coeff = torch.tensor(
            [row.kl_coeff for row in self._rows], device=backbone.device, dtype=torch.float32
        )
        self._history: list[tuple[Tensor, Tensor, Tensor]] = []
        self._untouched = self._versions()
        # Losses of the step in progress; of several, where a text is too long for one batch.
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._norms: list[Tensor] = []

    def training_step(self, batch: MemorizationBatch, batch_idx: int = 0) -> Tensor:
        """Return the sum over samples of their losses; each sample's gradient is its own."""
        return self.losses(batch).total.sum()

    def losses(self, batch: MemorizationBatch) -> Losses:
        """Loss of every sample, ``(B,)``, for a loop or a loss of one's own.

        A step ends with :meth:`configure_gradient_clipping`, which also records it in the curve. Tokens count
        by ``batch.weights``, there too.
        """
        moved = self._moved or bool(self._history) or self._versions() != self._untouched
        with self._backbone.numerics(grad=True):
            deltas = [delta.tensors() for delta in self.deltas]
            norm_every_layer = self._settings.norm_every_layer and moved
            states = self._tail.residuals(batch.inputs, batch.base, deltas, norm_every_layer=norm_every_layer)
            hidden = self._tail.final_norm(states[-1])
            losses = batch.loss(self._tail, hidden, self.kl_coeff, moved=moved)
        self._pending.append((losses.cross_entropy, losses.kl))
        return losses

    def _versions(self) -> list[int]:
        # PyTorch counts writes: an optimizer of one's own may have moved the deltas.
        return [parameter._version for parameter in self.deltas.parameters()]

    def configure_optimizers(self) -> DeltaAdamW:
        """AdamW on the deltas that decays the weights they belong to."""
        pairs = [
            (delta.weights[name], ffn.base_weights[name])
            for delta, ffn in zip(self.deltas, self._tail.ffns, strict=True)
            for name in delta.weights
        ]
        settings = self._settings
        return DeltaAdamW(
            pairs,
            [row.learning_rate for row in self._rows],
            settings.weight_decay,
            settings.round_weights,
            last_step=settings.steps,
            from_zero=not self._moved,
        )

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip each sample's gradient over all its trained tensors to ``max_grad_norm``.

        Args:
            optimizer: of :meth:`configure_optimizers`, as it is or set up by Fabric.
            args: as Lightning gives them.
            kwargs: as Lightning gives them.
        """
        plain = optimizer if isinstance(optimizer, DeltaAdamW) else optimizer.optimizer
        self._norms.append(plain.clip(self._settings.max_grad_norm))
        cross_entropy, kl = (torch.stack(values).sum(0) for values in zip(*self._pending, strict=True))
        self._pending.clear()
        self._history.append((cross_entropy, kl, self.kl_coeff))
        if self._settings.kl_target is not None:
            self.kl_coeff = adapted_kl_coeff(
                self.kl_coeff, kl, self._settings.kl_target, self._settings.kl_gain
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch where the backbone made it."""
        return batch

    def memory(self) -> Memory:
        """The deltas so far with their curves; rows that met a non-finite value get zero deltas."""
        deltas = [{n: t.detach() for n, t in delta.tensors().items()} for delta in self.deltas]
        num_samples = self.kl_coeff.shape[0]
        if not self._history:
            return self._pack(deltas, [Curve() for _ in range(num_samples)], ["ok"] * num_samples)
        cross_entropy, kl, kl_coeff = (torch.stack(values) for values in zip(*self._history, strict=True))
        norms = torch.stack(self._norms)
        finite_steps = cross_entropy.isfinite() & kl.isfinite() & norms.isfinite()
        # A norm is finite only where all is; it takes one pass and no copy.
        delta_norms = [
            torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float32)
            for layer in deltas
            for t in layer.values()
        ]
        failed = ~(finite_steps.all(0) & torch.stack(delta_norms).isfinite().all(0))
        failed_rows = failed.nonzero().flatten().tolist()
        if failed_rows:
            # Copies: who goes on training must not start anew from zero.
            deltas = [{n: t.masked_fill(failed[:, None, None], 0.0) for n, t in d.items()} for d in deltas]
        adaptive = [kl_coeff] if self._settings.kl_target is not None else []
        by_row = (values.T.tolist() for values in (cross_entropy, kl, norms, *adaptive))
        curves = [Curve(*values) for values in zip(*by_row, strict=True)]
        status = ["ok"] * num_samples
        for row in failed_rows:
            bad = (~finite_steps[:, row]).nonzero().flatten()
            step = int(bad[0]) if len(bad) else len(self._history)
            status[row] = (
                f"failed: the memorization loss is not finite at step {step}; answered by the base model"
            )
        return self._pack(deltas, curves, status)

    def _pack(self, deltas: list[dict[str, Tensor]], curves: list[Curve], status: list[str]) -> Memory:
        settings = self._settings.as_dict()
        for name in ("learning_rate", "kl_coeff"):
            values = [getattr(row, name) for row in self._rows]
            settings[name] = values[0] if len(set(values)) == 1 else values
        backbone = self._backbone
        return Memory(deltas, curves, status, settings, backbone.fingerprint(), backbone=backbone.public_name)


def context_hash(encoded: Sequence[EncodedContext]) -> str:
    """Short hash of the token ids that are memorized."""
    ids = " ".join(str(i) for part in encoded for i in part.input_ids)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def adapted_kl_coeff(kl_coeff: Tensor, kl: Tensor, target: float, gain: float) -> Tensor:
    """Next coefficient of each sample: a proportional controller in log space.

    ``kl_coeff * (1 + gain * clip(kl / target - 1, -0.2, 0.2))``; Ziegler et al., arXiv 1909.08593,
    section 2.2, where the gain is 0.1.

    >>> adapted_kl_coeff(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.1, 0.11]), 0.1, 0.1)
    tensor([0.9800, 1.0000, 1.0100])
    """
    return kl_coeff * (1 + gain * (kl / target - 1).clamp(-0.2, 0.2))


class Memorizer:
    """Turns contexts into a :class:`Memory`, driving :class:`MemorizationModule` through Fabric.

    Args:
        backbone: the frozen model.
        settings: of memorizing; keyword arguments of :class:`MemorizationSettings` do as well.
        fabric: to drive the fit with; by default one for the backbone's device.

    Raises:
        FastMemError: when the Fabric is for another device or precision than the backbone's, or for several
            processes.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: MemorizationSettings | None = None,
        fabric: Fabric | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        if settings is not None and kwargs:
            raise FastMemError(
                f"Memorizer: give settings or keyword arguments, not both ({', '.join(kwargs)})"
            )
        self.settings = settings or MemorizationSettings(**kwargs)
        backbone.tail(self.settings.num_layers)
        # Single-device whatever the outer program runs on: a distributed Fabric would average the
        # gradients of different samples. 32-true concerns the deltas; the tail chooses the type of its
        # products itself. Modules need no wrapping for either, and Fabric would keep every one that it
        # wrapped, with gradients and optimizer moments, in its list of callbacks.
        device = backbone.device
        if fabric is not None:
            check_fabric(fabric, backbone)
        self._fabric = fabric or Fabric(
            accelerator=device.type, strategy=SingleDeviceStrategy(device), precision="32-true"
        )

    def __call__(self, contexts: str | Sequence[str]) -> Memory:
        """Memorize one context, or ``B`` together; equal to ``B`` separate calls up to rounding.

        Raises:
            FastMemError: when there is none, or one of them is empty.
        """
        contexts = [contexts] if isinstance(contexts, str) else contexts
        if not contexts or not all(context.strip() for context in contexts):
            raise FastMemError("Memorizer: there is nothing to memorize; give texts that are not empty")
        encoded = [self.encode(context) for context in contexts]
        memory = self.fit(encoded)
        memory.texts = list(contexts)
        memory.context_hashes = [context_hash([part]) for part in encoded]
        return memory

    def memorize_document(
        self,
        texts: str | Sequence[str],
        windows: WindowSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Memory:
        """Memorize a text of any length, or several, as one memory.

        Args:
            texts: what to memorize; each text begins a window of its own.
            windows: how they are cut (:class:`~fastmem_pl.memory.document.WindowSettings`).
            progress: called with the number of updates done and of all, after each.

        Returns:
            a memory of one row. Of a text that fits one window, the same as that of a call with it.

        Raises:
            FastMemError: when there is nothing to memorize, or the policy does not fit the settings.
        """
        from fastmem_pl.memory.document import DocumentFit

        fit = DocumentFit(self, texts, windows)
        for done in fit.run():
            if progress:
                progress(done, fit.num_updates)
        return fit.memory()

    @property
    def context_limit(self) -> int:
        """Most context tokens that the settings and the model allow."""
        return min(self.settings.max_context_tokens, self.backbone.context_length - _AROUND_CONTEXT)

    def encode(self, context: str) -> EncodedContext:
        """Token ids of the memorization sequence, cut to what the settings and the model allow."""
        return self.backbone.chat.context(context, self.context_limit)

    def prepare(self, encoded: Sequence[EncodedContext]) -> MemorizationBatch:
        """Run the trunk once and compute all that stays constant over the steps."""
        read = self.read(encoded)
        with self.backbone.numerics():
            tail = self.backbone.tail(self.settings.num_layers)
            return prepare(tail, read.inputs, read.labels, read.label_mask, self.reference_budget())

    def reference_budget(self) -> float:
        """Bytes up to which step-0 predictions are kept."""
        return min(_REFERENCE_BYTES, _REFERENCE_SHARE * usable_bytes(self.backbone.device))

    def read(self, encoded: Sequence[EncodedContext]) -> ReadContexts:
        """Run the trunk on encoded contexts."""
        backbone = self.backbone
        ids, mask = pad([e.input_ids for e in encoded], backbone.pad_id, "right", backbone.device)
        inputs = backbone.run_trunk(self.settings.num_layers, ids)
        # Position t predicts token t + 1; the last one predicts nothing.
        label_mask = torch.zeros_like(mask, dtype=torch.bool)
        for row, item in enumerate(encoded):
            label_mask[row, max(item.header_length, 1) - 1 : len(item.input_ids) - 1] = True
        return ReadContexts(inputs, ids.roll(-1, dims=1), label_mask)

    def fit(self, encoded: Sequence[EncodedContext]) -> Memory:
        """Memorize encoded contexts. The base weights are not touched, whatever happens."""
        with self.backbone.numerics(grad=True):
            module = MemorizationModule(self.backbone, len(encoded), self.settings)
            if self.settings.steps:
                batch = self.prepare(encoded)
                for _ in self.run(module, [batch], self.settings.steps):
                    pass
            return module.memory()

    def run(
        self, module: MemorizationModule, parts: Sequence[MemorizationBatch], steps: int
    ) -> Iterator[int]:
        """Fit a module step by step.

        Args:
            module: to fit.
            parts: batches whose losses add up to that of one step; usually one.
            steps: to take.

        Yields:
            the number of steps taken so far.
        """
        plain = module.configure_optimizers()
        optimizer = self._fabric.setup_optimizers(plain)
        for step in range(steps):
            for part in parts:
                self._fabric.backward(module.training_step(part, step))
            module.configure_gradient_clipping(plain)
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1
