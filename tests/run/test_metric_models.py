"""Scores of summaries that need a model: missed in one line, added to answers that are there, not mixed."""

import re
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from runs import ROUGE, SUMMARIES, metrics_of
from tokenizers import pre_tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL_SCORES = {"bert_precision", "factkb"}


def save_roberta(folder: Path, model_class, seed=0) -> Path:
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=180).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 261, "max_position_embeddings": 182, "type_vocab_size": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    model_class(transformers.RobertaConfig(initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def metric_models(tmp_path_factory):
    folder, classifier = tmp_path_factory.mktemp("metrics"), transformers.RobertaForSequenceClassification
    save_roberta(folder / "other", classifier, seed=1)
    return {
        "bertscore_model": save_roberta(folder / "encoder", transformers.RobertaForMaskedLM),
        "factkb_model": save_roberta(folder / "classifier", classifier),
    }


def test_metric_models_are_missed_in_one_line_and_added_later(run_methods, metric_models, tmp_path, caplog):
    data = [*SUMMARIES, {"article": "No summary is known of this."}]
    common = {"task": "xsum", "methods": ["zero-shot", "fastmem"], "data": data}
    first = run_methods(**common, bertscore_model="./nowhere", factkb_model="nobody/nothing-here")
    bertscore, factkb = (record.getMessage() for record in caplog.records)
    assert re.search(r"bert_precision.*\./nowhere", bertscore)
    assert re.search("factkb.*nobody/nothing-here", factkb)
    assert "\n" not in bertscore + factkb
    assert all(set(r["scores"]) == (ROUGE if r["index"] < 3 else set()) for r in first)

    caplog.clear()
    later = run_methods(**common, **metric_models)
    for before, after in zip(first, later, strict=True):
        assert set(after["scores"]) == set(before["scores"]) | MODEL_SCORES, "these need the article only"
        assert all(0 < after["scores"][name] < 1 for name in MODEL_SCORES)
        assert set(after.pop("score_models")) == MODEL_SCORES
        assert after | {"scores": before["scores"]} == before, "answered again"
    for name in MODEL_SCORES:
        values = [r["scores"][name] for r in later if r["method"] == "fastmem"]
        assert len(set(values)) == 4, "a test that could not fail"
        found = metrics_of(tmp_path / "run", "fastmem")[name]
        assert found["value"] == pytest.approx(statistics.mean(values))
        assert found["standard_error"] == pytest.approx(statistics.stdev(values) / 2)

    content = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    run_methods(**common, **metric_models)
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == content
    assert not caplog.records
    for ours, other in zip(later, run_methods(**common, **metric_models, run_dir="fresh"), strict=True):
        assert ours["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_scores_of_two_metric_models_are_not_mixed(run_methods, metric_models):
    first = run_methods("xsum", ["zero-shot"], **metric_models)
    other = metric_models | {"factkb_model": metric_models["factkb_model"].with_name("other")}
    fresh = run_methods("xsum", ["zero-shot"], run_dir="fresh", **other)
    again = run_methods("xsum", ["zero-shot"], **other)
    assert [r["scores"] for r in again] != [r["scores"] for r in first]
    assert [r["scores"] for r in again] == [pytest.approx(r["scores"], abs=1e-5) for r in fresh]
