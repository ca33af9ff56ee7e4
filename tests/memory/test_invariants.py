"""Several ways to memorize give the same curves and deltas."""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, snapshot
from lightning.pytorch import Trainer
from memories import assert_same, plain_fit
from torch.utils.data import DataLoader

from fastmem_pl import MemorizationModule, MemorizationSettings, Memorizer
from fastmem_pl.memory import DeltaAdamW
from fastmem_pl.memory import loss as objective
from fastmem_pl.run.published import RoundedAdamW, RoundWeights

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"steps": 6, "learning_rate": 1e-3, "kl_coeff": 0.3}


@pytest.mark.parametrize(
    ("family", "changed", "num_layers"),
    [("llama", {}, 1), ("llama", {}, 2), ("gemma2", {"final_logit_softcapping": 2.0}, 1)],
    ids=str,
)
def test_equals_the_published_algorithm(make_tiny, contexts, family, changed, num_layers):
    backbone = make_tiny(family, **changed)
    memorizer = Memorizer(backbone, num_layers=num_layers, **STRONG)
    memory = memorizer(contexts)
    for row, context in enumerate(contexts):
        expected, deltas, _ = plain_fit(
            backbone, [[memorizer.encode(context)]], num_layers=num_layers, **STRONG
        )
        curve = memory.curves[row]
        found = torch.tensor([curve.cross_entropy, curve.kl, curve.grad_norm]).T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
        ours = [layer[name][row] for layer in memory.deltas for name in ("gate", "up", "down")]
        for delta, wanted in zip(ours, deltas, strict=True):
            assert (delta - wanted).norm() / wanted.norm() < 2e-3


def test_deltas_are_nearer_to_float64_than_edited_float32_weights_which_rounded_ones_follow(tiny, contexts):
    # At the paper's learning rate updates are some hundred rounding steps of a float32 weight or less.
    settings = {"steps": 10, "learning_rate": 1e-5, "kl_coeff": 0.1}
    memorizer, rounding = (Memorizer(tiny, **settings) for _ in range(2))
    rounding.module_class = RoundWeights
    encoded = memorizer.encode(contexts[1])
    exact = plain_fit(tiny, [[encoded]], **settings, dtype=torch.float64)[1]
    edited = plain_fit(tiny, [[encoded]], **settings)[1]
    (ours,), (rounded,) = (fitting.fit([encoded]).deltas for fitting in (memorizer, rounding))
    for name, wanted, by_float32 in zip(("gate", "up", "down"), exact, edited, strict=True):
        error = (ours[name][0] - wanted).norm() / wanted.norm()
        assert error < 2e-3
        assert error < (by_float32 - wanted).norm() / wanted.norm()
        base = tiny.tail().ffns[0].base_weights[name]
        assert torch.equal((base + rounded[name]) - base, rounded[name])
        assert (rounded[name][0] - by_float32).norm() < 0.5 * (ours[name][0] - by_float32).norm()
        # Measured, with one thread as with two: 2.1e-6 for gate, less for the others; edited weights 4e-4.
        assert ours[name][0].norm().item() == pytest.approx(wanted.norm().item(), rel=2e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_batch_is_one_by_one(tiny, contexts, num_layers):
    memorizer = Memorizer(tiny, num_layers=num_layers, **STRONG)
    batch = memorizer(contexts)
    for row, context in enumerate(contexts):
        assert_same(batch.rows([row]), memorizer([context]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_trainer_is_fabric(tiny, contexts, tmp_path, precision):
    settings = MemorizationSettings(**STRONG)
    memorizer = Memorizer(tiny, settings)
    by_fabric = memorizer(contexts)
    module = MemorizationModule(tiny, len(contexts), settings)
    batch = memorizer.prepare([memorizer.encode(context) for context in contexts])
    trainer = Trainer(
        max_epochs=settings.steps, accelerator="cpu", precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch], batch_size=None))
    assert_same(by_fabric, module.memory())


def test_chunked_is_unchunked_and_kept_is_recomputed(tiny, contexts, monkeypatch):
    memorizer = Memorizer(tiny, **STRONG)
    whole = memorizer(contexts)
    monkeypatch.setattr(objective, "_CHUNK_BYTES", {"cpu": 1, "other": 1})
    encoded = [memorizer.encode(context) for context in contexts]
    assert len(memorizer.prepare(encoded).predictions) > 1
    assert_same(whole, memorizer(contexts), rtol=1e-5)
    prepare = objective.prepare
    monkeypatch.setattr(
        "fastmem_pl.memory.memorizer.prepare", lambda *args: prepare(*args[:4], reference_budget=0)
    )
    assert not any(memorizer.prepare(encoded).predictions)
    assert_same(whole, memorizer(contexts), rtol=1e-5)


def test_a_token_without_probability_leaves_the_loss_finite(tiny):
    # Its logit rises by more than any other's, from where float32 has no probability for it.
    tail, labels = tiny.tail(), torch.tensor([3])
    prediction = objective.PlainPrediction(tail, torch.zeros(1, 32), labels)
    raw = torch.zeros(1, tail.head_weight.shape[0])
    raw[0, 7], change = -130.0, torch.zeros_like(raw)
    change[0, 7], change[0, 3] = 100.0, 1.0
    prediction._probs = raw.softmax(-1)
    prediction._label_log_p = raw.log_softmax(-1)[:, 3:4]
    prediction._total = prediction._probs.sum(-1, keepdim=True)
    expected = F.cross_entropy(raw + change, labels)
    ce, kl = prediction._block_loss(tail, True, torch.ones(1, 1), torch.ones(1, 1), slice(0, 1), change)
    assert ce.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl.isfinite().all()
    assert change.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_follows_float32(make_tiny, contexts, precision):
    settings = {"steps": 10, "learning_rate": 1e-5}
    exact = Memorizer(make_tiny(), **settings)(contexts)
    rounded = Memorizer(make_tiny(precision=precision), **settings)(contexts)
    fall = sum(c.cross_entropy[0] - c.cross_entropy[-1] for c in exact.curves)
    found = sum(c.cross_entropy[0] - c.cross_entropy[-1] for c in rounded.curves)
    assert found == pytest.approx(fall, rel=0.05)


@contextmanager
def bfloat16_all_around():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad, bfloat16_all_around])
def test_memorizes_inside_guards(tiny, contexts, guard):
    expected = Memorizer(tiny, **STRONG)(contexts)
    with guard():
        found = Memorizer(tiny, **STRONG)(contexts)
    assert_same(found, expected, rtol=1e-6)


def test_non_finite_sample_fails_alone(tiny, contexts):
    memorizer = Memorizer(tiny, **STRONG)
    encoded = [memorizer.encode(context) for context in contexts]
    expected = memorizer.fit(encoded)
    prepare = memorizer.prepare

    def poisoned(items):
        batch = prepare(items)
        batch.inputs.residual[1] = float("nan")
        return batch

    memorizer.prepare = poisoned
    memory = memorizer.fit(encoded)
    assert memory.status[1].startswith("failed: the memorization loss is not finite at step 0")
    assert [memory.status[i] for i in (0, 2, 3)] == ["ok"] * 3
    assert all(not tensor[1].any() for layer in memory.deltas for tensor in layer.values())
    assert_same(memory.rows([0, 2, 3]), expected.rows([0, 2, 3]))


def test_an_exception_in_the_middle_leaves_the_base_alone(tiny, contexts, monkeypatch):
    before = snapshot(tiny)
    calls = []

    def fail(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(MemorizationModule, "configure_gradient_clipping", fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        Memorizer(tiny, **STRONG)(contexts)
    assert_untouched(tiny, before)
    assert all(p.grad is None for p in tiny.model.parameters())


def test_nothing_of_a_fit_outlives_it_but_the_memory(tiny, contexts, monkeypatch):
    alive = []
    setup = MemorizationModule.configure_optimizers

    def watched(module):
        optimizer = setup(module)
        alive.extend((weakref.ref(module), weakref.ref(optimizer)))
        return optimizer

    monkeypatch.setattr(MemorizationModule, "configure_optimizers", watched)
    gc.collect()
    gc.disable()
    try:
        memory = Memorizer(tiny, **STRONG)(contexts)
        assert [reference() for reference in alive] == [None, None]
        assert len(memory) == len(contexts)
    finally:
        gc.enable()


def test_zero_steps_is_the_base(tiny, contexts):
    memory = Memorizer(tiny, steps=0)(contexts)
    assert memory.curves[0].cross_entropy == []
    assert not any(tensor.any() for layer in memory.deltas for tensor in layer.values())


def test_adaptive_kl_follows_the_controller_of_each_sample(tiny, contexts):
    settings = {**STRONG, "steps": 12, "kl_target": 0.02, "kl_gain": 1.0}
    memory = Memorizer(tiny, **settings)(contexts)
    for curve, context in zip(memory.curves, contexts, strict=True):
        assert curve.kl_coeff[0] == pytest.approx(STRONG["kl_coeff"])
        for step in range(11):
            error = min(max(curve.kl[step] / 0.02 - 1, -0.2), 0.2)
            assert curve.kl_coeff[step + 1] == pytest.approx(curve.kl_coeff[step] * (1 + error), rel=1e-5)
        alone = Memorizer(tiny, **settings)(context).curves[0]
        assert curve.kl_coeff == pytest.approx(alone.kl_coeff, rel=1e-3)
    assert max(c.kl_coeff[-1] for c in memory.curves) != min(c.kl_coeff[-1] for c in memory.curves)
    constant = Memorizer(tiny, **STRONG)(contexts[:1])
    assert constant.curves[0].kl_coeff == []
    assert "kl_coeff" not in constant.curves[0].as_dict()


@pytest.mark.parametrize("kind", [DeltaAdamW, RoundedAdamW])
def test_rates_by_row_are_adamw_of_each_row(kind):
    torch.manual_seed(0)
    rates = [1e-2, 3e-3, 1e-2, 1e-4]
    base = torch.randn(5, 7)
    weights = [base.clone().requires_grad_(True) for _ in rates]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    delta = torch.nn.Parameter(torch.zeros(len(rates), *base.shape))
    optimizer = kind([(delta, base)], rates, 0.1)
    for _ in range(6):
        delta.grad = torch.randn_like(delta)
        for row, weight in enumerate(weights):
            weight.grad = delta.grad[row].clone()
        reference.step()
        optimizer.step()
        for row, weight in enumerate(weights):
            torch.testing.assert_close(base + delta[row].detach(), weight.detach(), rtol=0, atol=2e-6)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert [state["step"] for state in optimizer.state.values()] == [6] * len(rates)
