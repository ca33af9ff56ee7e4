"""Low-rank forms and the measure of what they lose, against plain linear algebra and the model itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastmem_pl import Backbone, FastMemError, Memorizer, Memory
from fastmem_pl.export import LowRank, to_checkpoint, to_lora, to_memory
from fastmem_pl.export.deviation import Deviation

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "The tower of Velm was built in 1312 by Ida Sorensen, who never saw it finished."


def memorized(backbone, **settings):
    return Memorizer(backbone, **{"steps": 6, "learning_rate": 1e-2, **settings})(TEXT)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_is_the_best_approximation_of_its_rank(make_tiny, family, rank):
    backbone = make_tiny(family)
    memory = memorized(backbone)
    found = LowRank(memory, backbone).memory(rank).deltas[0]
    modules = [parts for parts, _ in backbone.anatomy.ffn_modules(backbone.num_blocks - 1)]
    assert (
        modules
        == {
            "llama": [("gate",), ("up",), ("down",)],
            "phi3": [("gate", "up"), ("down",)],
            "gpt2": [("up",), ("down",)],
        }[family]
    )
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
    encoded = Memorizer(backbone).encode(TEXT)
    ids, place = torch.tensor([encoded.input_ids]), slice(encoded.header_length - 1, -1)

    def log_p(served):
        with torch.no_grad(), served.attached(backbone):
            return backbone.model(input_ids=ids).logits[0, place].double().log_softmax(-1)

    exact = log_p(memory)
    for rank in (1, 4, 16):
        other = log_p(low_rank.memory(rank))
        expected = (exact.exp() * (exact - other)).sum(-1).mean().item()
        assert loss.kl(low_rank.memory(rank).deltas) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert expected > 1e-5
    with torch.no_grad():
        base = backbone.model(input_ids=ids).logits[0, place].double().log_softmax(-1)
    assert loss.kl_base == pytest.approx((exact.exp() * (exact - base)).sum(-1).mean().item(), rel=1e-3)


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


def test_no_rank_is_close_enough(tiny, tmp_path):
    memory = memorized(tiny)
    with pytest.raises(FastMemError, match=r"max_kl: no rank comes within 1e-12: the highest, 32, has a KL"):
        to_lora(memory, tiny, tmp_path / "lora", max_kl=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_relative_error_of_an_empty_memory_is_none(tiny, tmp_path):
    memory = Memorizer(tiny, steps=0)(TEXT)
    report = to_lora(memory, tiny, tmp_path / "lora")
    assert (report.rank, report.kl, report.relative_error) == (1, 0.0, 0.0)


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    memory = memorized(tiny)
    target = tmp_path / "lora"
    to_lora(memory, tiny, target, rank=2)
    before = contents(target)
    with monkeypatch.context() as patched:
        patched.setattr("fastmem_pl.export.lora.write_tensors", full)
        with pytest.raises(FastMemError, match=r"cannot write .*lora: No space left on device"):
            to_lora(memory, tiny, target, force=True)
    assert (list(tmp_path.iterdir()), contents(target)) == ([target], before)

    # The new one cannot take the place of the old.
    rename = Path.rename

    def refuse(path, to):
        stated = path / "export.json"
        if Path(to) == target and stated.is_file() and '"rank": 3' in stated.read_text():
            full()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FastMemError, match="No space left"):
        to_lora(memory, tiny, target, rank=3, force=True)
    assert (list(tmp_path.iterdir()), contents(target)) == ([target], before)


@pytest.mark.parametrize("foreign", ["chapter1.tex", "src/a.c"])
def test_what_an_export_did_not_write_is_not_replaced(tiny, tmp_path, foreign):
    memory, target = memorized(tiny), tmp_path / "thesis"
    to_lora(memory, tiny, target, rank=2)
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("mine")
    with pytest.raises(FastMemError, match=r"holds (chapter1.tex|src), which fastmem export did not write"):
        to_lora(memory, tiny, target, rank=3, force=True)
    assert (target / foreign).read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "export.json").write_text("[]")
    with pytest.raises(FastMemError, match=r"holds export\.json, which"):
        to_lora(memory, tiny, tmp_path / "other", rank=3, force=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kl_of_a_checkpoint_is_that_of_what_plain_transformers_loads(make_tiny, tmp_path, family, dtype):
    backbone = make_tiny(family)
    memory = memorized(backbone)
    report = to_checkpoint(memory, backbone, tmp_path / "merged", dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert str(model.dtype) == f"torch.{dtype}"
    encoded = Memorizer(backbone).encode(TEXT)
    ids, place = torch.tensor([encoded.input_ids]), slice(encoded.header_length - 1, -1)
    with torch.no_grad():
        other = model(input_ids=ids).logits[0, place].double().log_softmax(-1)
        with memory.attached(backbone):
            exact = backbone.model(input_ids=ids).logits[0, place].double().log_softmax(-1)
    expected = (exact.exp() * (exact - other)).sum(-1).mean().item()
    assert report.kl == pytest.approx(expected, rel=0.05, abs=1e-6)
    assert (report.kl < 1e-6) == (dtype == "float32")


@pytest.mark.parametrize(
    ("rank", "words"), [("auot", "'auot' is out of range"), (2.7, "2.7 is out of range")]
)
def test_a_rank_that_is_none(tiny, tmp_path, rank, words):
    with pytest.raises(FastMemError, match=words):
        to_lora(memorized(tiny), tiny, tmp_path / "lora", rank=rank)
    with pytest.raises(FastMemError, match="max_kl: nan is out of range"):
        to_lora(memorized(tiny), tiny, tmp_path / "lora", max_kl=float("nan"))


def test_another_text_is_refused_and_a_failed_memory_is_not_exported(tiny, tmp_path):
    memory = memorized(tiny)
    with pytest.raises(FastMemError, match="this is not the text that was memorized"):
        to_lora(memory, tiny, tmp_path / "lora", context="Something else entirely.")
    memory.status = ["failed: the memorization loss is not finite at step 2; answered by the base model"]
    with pytest.raises(FastMemError, match="the memorization loss is not finite at step 2"):
        to_lora(memory, tiny, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_no_private_folder_is_shipped(tiny_folder, tmp_path):
    backbone = Backbone.load(str(tiny_folder))
    memory = memorized(backbone)
    memory.save(tmp_path / "m.fastmem")
    to_lora(memory, backbone, tmp_path / "lora", rank=1)
    to_checkpoint(memory, backbone, tmp_path / "merged")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or str(tiny_folder.parent).encode() not in path.read_bytes(), path
    assert Memory.load(tmp_path / "m.fastmem").backbone == tiny_folder.name
