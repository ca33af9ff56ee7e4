"""The outer module and trainer: one code path for fit, predict and fit-predict."""

import json

import pytest
import torch
from conftest import assert_untouched, make_module, snapshot

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer, Memorizer
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.report import print_run
from fastmem_pl.run.encoding import SampleEncoder
from fastmem_pl.run.records import read_records

RECORDS = [
    {"context": f"The {thing} is {color}.", "question": f"which color has the {thing}?", "answers": [color]}
    for thing, color in [
        ("door", "red"),
        ("very old garden wall", "green"),
        ("sky", "black"),
        ("box", "blue"),
    ]
]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


@pytest.fixture
def run(tmp_path, data_file, tiny, monkeypatch):
    """Run one command in Python on the tiny model; returns records, or the result of ``fit``."""
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def go(command="fit_predict", name="run", batch_size=2, trainer=None, limit=None, **model):
        settings = {"steps": 3, "learning_rate": 1e-3, "max_new_tokens": 6, **model}
        trainer = trainer or FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=batch_size)
        result = getattr(trainer, command)(make_module(**settings), data, run_dir=str(tmp_path / name))
        if command == "fit":
            return result
        return [record for _, record in read_records(result.path / "predictions.jsonl")]

    return go


def test_ends_of_lines_within_texts_do_not_end_a_rerun(run, data_file, tmp_path, capsys):
    question = "which\u2028color\x85has\rthe \x0b door\x1c?"
    data_file.write_text(json.dumps({**RECORDS[0], "question": question}, ensure_ascii=False))
    for _ in range(2):
        run(steps=20, learning_rate=0.1)
        print_run(tmp_path / "run")
        assert "which color has the door ?" in capsys.readouterr().out


def test_half_of_a_character_in_the_data_is_refused_before_anything_is_written(run, data_file, tmp_path):
    with open(data_file, "a") as file:
        file.write("\n" + json.dumps({**RECORDS[0], "question": "which \ud83d?"}))
    with pytest.raises(
        FastMemError, match=r"data\.jsonl, line 5: field 'question' holds half of a character"
    ):
        run()
    assert not (tmp_path / "run").exists()


def test_half_of_a_character_in_an_answer_is_shown(run, tmp_path, capsys):
    run()
    path = tmp_path / "run" / "predictions.jsonl"
    # By a decoder of a user's own, say.
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "\\ud83d'))
    print_run(tmp_path / "run")
    out = capsys.readouterr().out
    assert "zero-shot   ?" in out
    out.encode()


def essence(records):
    return [(r["index"], r["method"], r["token_ids"], r["scores"]) for r in records]


def test_batch_size_does_not_change_answers(run):
    alone = run(name="one", batch_size=1)
    together = run(name="four", batch_size=4)
    assert essence(alone) == essence(together)
    for one, other in zip(alone, together, strict=True):
        if one["curve"]:
            assert one["curve"]["cross_entropy"] == pytest.approx(other["curve"]["cross_entropy"], rel=1e-4)


def test_results_stand_in_the_order_of_the_data(run, monkeypatch):
    sizes = []
    encode = SampleEncoder.__call__
    monkeypatch.setattr(
        SampleEncoder, "__call__", lambda self, s: sizes.append(len(s.context)) or encode(self, s)
    )
    records = run()
    assert sizes == sorted(sizes, reverse=True)
    assert [r["index"] for r in records] == sorted(r["index"] for r in records)


def test_fit_then_predict_is_fit_predict(run, tmp_path):
    expected = run(name="both")
    run("fit", name="apart")
    assert len(list((tmp_path / "apart" / "memories").glob("*.safetensors"))) == 4
    assert essence(run("predict", name="apart")) == essence(expected)
    given = run("predict", name="elsewhere", memories=str(tmp_path / "apart"))
    assert essence(given) == essence(expected)


def test_predict_without_memories_is_zero_shot(run):
    expected = [r for r in run() if r["method"] == "zero-shot"]
    assert essence(run("predict", name="bare")) == essence(expected)


def test_fit_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    run("fit")
    memories = tmp_path / "run" / "memories"
    (memories / "000002.safetensors").unlink()
    kept = (memories / "000001.safetensors").stat().st_mtime_ns
    seen = []
    fit = Memorizer.fit
    monkeypatch.setattr(
        Memorizer, "fit", lambda self, encoded: seen.append(len(encoded)) or fit(self, encoded)
    )
    run("fit")
    assert seen == [1]
    assert (memories / "000001.safetensors").stat().st_mtime_ns == kept


def test_predict_beside_answers_of_memories_says_why_it_differs(run):
    run("fit_predict", name="answered")
    with pytest.raises(FastMemError, match="No memories are in it, so that this would answer zero-shot"):
        run("predict", name="answered")


def test_fit_keeps_the_predictions_of_its_folder(run, tmp_path):
    expected = run("predict")  # no memories yet: zero-shot
    run("fit")
    kept = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == expected


def test_metrics_are_not_stale_after_a_kill(run, tmp_path):
    run(limit=2)
    stale = (tmp_path / "run" / "metrics.json").read_text()
    run(limit=4)
    path = tmp_path / "run" / "metrics.json"
    # As if killed between the last record and the metrics: they must be made anew from the records.
    path.unlink()
    run(limit=4)
    assert json.loads(path.read_text())["groups"]["all"]["fastmem"]["n"] == 4
    assert json.loads(stale)["groups"]["all"]["fastmem"]["n"] == 2


def test_metrics_of_an_earlier_session_go_when_a_new_one_starts(run, tmp_path, monkeypatch):
    run(limit=2)
    monkeypatch.setattr(FastMemModule, "obtain_memory", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(limit=4)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_predict_with_a_failed_memory(run):
    run("fit", learning_rate=1e30)
    records = run("predict", learning_rate=1e30)
    by_method = {m: [r["token_ids"] for r in records if r["method"] == m] for m in ("zero-shot", "fastmem")}
    assert by_method["fastmem"] == by_method["zero-shot"]


def test_question_without_room_is_refused_before_anything_is_answered(run, tmp_path, data_file):
    long = dict(RECORDS[0], question="why? " * 1000)
    data_file.write_text("\n".join(map(json.dumps, [*RECORDS, long])))
    with pytest.raises(FastMemError, match=r"question of sample 4 leaves no room for its context"):
        run()
    assert not (tmp_path / "run").exists()


def test_a_memory_serves_whatever_is_asked_of_it(run, tmp_path, data_file):
    """A long context is memorized alike, however much room prompts and answers leave for it."""
    data_file.write_text(json.dumps(dict(RECORDS[0], context="The door is red. " * 200)))
    run("fit", max_new_tokens=6)
    both = run(name="both", methods=["one-shot", "fastmem"], max_new_tokens=300)
    later = run("predict", methods=["one-shot", "fastmem"], max_new_tokens=300)
    assert essence(later) == essence(both)
    alone = run(name="alone", methods=["fastmem"])
    assert both[1]["curve"]["cross_entropy"] == pytest.approx(alone[0]["curve"]["cross_entropy"])
    cut = {record["method"]: record["n_truncated_tokens"] for record in both}
    assert cut["one-shot"] > cut["fastmem"] > 0
    assert both[0]["n_context_tokens"] == both[1]["n_context_tokens"] == 2048 - 32
    with pytest.raises(FastMemError, match=r"allowed: \d+; shorten it, lower --model.decode.max_new_tokens"):
        run(name="strict", methods=["fastmem"], strict=True)


def test_scores_that_came_before_a_kill_reach_the_metrics(run, tmp_path):
    run()
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        line["scores"]["factkb"] = 0.25
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run()
    later = json.loads((folder / "metrics.json").read_text())
    assert later["groups"]["all"]["fastmem"]["metrics"]["factkb"]["value"] == 0.25
    assert later["peak_memory_gib"] == metrics["peak_memory_gib"] != {}


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


def test_a_module_can_be_used_again(run, tmp_path, data_file, tiny):
    module = make_module(steps=1, max_new_tokens=4)
    data = FastMemDataModule("qa", str(data_file), limit=2)
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
    trainer.predict(module, data, run_dir=str(tmp_path / "one"))
    result = trainer.fit_predict(module, data, run_dir=str(tmp_path / "two"))
    assert set(result.metrics["groups"]["all"]) == {"zero-shot", "fastmem", "fastmem+cd"}


def test_predict_names_a_missing_memory(run, tmp_path):
    run("fit")
    (tmp_path / "run" / "memories" / "000003.safetensors").unlink()
    with pytest.raises(
        FastMemError, match=r"no memory of sample 3 in .*; run fastmem fit on this data first"
    ):
        run("predict")


def test_predict_refuses_memories_of_other_contexts(run, tmp_path, data_file):
    run("fit")
    changed = [dict(r, context=r["context"] + " Or not.") for r in RECORDS]
    data_file.write_text("\n".join(map(json.dumps, changed)))
    with pytest.raises(FastMemError, match=r"is of another context than sample 0's"):
        run("predict", name="other", memories=str(tmp_path / "run"))


def test_memories_folder_without_memories(run, tmp_path):
    with pytest.raises(FastMemError, match=r"model\.memories: no memories in"):
        run("predict", memories=str(tmp_path))


def test_out_of_memory_halves_the_batch(run, monkeypatch, caplog):
    expected = essence(run(name="roomy", batch_size=4))
    fit, sizes = Memorizer.fit, []

    def cramped(self, encoded):
        sizes.append(len(encoded))
        if len(encoded) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(self, encoded)

    monkeypatch.setattr(Memorizer, "fit", cramped)
    assert essence(run(name="cramped", batch_size=4)) == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert "out of memory with 4 samples at once; trying 2" in caplog.text


def test_graphs_of_earlier_batches_make_room_first(run, monkeypatch, caplog):
    expected = essence(run(name="roomy", batch_size=2))
    obtain, sizes = FastMemModule.obtain_memory, []

    def cramped(self, batch, encoded):
        sizes.append(len(batch))
        if self.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.graphs._idle["kept"] = None
        return obtain(self, batch, encoded)

    monkeypatch.setattr(FastMemModule, "obtain_memory", cramped)
    assert essence(run(name="cramped", batch_size=2)) == expected
    assert sizes == [2, 2, 2]
    assert "out of memory" not in caplog.text


def test_what_was_too_much_once_is_not_tried_again(run, monkeypatch, data_file):
    records = [{**r, "id": f"again{i}"} for i, r in enumerate(RECORDS * 3)]
    data_file.write_text("\n".join(map(json.dumps, records)))
    expected = essence(run(name="roomy", batch_size=4))
    fit, sizes = Memorizer.fit, []

    def cramped(self, encoded):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(self, encoded)

    monkeypatch.setattr(Memorizer, "fit", cramped)
    assert essence(run(name="cramped", batch_size=4)) == expected
    assert sizes[:3] == [4, 2, 2]
    # Shorter batches of four may be tried once more: they take less.
    assert sizes.count(4) < len(records) / 4


@pytest.mark.parametrize(("auto_batch", "batch_size"), [(True, 1), (False, 2)])
def test_out_of_memory_says_what_to_lower(run, monkeypatch, auto_batch, batch_size):
    def full(self, encoded):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Memorizer, "fit", full)
    with pytest.raises(
        OutOfMemoryError, match=rf"with {batch_size} sample\(s\) at once; lower --data\.batch_size"
    ):
        run(auto_batch=auto_batch, batch_size=batch_size)


def test_other_runtime_errors_are_not_taken_for_out_of_memory(run, monkeypatch):
    monkeypatch.setattr(Memorizer, "fit", lambda self, encoded: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()


def test_failed_memory_is_answered_by_the_base_model(run):
    records = run(learning_rate=1e30)
    by_method = {m: [r["token_ids"] for r in records if r["method"] == m] for m in ("zero-shot", "fastmem")}
    assert by_method["fastmem"] == by_method["zero-shot"]
    status = {r["status"] for r in records if r["method"] == "fastmem"}
    assert all(s.startswith("failed: the memorization loss is not finite") for s in status)
    assert {r["status"] for r in records if r["method"] == "zero-shot"} == {"ok"}


def test_long_contexts_are_cut_and_counted(run, tmp_path, capsys):
    records = run(max_context_tokens=20)
    assert {r["n_context_tokens"] for r in records if r["index"] == 1} == {20}
    assert [r["n_truncated_tokens"] > 0 for r in records if r["method"] == "fastmem"] == [
        False,
        True,
        False,
        False,
    ]
    print_run(tmp_path / "run")
    assert "1 sample had a context over the limit, which was cut off" in capsys.readouterr().out


def test_strict_refuses_long_contexts_before_answering(run, tmp_path):
    with pytest.raises(FastMemError, match=r"context of sample 1 has \d+ tokens, allowed: 20"):
        run(max_context_tokens=20, strict=True)
    assert not (tmp_path / "run").exists()


def test_raising_the_limit_goes_on(run):
    first = run(limit=2)
    assert essence(run(limit=4))[:6] == essence(first)
    assert len(run(limit=None)) == 12


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_precision_and_inference_mode(run, make_tiny, monkeypatch, precision, inference_mode):
    monkeypatch.setattr(
        "fastmem_pl.run.predict.Backbone.load", lambda *a, **k: make_tiny(precision=precision)
    )
    trainer = FastMemTrainer(
        accelerator="cpu", enable_progress_bar=False, precision=precision, inference_mode=inference_mode
    )
    records = run(trainer=trainer)
    falls = [r["curve"]["cross_entropy"] for r in records if r["method"] == "fastmem"]
    assert all(curve[-1] < curve[0] for curve in falls)


def test_the_base_is_untouched_also_when_a_run_raises(run, tiny, monkeypatch):
    before = snapshot(tiny)
    run()
    monkeypatch.setattr("fastmem_pl.run.predict.FastMemModule.record", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(name="raises")
    assert_untouched(tiny, before)


def test_metrics_cover_resumed_records(run, tmp_path, capsys):
    run(limit=2)
    run(limit=4)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    entry = metrics["groups"]["all"]["fastmem+cd"]
    assert entry["n"] == 4
    records = [json.loads(x) for x in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    wanted = [r["scores"]["contained"] for r in records if r["method"] == "fastmem+cd"]
    assert entry["metrics"]["contained"]["value"] == pytest.approx(sum(wanted) / 4)
    print_run(tmp_path / "run")
    assert "4 samples, mean ± standard error" in capsys.readouterr().out
