"""Low-rank forms and the measure of what they lose, against plain linear algebra and the model itself."""

import pytest
import torch
from memories import TEXT, log_probs

from fastmem_pl import FastMemError, Memorizer
from fastmem_pl.export import LowRank, to_lora, to_memory
from fastmem_pl.export.deviation import Deviation

pytestmark = pytest.mark.usefixtures("one_thread")


def memorized(backbone, **settings):
    return Memorizer(backbone, **{"steps": 6, "learning_rate": 1e-2, **settings})(TEXT)


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", [("gate",), ("up",), ("down",)]),
        ("phi3", [("gate", "up"), ("down",)]),
        ("gpt2", [("up",), ("down",)]),
    ],
)
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_is_the_best_approximation_of_its_rank(make_tiny, family, modules, rank):
    backbone = make_tiny(family)
    memory = memorized(backbone)
    found = LowRank(memory, backbone).memory(rank).deltas[0]
    assert [parts for parts, _ in backbone.anatomy.ffn_modules(backbone.num_blocks - 1)] == modules
    for parts in modules:
        exact = torch.cat([memory.deltas[0][part][0] for part in parts]).double()
        approximate = torch.cat([found[part][0] for part in parts]).double()
        singular = torch.linalg.svdvals(exact)
        best = singular[rank:].square().sum().sqrt()
        assert (exact - approximate).norm() <= best * (1 + 1e-4) + 1e-6 * exact.norm()
        assert torch.linalg.matrix_rank(approximate, atol=1e-6 * singular[0]) <= rank


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_is_the_kl_of_the_models_own_predictions(make_tiny, family, num_layers):
    backbone = make_tiny(family)
    memory = memorized(backbone, num_layers=num_layers)
    low_rank = LowRank(memory, backbone)
    loss = Deviation(memory, backbone)
    encoded = [Memorizer(backbone).encode(TEXT)]

    @torch.no_grad()
    def kl(served):
        with served.attached(backbone):
            other = log_probs(backbone.model, encoded, torch.float64)
        return (exact.exp() * (exact - other)).sum(-1).mean().item()

    with torch.no_grad(), memory.attached(backbone):
        exact = log_probs(backbone.model, encoded, torch.float64)
    for rank in (1, 4, 16):
        expected = kl(low_rank.memory(rank))
        assert loss.kl(low_rank.memory(rank).deltas) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert expected > 1e-5
    assert loss.kl_base == pytest.approx(kl(Memorizer(backbone, steps=0)(TEXT)), rel=1e-3)


def test_auto_is_the_smallest_rank_within_the_limit(tiny, tmp_path):
    memory = memorized(tiny)
    loss = Deviation(memory, tiny)
    low_rank = LowRank(memory, tiny, torch.bfloat16)
    by_rank = [loss.kl(low_rank.memory(rank).deltas) for rank in range(1, low_rank.max_rank + 1)]
    for smallest in (2, 3, 9, 20):
        max_kl = 1.0001 * by_rank[smallest - 1]
        assert all(kl > max_kl for kl in by_rank[: smallest - 1])
        report = to_memory(memory, tiny, tmp_path / f"{max_kl}.fastmem", max_kl=max_kl)
        assert report.rank == smallest
        assert report.kl == pytest.approx(by_rank[smallest - 1], rel=1e-6)
        assert {entry["rank"]: entry["kl"] for entry in report.tried}[smallest - 1] > max_kl


def test_relative_error_of_an_empty_memory_is_none(tiny, tmp_path):
    memory = Memorizer(tiny, steps=0)(TEXT)
    report = to_lora(memory, tiny, tmp_path / "lora")
    assert (report.rank, report.kl, report.relative_error) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": "auot"}, "'auot' is out of range"),
        ({"rank": 2.7}, "2.7 is out of range"),
        ({"max_kl": float("nan")}, "max_kl: nan is out of range"),
        ({"max_kl": 1e-12}, "max_kl: no rank comes within 1e-12: the highest, 32, has a KL"),
    ],
)
def test_a_rank_that_is_none(tiny, tmp_path, options, words):
    with pytest.raises(FastMemError, match=words):
        to_lora(memorized(tiny), tiny, tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []
