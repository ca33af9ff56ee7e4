"""Memorizing: what the trunk makes of contexts, and the Fabric loop that fits a module to it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor

from fastmem_pl.backbone import Backbone, EncodedContext, TailInputs, pad, usable_bytes
from fastmem_pl.backbone.settings import fabric_settings
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.base.progress import report
from fastmem_pl.memory.loss import MemorizationBatch, prepare
from fastmem_pl.memory.memory import Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.settings import MemorizationSettings

# Bound of the step-0 predictions that are kept, alone and as a share of the memory at hand; the others are
# made anew at every step, for another product with the head.
_REFERENCE_BYTES, _REFERENCE_SHARE = 2 << 30, 0.2
# Tokens of one trunk pass over windows of a long text.
_TOKENS_AT_ONCE = 8192
# Room beside the context for bos, header and end of turn.
_AROUND_CONTEXT = 32


def context_hash(encoded: Sequence[EncodedContext]) -> str:
    """Short hash of the token ids that are memorized."""
    ids = " ".join(str(i) for part in encoded for i in part.input_ids)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def listed_texts(texts: str | Sequence[str]) -> list[str]:
    """One text or several as a list; refuses none, and empty ones."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(text.strip() for text in texts):
        raise FastMemError("there is nothing to memorize; give texts that are not empty")
    return texts


class Memorizer:
    """Turns contexts into a :class:`Memory`, driving :class:`MemorizationModule` through Fabric.

    Keyword arguments of :class:`MemorizationSettings` do as well as settings. The ``fabric`` that drives the
    fit is by default one for the backbone's device.

    Raises:
        FastMemError: when the Fabric is for another device or precision than the backbone's, or for several
            processes.
    """

    module_class: type[MemorizationModule] = MemorizationModule

    def __init__(
        self,
        backbone: Backbone,
        settings: MemorizationSettings | None = None,
        fabric: Fabric | None = None,
        **kwargs: Any,
    ) -> None:
        if settings is not None and kwargs:
            raise FastMemError(f"Memorizer: give settings or {', '.join(kwargs)}, not both")
        self.settings = settings or MemorizationSettings(**kwargs)
        self.backbone = backbone = backbone.with_experts(self.settings.experts, self.settings.max_experts)
        # Of the trunk's passes, which a profile lists apart; this one measures nothing.
        self.meter = PhaseMeter(backbone.device)
        backbone.tail(self.settings.num_layers)
        if fabric is not None:
            _check_fabric(fabric, backbone)
        # Single-device whatever the outer program runs on: a distributed Fabric would average the
        # gradients of different samples. 32-true concerns the deltas; the tail chooses the type of its
        # products itself. Modules need no wrapping for either, and Fabric would keep every one that it
        # wrapped, with gradients and optimizer moments, in its list of callbacks.
        device = backbone.device
        self._fabric = fabric or Fabric(
            accelerator=device.type, strategy=SingleDeviceStrategy(device), precision="32-true"
        )

    def __call__(self, contexts: str | Sequence[str]) -> Memory:
        """Memorize one context, or ``B`` together; equal to ``B`` separate calls up to rounding."""
        contexts = listed_texts(contexts)
        encoded = [self.encode(context) for context in contexts]
        memory = self.fit(encoded)
        memory.texts = contexts
        memory.context_hashes = [context_hash([part]) for part in encoded]
        return memory

    @property
    def context_limit(self) -> int:
        """Most context tokens that the settings and the model allow."""
        return min(self.settings.max_context_tokens, self.backbone.context_length - _AROUND_CONTEXT)

    def encode(self, context: str) -> EncodedContext:
        """Token ids of the memorization sequence, cut to what the settings and the model allow."""
        return self.backbone.chat.context(context, self.context_limit)

    def read(self, encoded: Sequence[EncodedContext]) -> tuple[TailInputs, Tensor, Tensor]:
        """Run the trunk: gives inputs of the tail, ``(B, T, D)``, and by position, ``(B, T)``, the token that
        it predicts and whether that counts.
        """
        backbone = self.backbone
        tokens = sum(item.context_tokens for item in encoded)
        with backbone.numerics():
            with self.meter.detail("trunk", samples=len(encoded), tokens=tokens):
                ids, mask = pad([e.input_ids for e in encoded], backbone.pad_id, "right", backbone.device)
                inputs = backbone.run_trunk(self.settings.num_layers, ids)
            # Position t predicts token t + 1; the last one predicts nothing.
            label_mask = torch.zeros_like(mask, dtype=torch.bool)
            for row, item in enumerate(encoded):
                label_mask[row, max(item.header_length, 1) - 1 : len(item.input_ids) - 1] = True
            return inputs, ids.roll(-1, dims=1), label_mask

    def read_windows(self, encoded: Sequence[EncodedContext]) -> Iterator[tuple[TailInputs, Tensor, Tensor]]:
        """As :meth:`read`, of as many contexts at a time as one pass takes.

        With one trained layer, above which is no attention, the positions that have a label become one row.
        """
        tail = self.backbone.tail(self.settings.num_layers)
        # What is replayed is of whole windows.
        joins = self.settings.num_layers == 1 and not tail.replays
        count = max(1, _TOKENS_AT_ONCE // max(len(part.input_ids) for part in encoded)) if joins else 1
        for start in range(0, len(encoded), count):
            inputs, labels, mask = self.read(encoded[start : start + count])
            if joins:
                with self.backbone.numerics():
                    inputs, labels = inputs.at(mask), labels[mask][None]
                    mask = torch.ones_like(labels, dtype=torch.bool)
            yield inputs, labels, mask

    def prepare(self, encoded: Sequence[EncodedContext], start: Memory | None = None) -> MemorizationBatch:
        """Run the trunk once and compute all that stays constant over the steps, from ``start`` on."""
        return self.prepare_read(*self.with_experts([self.read(encoded)], start)[0])

    def with_experts(
        self, passes: Sequence[tuple[TailInputs, Tensor, Tensor]], start: Memory | None = None
    ) -> list[tuple[TailInputs, Tensor, Tensor]]:
        """What :meth:`read` gave, with the routed experts, if there are any, that its memory will hold."""
        tail = self.backbone.tail(self.settings.num_layers)
        if not tail.routed:
            return list(passes)
        if start is None:
            chosen = tail.ffns[0].choose([(inputs.routing, mask) for inputs, _, mask in passes])
        else:
            chosen = start.deltas[0]["experts"].squeeze(-1).to(self.backbone.device)
        return [
            (replace(inputs, routing=replace(inputs.routing, chosen=chosen)), labels, mask)
            for inputs, labels, mask in passes
        ]

    def prepare_read(
        self, inputs: TailInputs, labels: Tensor, label_mask: Tensor, share: float = 1.0
    ) -> MemorizationBatch:
        """As :meth:`prepare` after :meth:`read`, with a share of the memory for step-0 predictions."""
        budget = share * min(_REFERENCE_BYTES, _REFERENCE_SHARE * usable_bytes(self.backbone.device))
        with self.backbone.numerics():
            return prepare(self.backbone.tail(self.settings.num_layers), inputs, labels, label_mask, budget)

    def fit(self, encoded: Sequence[EncodedContext]) -> Memory:
        """Memorize encoded contexts. The base weights are not touched, whatever happens."""
        module = self.module_class(self.backbone, len(encoded), self.settings)
        for _ in self.run(module, [self.prepare(encoded)] if self.settings.steps else []):
            pass
        return module.memory()

    def run(self, module: MemorizationModule, parts: Sequence[MemorizationBatch]) -> Iterator[int]:
        """Take the steps of a module's settings, each on all parts; yields the number taken so far."""
        module.choose_experts(parts)
        numerics = partial(self.backbone.numerics, grad=True)
        with numerics():
            plain = module.configure_optimizers()
            optimizer = self._fabric.setup_optimizers(plain)
        for step in range(module.settings.steps):
            # Not around the loop: who gets the numbers runs in between.
            with numerics():
                for part in parts:
                    self._fabric.backward(module.training_step(part, step))
                module.configure_gradient_clipping(plain)
                optimizer.step()
                optimizer.zero_grad()
            report("memorizing", step + 1, module.settings.steps)
            yield step + 1

    def snapshots(
        self,
        read: tuple[TailInputs, Tensor, Tensor],
        rows: Sequence[MemorizationSettings],
        stops: Sequence[int],
    ) -> Iterator[tuple[int, Memory]]:
        """Memorize one context, after :meth:`read`, under settings that differ in learning rate and kl_coeff.

        Yields each of the ``stops``, ascending numbers of steps, with all rows' memory then: fewer steps
        are the beginning of more. Its deltas go on being trained: use or copy them before the next.
        """
        count, settings = len(rows), replace(self.settings, steps=max(stops))
        module = self.module_class(self.backbone, count, settings, rows)
        inputs, labels, mask = read
        # One context as that many rows, in the same memory.
        expanded = inputs.expand(count), labels.expand(count, -1), mask.expand(count, -1)
        parts = [self.prepare_read(*self.with_experts([expanded])[0])] if settings.steps else []
        steps, taken = self.run(module, parts), 0
        for stop in stops:
            while taken < stop:
                taken = next(steps)
            yield stop, module.memory()


def _check_fabric(fabric: Fabric, backbone: Backbone) -> None:
    """Refuse a Fabric that would change what memorizing computes."""
    if not isinstance(fabric.strategy, SingleDeviceStrategy):
        raise FastMemError(
            f"fabric: {type(fabric.strategy).__name__} would average the gradients of different samples; "
            "allowed: one device, so give each process a Fabric of its own (devices=1, no strategy)"
        )
    precision, device = fabric_settings(fabric)
    same_device = (device.type, device.index or 0) == (backbone.device.type, backbone.device.index or 0)
    if precision != backbone.precision or not same_device:
        raise FastMemError(
            f"fabric: it is for {precision} on {device}, the backbone for {backbone.precision} on "
            f"{backbone.device}; load it with Backbone.load(..., fabric=fabric)"
        )
