"""The outer module and trainer: one code path for fit, predict and fit-predict."""

import json

import pytest
import torch
from conftest import assert_untouched, make_module, snapshot
from runs import ALL_METHODS

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer
from fastmem_pl.report import print_run

RECORD = {"context": "The door is red.", "question": "which color has the door?", "answers": ["red"]}


@pytest.fixture
def run(tiny_run, records):
    """Runs one command in Python on the tiny model; gives the records."""

    def go(mode="fit_predict", name="run", limit=None, batch_size=2, trainer=None, **model):
        found = tiny_run(mode, name, limit, batch_size, {"max_new_tokens": 6, **model}, trainer)
        return [] if mode == "fit" else records(found.path)

    return go


def essence(records):
    return [(r["index"], r["method"], r["token_ids"], r["scores"]) for r in records]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_ends_of_lines_within_texts_do_not_end_a_rerun(run, data_file, tmp_path, capsys):
    question = "which\u2028color\x85has\rthe \x0b door\x1c?"
    data_file.write_text(json.dumps({**RECORD, "question": question}, ensure_ascii=False))
    for _ in range(2):
        run(steps=20, learning_rate=0.1)
        print_run(tmp_path / "run")
        assert "which color has the door ?" in capsys.readouterr().out


def test_half_of_a_character_in_an_answer_is_shown(run, tmp_path, capsys):
    run()
    path = tmp_path / "run" / "predictions.jsonl"
    # By a decoder of a user's own, say.
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "\\ud83d'))
    print_run(tmp_path / "run")
    out = capsys.readouterr().out
    assert "zero-shot   \ufffd" in out
    out.encode()


def test_predict_beside_answers_of_memories_says_why_it_differs(run):
    run()
    with pytest.raises(FastMemError, match="No memories are in it, so that this would answer zero-shot"):
        run("predict")


def test_fit_keeps_the_predictions_of_its_folder(run, records, tmp_path):
    expected = run("predict")  # no memories yet: zero-shot
    run("fit")
    assert records(tmp_path / "run") == expected


def test_metrics_cover_resumed_records_and_are_never_stale(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "metrics.json"
    run(limit=2)
    assert metrics_of(tmp_path / "run")["groups"]["all"]["fastmem"]["n"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "obtain_memory", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(limit=4)
    assert not path.exists()
    found = [r["scores"]["contained"] for r in run(limit=4) if r["method"] == "fastmem+cd"]
    metrics = metrics_of(tmp_path / "run")
    entry = metrics["groups"]["all"]["fastmem+cd"]
    assert entry["n"] == len(found) == 4
    assert entry["metrics"]["contained"]["value"] == pytest.approx(sum(found) / 4)
    print_run(tmp_path / "run")
    assert "4 samples, mean ± standard error" in capsys.readouterr().out
    # As if killed between the last record and the metrics: they must be made anew from the records.
    path.unlink()
    run(limit=4)
    assert metrics_of(tmp_path / "run")["groups"] == metrics["groups"]


def test_scores_that_came_before_a_kill_reach_the_metrics(run, tmp_path):
    lines, folder = run(), tmp_path / "run"
    metrics = metrics_of(folder)
    for line in lines:
        line["scores"]["factkb"] = 0.25
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run()
    later = metrics_of(folder)
    assert later["groups"]["all"]["fastmem"]["metrics"]["factkb"]["value"] == 0.25
    assert later["peak_memory_gib"] == metrics["peak_memory_gib"] != {}


def test_what_has_no_room_is_refused_before_anything_is_answered(run, tmp_path, data_file):
    with pytest.raises(FastMemError, match=r"context of sample q1 has \d+ tokens, allowed: 40"):
        run(max_context_tokens=40, strict=True)
    with open(data_file, "a") as file:
        file.write(json.dumps({**RECORD, "question": "why? " * 1000}))
    with pytest.raises(FastMemError, match=r"question of sample 5 leaves no room for its context"):
        run()
    assert not (tmp_path / "run").exists()


def test_a_memory_serves_whatever_is_asked_of_it(run, data_file):
    """A long context is memorized alike, however much room prompts and answers leave for it."""
    data_file.write_text(json.dumps({**RECORD, "context": "The door is red. " * 200}))
    run("fit")
    asked = {"methods": ["one-shot", "fastmem"], "max_new_tokens": 300, "stop": list("aeiou ")}
    both = run(name="both", **asked)
    later = run("predict", **asked)
    assert essence(later) == essence(both)
    alone = run(name="alone", methods=["fastmem"])
    assert both[1]["curve"]["cross_entropy"] == pytest.approx(alone[0]["curve"]["cross_entropy"])
    cut = {record["method"]: record["n_truncated_tokens"] for record in both}
    assert cut["one-shot"] > cut["fastmem"] > 0
    assert both[0]["n_context_tokens"] == both[1]["n_context_tokens"] == 2048 - 32
    with pytest.raises(FastMemError, match=r"allowed: \d+; shorten it, lower --model.decode.max_new_tokens"):
        run(name="strict", methods=["fastmem"], strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "eager"}, r"model\.backbone\.attn_implementation: there None, here 'eager'"),
        ({"subfolder": "."}, r"model\.backbone\.subfolder: there None, here '\.'"),
        (
            {"template_kwargs": {"add_generation": 1}},
            r"model\.chat\.template_kwargs\.add_generation: there None, here 1",
        ),
    ],
)
def test_a_run_is_of_one_loading_and_one_template(run, settings, message):
    run(methods=["zero-shot"])
    with pytest.raises(FastMemError, match=message):
        run(methods=["zero-shot"], **settings)


def test_settings_of_answers_do_not_shut_a_folder_of_memories(run, tmp_path):
    run("fit", published_quirks=["parse-special-tokens", "round-weights"])
    quirks = ["round-weights", "dola-unlimited", "parse-special-tokens"]
    run("predict", published_quirks=quirks, system_prompt="Be brief.", trust_remote_code=True)
    with pytest.raises(FastMemError, match=r"model\.chat\.system_prompt: there 'Be brief\.', here None"):
        run("predict", published_quirks=quirks)
    message = (
        r"published_quirks: \[\], .* give --model.published_quirks \[parse-special-tokens,round-weights\]"
    )
    with pytest.raises(FastMemError, match=message):
        run("predict", name="other", memories=str(tmp_path / "run"))


def test_a_module_can_be_used_again(tmp_path, data_file, tiny_run):
    module = make_module(steps=1, max_new_tokens=4)
    data = FastMemDataModule("qa", str(data_file), limit=2)
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
    trainer.predict(module, data, run_dir=str(tmp_path / "one"))
    result = trainer.fit_predict(module, data, run_dir=str(tmp_path / "two"))
    assert set(result.metrics["groups"]["all"]) == {"zero-shot", "fastmem", "fastmem+cd"}


def test_graphs_of_earlier_batches_make_room_first(run, monkeypatch, caplog):
    expected = essence(run(name="roomy", limit=4))
    obtain, sizes = FastMemModule.obtain_memory, []

    def cramped(self, batch, encoded):
        sizes.append(len(batch))
        if self.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.graphs._idle["kept"] = None
        return obtain(self, batch, encoded)

    monkeypatch.setattr(FastMemModule, "obtain_memory", cramped)
    assert essence(run(name="cramped", limit=4)) == expected
    assert sizes == [2, 2, 2]
    assert "out of memory" not in caplog.text


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precision_without_inference_mode(run, make_tiny, monkeypatch, precision):
    made = make_tiny(precision=precision)
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: made)
    given = {"precision": precision, "inference_mode": False}
    records = run(trainer=FastMemTrainer(accelerator="cpu", enable_progress_bar=False, **given))
    falls = [r["curve"]["cross_entropy"] for r in records if r["method"] == "fastmem"]
    assert all(curve[-1] < curve[0] for curve in falls)


def test_the_base_is_untouched_by_all_methods_also_when_a_run_raises(run, tiny, monkeypatch):
    before, settings = snapshot(tiny), {"methods": ALL_METHODS, "num_layers": 2, "temperature": 1.0}
    assert len(run(**settings)) == 5 * len(ALL_METHODS)
    monkeypatch.setattr("fastmem_pl.run.predict.FastMemModule.record", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(name="raises", **settings)
    assert_untouched(tiny, before)
