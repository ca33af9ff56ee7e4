"""Metrics with a model of their own, on tiny random encoders, against plain computations one by one."""

import json
import shutil
from functools import cache

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaTokenizer,
)

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import models
from fastmem_pl.metrics.models import METRIC_MODELS, BERTScorePrecision, FactKB, load_metric_model

LIMIT = 180  # tokens
# Lengths differ both ways, so that sorting by length would pair rows wrongly; the third article is cut.
PAIRS = [
    ("a rather long summary of little", "short article"),
    ("b", "the second article is of medium length, as it happens"),
    ("medium summary", "a very long article " * 20),
    ("the same length", "x"),
    ("ends here. ", " an article of its own"),
    ("one more summary", "and the last article of them all"),
    ("", "an article without a summary"),
    (" \n", "another one"),
]
SUMMARIES, ARTICLES = (list(texts) for texts in zip(*PAIRS, strict=True))
WITH_TEXT = [i for i, summary in enumerate(SUMMARIES) if summary.strip()]


def make_tokenizer() -> RobertaTokenizer:
    """Byte-level, with RoBERTa's special tokens and ids."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=LIMIT)


def save(folder, model_class, tokenizer: bool = True, **overrides) -> str:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    positions = {"max_position_embeddings": LIMIT + 2, "pad_token_id": 1, "type_vocab_size": 1}
    config = {"vocab_size": 261, "initializer_range": 0.5, **small, **positions, **overrides}
    model_class(RobertaConfig(**config)).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("encoder"), RobertaForMaskedLM)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("classifier"), RobertaForSequenceClassification)


@pytest.fixture(scope="module", params=["bert_precision", "factkb"])
def metric(request, encoder, classifier):
    return load_metric_model(request.param, encoder if request.param == "bert_precision" else classifier)


@cache
def loaded(model_class, folder: str):
    return model_class.from_pretrained(folder).eval()


@torch.no_grad()
def plain_precision(folder: str, summary: str, article: str, layer: int = -1) -> float:
    """Mean over summary tokens of the largest cosine with an article token; no special tokens."""
    model, tokenizer = loaded(RobertaModel, folder), make_tokenizer()

    def embed(text: str) -> torch.Tensor:
        tokens = tokenizer(" " + text.strip(), return_tensors="pt", truncation=True, max_length=LIMIT)
        hidden = model(**tokens, output_hidden_states=True).hidden_states[layer][0, 1:-1]
        return hidden / hidden.norm(dim=-1, keepdim=True)

    return (embed(summary) @ embed(article).T).max(dim=1).values.clamp(min=0).mean().item()


@torch.no_grad()
def plain_factuality(folder: str, summary: str, article: str) -> float:
    """Forward of one pair whose article is cut by hand."""
    model, tokenizer = loaded(RobertaForSequenceClassification, folder), make_tokenizer()
    first, second = (tokenizer(t, add_special_tokens=False).input_ids for t in (summary, article))
    second = second[: LIMIT - 4 - len(first)]
    ids = torch.tensor([[0, *first, 2, 2, *second, 2]])
    return model(ids).logits.softmax(-1)[0, 1].item()


def test_precision_equals_the_plain_computation(encoder):
    values = BERTScorePrecision(encoder, batch_size=4)(SUMMARIES, ARTICLES)
    for i in WITH_TEXT:
        assert values[i] == pytest.approx(plain_precision(encoder, *PAIRS[i]), abs=2e-6), PAIRS[i]
    assert len({round(values[i], 4) for i in WITH_TEXT}) == len(WITH_TEXT), "the test could not see a mix-up"


def test_precision_of_a_text_with_itself_with_nothing_and_without_tokens(encoder):
    metric = BERTScorePrecision(encoder)
    assert metric(["the same"], ["the same"]) == pytest.approx([1.0])
    assert metric(["a summary"], [""]) == [0.0]
    metric.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" \x00", "")
    assert metric(["\x00", "text"], ["an article", "text"]) == pytest.approx([0.0, 1.0])


def test_factuality_equals_single_forwards(classifier):
    values = FactKB(classifier, batch_size=4)(SUMMARIES, ARTICLES)
    for i in WITH_TEXT:
        assert values[i] == pytest.approx(plain_factuality(classifier, *PAIRS[i]), abs=2e-6), PAIRS[i]


@pytest.mark.parametrize("length", [LIMIT - 6, LIMIT - 5, LIMIT - 4, LIMIT - 3, 5 * LIMIT])
def test_factuality_of_a_summary_that_fills_the_input(classifier, length):
    metric = FactKB(classifier)
    ids = metric._encode("s" * length, "an article" * 20)["input_ids"]
    assert len(ids) == LIMIT
    kept = ids.count(metric.tokenizer.convert_tokens_to_ids("s"))
    assert kept == (length if length < LIMIT - 4 else (LIMIT - 4) // 2)
    assert 0 < metric(["s" * length], ["an article" * 20])[0] < 1
    assert 0 < metric(["s" * length], [""])[0] < 1


def test_rows_do_not_depend_on_each_other_or_on_the_batch(metric):
    values = metric(SUMMARIES, ARTICLES)
    single = [metric([s], [a])[0] for s, a in PAIRS]
    assert values == pytest.approx(single, abs=2e-6)
    backwards = metric(SUMMARIES[::-1], ARTICLES[::-1])[::-1]
    assert values == pytest.approx(backwards, abs=2e-6)
    for batch_size in (1, 3):
        other = type(metric)(metric.source, batch_size=batch_size)
        assert values == pytest.approx(other(SUMMARIES, ARTICLES), abs=2e-6)


def test_scoring_is_silent_and_leaves_no_state(metric, capfd, caplog):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = type(metric)(metric.source)
    again(SUMMARIES, ARTICLES)
    again(["s" * 3 * LIMIT], ["a" * 3 * LIMIT])
    captured = capfd.readouterr()
    assert "REPORT" not in captured.err + captured.out
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_empty_inputs(metric):
    assert metric([], []) == []
    assert metric(["", "\t"], ["x", ""]) == [0.0, 0.0]
    values = metric(SUMMARIES, ARTICLES)
    assert [i for i, value in enumerate(values) if value] == WITH_TEXT
    with pytest.raises(ValueError, match="zip"):
        metric(["a"], [])


def test_surrounding_precision_does_not_matter(metric):
    texts = ["s" * length for length in (20, 170)], ["a word or two " * 20] * 2
    expected = metric(*texts)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert metric(*texts) == expected
            again = type(metric)(metric.source)
            assert again(*texts) == expected
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert again(*texts) == expected, "a model loaded under inference mode works without it"
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    assert not again.model.training


@pytest.mark.parametrize(("depth", "layer"), [(12, 10), (24, 17), (3, 3)])
def test_layer_of_bert_score(tmp_path, depth, layer):
    folder = save(tmp_path, RobertaModel, num_hidden_layers=depth)
    metric = BERTScorePrecision(folder)
    assert metric.layer == layer == len(metric.model.encoder.layer)
    expected = plain_precision(folder, *PAIRS[0], layer=layer)
    assert metric(SUMMARIES[:1], ARTICLES[:1]) == pytest.approx([expected], abs=2e-6)


def test_length_limit_without_a_stated_one(tmp_path):
    save(tmp_path, RobertaModel, tokenizer=False)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    metric = BERTScorePrecision(str(tmp_path))
    assert metric.max_tokens == LIMIT
    metric(["s" * 3 * LIMIT], ["a" * 3 * LIMIT])


def test_factkb_takes_its_published_tokenizer_where_there_is_none(tmp_path, classifier, monkeypatch):
    own = save(tmp_path / "bare", RobertaForSequenceClassification, tokenizer=False)
    make_tokenizer().save_pretrained(tmp_path / "roberta-base")
    monkeypatch.setattr(models, "_FACTKB_TOKENIZER", str(tmp_path / "roberta-base"))
    assert FactKB(own)(SUMMARIES, ARTICLES) == FactKB(classifier)(SUMMARIES, ARTICLES)


def test_registry():
    assert dict(METRIC_MODELS) == {"bert_precision": BERTScorePrecision, "factkb": FactKB}
    with pytest.raises(FastMemError, match="did you mean 'factkb'"):
        load_metric_model("factbk", "x")


@pytest.mark.parametrize("name", ["bert_precision", "factkb"])
def test_offline_failure_is_one_line_after_one_try(name, monkeypatch):
    tries = []
    monkeypatch.setattr("fastmem_pl.base.hub._hub_answers", lambda: tries.append("the Hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FastMemError) as caught:
        load_metric_model(name, "nobody/nothing-here")
    # The Hub's own client would try again and again for most of a minute.
    assert tries == ["the Hub"]
    message, setting = str(caught.value), {"bert_precision": "bertscore", "factkb": "factkb"}[name]
    assert message.startswith(f"{name}: cannot load 'nobody/nothing-here': ")
    assert message.endswith(f"; give a local folder (--model.{setting}_model), or null to leave it out")
    assert "\n" not in message


def refusal(name: str, source) -> str:
    with pytest.raises(FastMemError) as caught:
        load_metric_model(name, str(source))
    message = str(caught.value)
    assert message.startswith(f"{name}: cannot load {str(source)!r}: ")
    assert "null to leave it out" in message
    assert "\n" not in message
    return message


def test_unfit_checkpoints_are_refused(tmp_path, encoder, monkeypatch):
    assert "neither a folder nor a Hub id" in refusal("factkb", tmp_path / "missing")
    assert "not trained for this: no weights for classifier" in refusal("factkb", encoder)
    one_label = save(tmp_path / "one", RobertaForSequenceClassification, num_labels=1)
    assert "1 label" in refusal("factkb", one_label)
    bare = save(tmp_path / "bare", RobertaModel, tokenizer=False)
    assert "no tokenizer files" in refusal("bert_precision", bare)
    small = save(tmp_path / "small", RobertaModel, vocab_size=200)
    assert "261 tokens, its model only 200" in refusal("bert_precision", small)
    bare = save(tmp_path / "classifier", RobertaForSequenceClassification, tokenizer=False)
    monkeypatch.setattr(models, "_FACTKB_TOKENIZER", "nobody/nothing-here")
    assert "'nobody/nothing-here' is not in the Hub cache" in refusal("factkb", bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 1}, "holds more layers than its config.json says: roberta.encoder.layer.1."),
        ({"num_hidden_layers": 4}, "no weights for {}encoder.layer.2."),
        ({"intermediate_size": 24}, "other shapes than its config.json says: {}encoder.layer.0."),
    ],
)
def test_layers_that_do_not_fit_the_config_are_refused(tmp_path, classifier, settings, message):
    folder = shutil.copytree(classifier, tmp_path / "altered")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    assert message.format("roberta.") in refusal("factkb", folder)
    assert message.format("") in refusal("bert_precision", folder)


def test_decoders_are_refused_for_bertscore(tiny_folder):
    assert "like RoBERTa" in refusal("bert_precision", tiny_folder)


def test_a_pickled_checkpoint_gives_its_tensors_only(tmp_path, classifier, capfd):
    model = RobertaForSequenceClassification.from_pretrained(classifier)
    model.config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert FactKB(str(tmp_path))(SUMMARIES, ARTICLES) == FactKB(classifier)(SUMMARIES, ARTICLES)

    class Harmful:
        def __reduce__(self):
            return print, ("code of the checkpoint ran",)

    torch.save({"weight": Harmful()}, tmp_path / "pytorch_model.bin")
    assert "more than tensors" in refusal("factkb", tmp_path)
    assert "code of the checkpoint ran" not in capfd.readouterr().out
