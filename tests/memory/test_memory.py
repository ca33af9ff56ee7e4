"""Memories in process: rows and stacks, the model they belong to, curves and what is shown of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memories import STRONG, TEXT, TEXTS

from fastmem_pl import Backbone, FastMemError, MemorizationSettings, Memorizer, Memory, answer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_and_stack_are_inverse(backbone, batch: Memory, kept: Path) -> None:
    again = Memory.stack([batch.rows([i]) for i in (2, 0, 1)]).rows([1, 2, 0])
    assert (again.curves, again.texts, again.context_hashes) == (batch.curves, TEXTS, batch.context_hashes)
    assert again.settings == batch.settings
    assert all(torch.equal(again.deltas[0][n], batch.deltas[0][n]) for n in batch.deltas[0])
    joined = Memory.stack([batch, Memory.load(kept)])
    assert len(joined) == 4
    torch.testing.assert_close(joined.deltas[0]["up"][0], joined.deltas[0]["up"][3], rtol=1e-3, atol=1e-6)


def test_stack_refuses_what_does_not_belong_together(backbone, memory: Memory, stranger: Path) -> None:
    other = Memorizer(Backbone.load(str(stranger)), **STRONG)([TEXT])
    deep = Memorizer(backbone, **STRONG, num_layers=2)([TEXT])
    for wrong, words in (
        ([memory, other], "fingerprint"),
        ([memory, deep], "num_layers"),
        ([], "give one"),
    ):
        with pytest.raises(FastMemError, match=words):
            Memory.stack(wrong)


def test_another_model_is_refused_with_both_fingerprints(
    memory: Memory, kept: Path, stranger: Path, backbone
):
    other = Backbone.load(str(stranger))
    memory.check(backbone)
    for use in (
        lambda: memory.check(other),
        lambda: Memory.load(kept, other),
        lambda: Memory.load(kept, other.fingerprint()),
        lambda: answer(other, "Who?", None, memory),
        lambda: memory.attached(other).__enter__(),
    ):
        with pytest.raises(
            FastMemError,
            match=rf"belongs to another model: .*{memory.fingerprint}.*{other.fingerprint()}",
        ):
            use()


def test_other_shapes_are_refused(memory: Memory, backbone) -> None:
    (deltas,) = memory.deltas
    for wrong, words in (
        ([{n: d[..., :16] for n, d in deltas.items()}], "does not fit this model"),
        ([{n: d.mT for n, d in deltas.items()}], "does not fit this model"),
        ([deltas] * 4, "the memory is of 4 layers, this model has 3"),
    ):
        for use in (
            replace(memory, deltas=wrong).check,
            lambda b, w=wrong: replace(memory, deltas=w).attached(b),
        ):
            with pytest.raises(FastMemError, match=words):
                use(backbone)


def test_what_a_memory_shows_of_itself(memory: Memory, batch: Memory) -> None:
    assert memory.curve == memory.curves[0]
    assert len(memory.curve.cross_entropy) == STRONG["steps"]
    with pytest.raises(FastMemError, match=r"there are 3; take one of memory\.curves"):
        _ = batch.curve
    assert len(batch) == len(batch.curves) == 3
    assert repr(memory).startswith("Memory(1 context, 4 steps, cross-entropy ")
    assert repr(batch).startswith("Memory(3 contexts, 4 steps, cross-entropy ")
    assert all("tensor" not in repr(one) and len(repr(one)) < 500 for one in (memory, batch))


@pytest.mark.parametrize("rows", [1, 3])
def test_plot_shows_the_curves(batch: Memory, rows: int) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = batch.rows(list(range(rows))).plot()
    lines = [line.get_ydata() for axes in figure.axes for line in axes.lines]
    for curve in batch.curves[:rows]:
        for values in (curve.cross_entropy, curve.kl):
            assert any(len(found) == 4 and list(found) == pytest.approx(values) for found in lines)
    assert all(axes.get_xlabel() and axes.get_ylabel() == "nats a token" for axes in figure.axes)
    # A notebook shows what is returned; a figure that pyplot keeps would be shown twice, and leak.
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("setting", "value", "bound"),
    [
        *((name, 0, "at least 1") for name in ("num_layers", "max_context_tokens")),
        *((name, -0.1, "at least 0") for name in ("steps", "kl_coeff", "weight_decay", "kl_gain")),
        *((name, 0.0, "above 0") for name in ("learning_rate", "max_grad_norm", "kl_target")),
        *(("learning_rate", float("nan"), "above 0"), ("weight_decay", float("inf"), "at least 0")),
    ],
)
def test_settings_out_of_range(setting, value, bound):
    message = rf"^model\.memorize\.{setting}: {value} is out of range; allowed: {bound}$"
    with pytest.raises(FastMemError, match=message):
        MemorizationSettings(**{setting: value})
