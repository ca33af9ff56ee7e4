"""Memorizing as a tiny LightningModule over the deltas."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fastmem_pl import kernels
from fastmem_pl.backbone import Backbone, Delta
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.memory.delta import DeltaAdamW, FFNDelta
from fastmem_pl.memory.loss import Losses, MemorizationBatch, SoftTargetLoss
from fastmem_pl.memory.memory import Curve, Memory, joined_settings
from fastmem_pl.memory.settings import MemorizationSettings


class MemorizationModule(LightningModule):
    """Fits the deltas of ``B`` samples at once; one training step is one update of every sample.

    A plain :class:`lightning.Trainer` can fit it as well as :class:`Memorizer`: give it a loader that
    yields the same :class:`MemorizationBatch` once an epoch and ``max_epochs=settings.steps``.

    Args:
        rows: settings of each sample, which may differ in ``learning_rate`` and ``kl_coeff``.
        start: a memory to go on from; its KL is still from the base model.
        dense_gradients: give every delta an ordinary gradient, which losses of one's own may add to. On a GPU
            in bfloat16 a delta's gradient is otherwise left as the factors it is a product of, once a step.
    """

    optimizer_class = DeltaAdamW

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
        self._backbone, self.settings = backbone, settings
        self._tail = backbone.tail(settings.num_layers)
        factored = kernels.usable(backbone.device, backbone.compute_dtype)
        factored = factored and not dense_gradients
        compact = factored and settings.optimizer_state == "auto"
        dtype = torch.bfloat16 if compact else torch.float32
        self._moved = start is not None
        started = start.deltas if start else [None] * len(self._tail.ffns)
        if start and self._tail.routed and start.deltas[0]["experts"].shape[1] != self._tail.ffns[0].count:
            raise FastMemError(
                f"start: the memory holds {start.deltas[0]['experts'].shape[1]} experts, the settings "
                f"{self._tail.ffns[0].count}; set model.memorize.max_experts to as many"
            )
        with backbone.numerics(grad=True):
            self.deltas = nn.ModuleList(
                FFNDelta(ffn.shapes, num_samples, backbone.device, dtype, factored, values)
                for ffn, values in zip(self._tail.ffns, started, strict=True)
            )
            # Not a buffer: precision plugins would round it.
            self.kl_coeff = torch.tensor([row.kl_coeff for row in self._rows], device=backbone.device)
        # Of routed experts, which the deltas are of, (B, K): the first batch decides it.
        self._experts = (
            start.deltas[0]["experts"].to(backbone.device) if start and self._tail.routed else None
        )
        self._expert_weights: dict[str, Tensor] = {}
        # Of every step: the values of a curve, (4, B).
        self._history: list[Tensor] = []
        # (2, B) of the step in progress; several where a text is too long for one batch.
        self._pending: list[Tensor] = []
        self._untouched = self._versions()

    def training_step(self, batch: MemorizationBatch, batch_idx: int = 0) -> Tensor:
        """Return the sum over samples of their losses; each sample's gradient is its own."""
        return self.losses(batch).total.sum()

    def losses(self, batch: MemorizationBatch) -> Losses:
        """Loss of every sample, ``(B,)``, for a loop or a loss of one's own.

        A step ends with :meth:`configure_gradient_clipping`, which also records it in the curve.
        """
        moved = self._moved or bool(self._history) or self._versions() != self._untouched
        with self._backbone.numerics(grad=True):
            hidden = self.hidden(batch, self._current(), moved)
            labelled = hidden.flatten(0, 1)[batch.positions]
            losses = Losses(*SoftTargetLoss.apply(labelled, self._tail, batch, self.kl_coeff, moved))
        self._pending.append(torch.stack([losses.cross_entropy, losses.kl]))
        return losses

    def hidden(self, batch: MemorizationBatch, deltas: Sequence[Delta], moved: bool) -> Tensor:
        """Hidden states that the losses come from, ``(B, T, D)``; ``moved`` after the first update."""
        return self._tail.hidden(batch.inputs, batch.base, deltas)

    def choose_experts(self, parts: Sequence[MemorizationBatch]) -> None:
        """Train the routed experts that were chosen for these batches, before the first step."""
        if not self._tail.routed or self._experts is not None:
            return
        shape = len(self._rows), self._tail.ffns[0].count
        none = torch.full(shape, -1, device=self._backbone.device)
        self._experts = (parts[0].inputs.routing.chosen if parts else none)[..., None]
        # Gathered for the products already; the decay needs them as they are stored.
        weights = parts[0].base.of_rows[0] if parts else {}
        stored = self._backbone.anatomy.head.weight.dtype
        self._expert_weights = weights if all(w.dtype is stored for w in weights.values()) else {}

    def _current(self) -> list[Delta]:
        deltas = [dict(delta.items()) for delta in self.deltas]
        return [{**deltas[0], "experts": self._experts}] if self._tail.routed else deltas

    def _versions(self) -> list[int]:
        # PyTorch counts writes: an optimizer of one's own may have moved the deltas.
        return [parameter._version for parameter in self.deltas.parameters()]

    def configure_optimizers(self) -> DeltaAdamW:
        """AdamW on the deltas that decays the weights they belong to."""
        weights = [ffn.base_weights for ffn in self._tail.ffns]
        if self._tail.routed:
            if self._experts is None:
                raise FastMemError(
                    "MemorizationModule: the routed experts to train are not chosen; call "
                    "choose_experts([batch]) before the fit"
                )
            gathered = self._expert_weights or self._tail.ffns[0].base_weights(self._experts.squeeze(-1))
            weights = [gathered]
        pairs = [(d[n], base[n]) for d, base in zip(self.deltas, weights, strict=True) for n in d]
        rates, settings = [row.learning_rate for row in self._rows], self.settings
        moments = {"last_step": settings.steps, "from_zero": not self._moved}
        return self.optimizer_class(pairs, rates, settings.weight_decay, **moments)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip each sample's gradient over all its trained tensors to ``max_grad_norm``; ends the step."""
        settings = self.settings
        plain = optimizer if isinstance(optimizer, DeltaAdamW) else optimizer.optimizer
        norms = plain.clip(settings.max_grad_norm)
        cross_entropy, kl = sum(self._pending)
        self._pending.clear()
        self._history.append(torch.stack([cross_entropy, kl, norms, self.kl_coeff]))
        if settings.kl_target is not None:
            # A proportional controller in log space: Ziegler et al., arXiv 1909.08593, section 2.2.
            error = (kl / settings.kl_target - 1).clamp(-0.2, 0.2)
            self.kl_coeff = self.kl_coeff * (1 + settings.kl_gain * error)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch where the backbone made it."""
        return batch

    def memory(self) -> Memory:
        """The deltas so far with their curves; rows that met a non-finite value get zero deltas."""
        settings, backbone, count = self.settings, self._backbone, len(self._rows)
        with backbone.numerics():
            self.choose_experts([])
            deltas = [{n: t.detach() for n, t in delta.items()} for delta in self._current()]
            history = torch.stack(self._history) if self._history else self.kl_coeff.new_empty(0, 4, count)
            if settings.kl_target is None:
                history = history[:, :3]
            finite_steps = history.isfinite().all(1)
            # A norm is finite only where all is; it takes one pass and no copy.
            norms = [
                torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float32)
                for layer in deltas
                for t in layer.values()
                if t.is_floating_point()
            ]
            failed = ~(finite_steps.all(0) & torch.stack(norms).isfinite().all(0))
            if failed.any():
                # Copies: who goes on training must not start anew from zero.
                deltas = [{n: t.masked_fill(failed[:, None, None], 0) for n, t in d.items()} for d in deltas]
        status = ["ok"] * count
        for row in failed.nonzero().flatten().tolist():
            step = [*finite_steps[:, row].tolist(), False].index(False)
            status[row] = (
                f"failed: the memorization loss is not finite at step {step}; answered by the base model"
            )
        curves = [Curve(*values) for values in history.permute(2, 1, 0).tolist()]
        rows = [replace(settings, learning_rate=r.learning_rate, kl_coeff=r.kl_coeff) for r in self._rows]
        stated = joined_settings([row.as_dict() for row in rows])
        return Memory(deltas, curves, status, stated, backbone.fingerprint(), backbone=backbone.public_name)
