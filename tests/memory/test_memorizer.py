"""Memorizing with a Fabric, a loop or a loss of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from memories import QUESTIONS, STRONG, TEXT, assert_deltas, loss_of

from fastmem_pl import (
    Backbone,
    FastMemError,
    MemorizationModule,
    MemorizationSettings,
    Memorizer,
    Memory,
    answer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_fabric_of_ones_own(tiny_folder: Path, backbone, memory: Memory, precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    mine = Backbone.load(str(tiny_folder), fabric=fabric)
    assert mine.precision == precision
    weights = {p.dtype for p in mine.model.parameters()}
    assert (torch.bfloat16 in weights) == (precision == "bf16-true")
    found = Memorizer(mine, **STRONG, fabric=fabric)([TEXT])
    assert found.curve.cross_entropy == pytest.approx(memory.curve.cross_entropy, rel=0.05)
    assert found.curve.cross_entropy[-1] < found.curve.cross_entropy[0] - 1
    if precision == "32-true":
        assert mine.fingerprint() == backbone.fingerprint()
        assert_deltas(found, memory, 1e-6)
        assert answer(mine, QUESTIONS[0], None, found) == answer(backbone, QUESTIONS[0], None, memory)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_a_precision_that_memories_lack_is_refused(tiny_folder: Path, backbone, precision: str) -> None:
    # Asked for 16-mixed on a CPU, Fabric takes another one by itself.
    plugins = MixedPrecision("16-mixed", "cuda") if precision == "16-mixed" else None
    fabric = Fabric(accelerator="cpu", precision=None if plugins else precision, plugins=plugins)
    for use in (
        lambda: Backbone.load(str(tiny_folder), fabric=fabric),
        lambda: Memorizer(backbone, **STRONG, fabric=fabric)([TEXT]),
    ):
        with pytest.raises(FastMemError, match=precision):
            use()


def test_many_processes_are_refused(tiny_folder: Path, backbone) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(FastMemError, match=r"device|process"):
        Memorizer(backbone, **STRONG, fabric=fabric)([TEXT])


def test_losses_make_ones_own_loop(backbone, contexts: list[str]) -> None:
    settings = MemorizationSettings(**STRONG, kl_coeff=0.3)
    memorizer = Memorizer(backbone, settings)
    expected = memorizer(contexts)
    module = MemorizationModule(backbone, len(contexts), settings, dense_gradients=True)
    prepared = memorizer.prepare([memorizer.encode(context) for context in contexts])
    optimizer = module.configure_optimizers()
    curves: list[list[list[float]]] = [[], []]
    for _ in range(settings.steps):
        losses = module.losses(prepared)
        assert losses.total.shape == losses.cross_entropy.shape == losses.kl.shape == (len(contexts),)
        assert losses.total.requires_grad
        torch.testing.assert_close(losses.total, losses.cross_entropy + 0.3 * losses.kl, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        losses.total.sum().backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        curves[0].append(losses.cross_entropy.tolist())
        curves[1].append(losses.kl.tolist())
    for row, curve in enumerate(expected.curves):
        assert [values[row] for values in curves[0]] == pytest.approx(curve.cross_entropy, rel=1e-4)
        assert [values[row] for values in curves[1]] == pytest.approx(curve.kl, rel=1e-3, abs=1e-5)
    assert_deltas(module.memory(), expected, 2e-3)


@pytest.mark.parametrize("whose", ["mine", "the module's"])
def test_ones_own_loss_moves_a_memory(backbone, memory: Memory, whose: str) -> None:
    settings = MemorizationSettings(**STRONG)
    memorizer = Memorizer(backbone, settings)
    module = MemorizationModule(backbone, 1, settings, dense_gradients=True)
    prepared = memorizer.prepare([memorizer.encode(TEXT)])
    mine = torch.optim.SGD(module.parameters(), lr=0.5)
    optimizer = mine if whose == "mine" else module.configure_optimizers()
    values = []
    for _ in range(4):
        loss = (module.losses(prepared).total - 5.0).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
        if optimizer is not mine:
            module.configure_gradient_clipping(optimizer)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[1] < values[0]
    # What the last losses say is what a plain model with these deltas says.
    found = module.losses(prepared).cross_entropy.item()
    with replace(memory, deltas=module.memory().deltas).attached(backbone):
        assert found == pytest.approx(loss_of(backbone.model, memorizer.encode(TEXT)), rel=1e-4)
