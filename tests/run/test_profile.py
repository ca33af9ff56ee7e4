"""Profiles: they add up, they change no result, and nothing that happens to them stops a run."""

import errno
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import fork_ranks

from fastmem_pl import FastMemError, FastMemTrainer
from fastmem_pl.base.phases import PhaseCall, PhaseMeter
from fastmem_pl.report.runs import read_profile
from fastmem_pl.run.profile import PHASES, Measured, RunProfile, summarize

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, STEPS, NEW_TOKENS = 5, 2, 4
WORKED = ("trunk", "memorize", "prefill", "decode", "scoring")


@pytest.fixture
def run(tiny_run):
    return lambda *args, profile=("phases",), **settings: tiny_run(
        *args, profile=profile and list(profile), logger=False, **settings
    )


@pytest.fixture
def answers(records):
    return lambda folder: [{**record, "seconds": None} for record in records(folder)]


def files(folder):
    return sorted(path.name for path in (folder / "profile").iterdir())


def assert_adds_up(profile):
    phases = profile["phases"]
    assert list(phases) == [phase for phase in PHASES if phase in phases]
    assert sum(numbers["seconds"] for numbers in phases.values()) == pytest.approx(profile["wall_seconds"])
    assert sum(numbers["share"] for numbers in phases.values()) == pytest.approx(1)
    assert all(numbers["seconds"] >= 0 for numbers in phases.values())


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_shares_add_up_tokens_are_counted_and_results_stay(run, answers):
    plain = run(name="plain", profile=None)
    assert (plain.profile, (plain.path / "profile").exists()) == ({}, False)
    result = run()
    found = answers(result.path)
    assert found == answers(plain.path)
    assert result.metrics["settings"] == plain.metrics["settings"]
    assert result.metrics["peak_memory_gib"].keys() == plain.metrics["peak_memory_gib"].keys()

    profile = json.loads((result.path / "profile" / "profile.json").read_text())
    assert profile == json.loads(json.dumps(result.profile)) == read_profile(result.path)
    assert_adds_up(profile)
    assert profile["wall_seconds"] > 0
    assert profile["batch_sizes"] == {"1": 1, "2": 2}
    assert (profile["mode"], profile["num_samples"], profile["files"]) == ("fit-predict", COUNT, [])
    assert (profile["environment"]["device"]["type"], profile["environment"]["processes"]) == ("cpu", 1)
    assert profile["settings"]["model"]["backbone"]["source"] == "tiny"

    phases = profile["phases"]
    methods = list(dict.fromkeys(record["method"] for record in found))
    first = [record for record in found if record["method"] == methods[0]]
    context = sum(record["n_context_tokens"] for record in first)
    assert phases["trunk"]["tokens"] == context
    assert phases["memorize"]["tokens"] == STEPS * context
    assert phases["memorize"]["steps"] == STEPS * 3
    # Methods share a prompt's pass.
    assert phases["prefill"]["tokens"] == sum(record["n_prompt_tokens"] for record in first)
    assert phases["decode"]["tokens"] == sum(len(record["token_ids"]) for record in found)
    assert phases["decode"]["calls"] == 3 * len(methods)
    assert list(phases["decode"]["methods"]) == methods
    for method, numbers in phases["decode"]["methods"].items():
        lengths = [len(record["token_ids"]) for record in found if record["method"] == method]
        assert (numbers["samples"], numbers["calls"], numbers["tokens"]) == (COUNT, 3, sum(lengths))
        assert max(lengths) <= numbers["steps"] <= 3 * NEW_TOKENS
        assert numbers["ms_per_step"] == pytest.approx(1000 * numbers["seconds"] / numbers["steps"])
        assert "share" not in numbers
    per_token = 1000 * phases["decode"]["seconds"] / phases["decode"]["tokens"]
    assert phases["decode"]["ms_per_token"] == pytest.approx(per_token)
    rate = phases["trunk"]["tokens"] / phases["trunk"]["seconds"]
    assert phases["trunk"]["tokens_per_second"] == pytest.approx(rate)
    for phase in WORKED:
        assert phases[phase]["peak_memory_gib"] > 0
        assert 0 <= phases[phase]["first_seconds"] <= phases[phase]["seconds"]
        assert phases[phase]["median_seconds"] is not None
    assert phases["load"]["calls"] == 1


def test_fit_then_predict_say_what_they_do(run):
    assert set(run("fit").profile["phases"]) == {"load", "trunk", "memorize", "memories", "other"}
    result = run("predict")
    assert_adds_up(result.profile)
    # Nothing is memorized while saved memories are read.
    assert set(result.profile["phases"]) == {"load", "memories", "prefill", "decode", "scoring", "other"}
    assert result.profile["batch_sizes"] == {"1": 1, "2": 2}
    phases = run(name="none", model={"steps": 0}).profile["phases"]
    assert "trunk" not in phases
    assert "tokens" not in phases["memorize"]


@pytest.mark.parametrize(("batch_size", "batches"), [(3, 2), (1, 3)])
def test_trace_has_our_labels_of_a_few_batches(run, batch_size, batches, capfd):
    result = run(profile=["trace"], batch_size=batch_size)
    assert files(result.path) == ["profile.json", "trace-0.json"]
    events = json.loads((result.path / "profile" / "trace-0.json").read_text())["traceEvents"]
    names = Counter(event.get("name") for event in events if event.get("cat") == "user_annotation")
    assert [names[name] for name in ("trunk", "memorize", "fastmem+cd", "prefill")] == [batches] * 4
    assert names["decode"] == 3 * batches
    assert any("aten::" in event.get("name", "") for event in events)
    assert (result.profile["traced_batches"], result.profile["files"]) == (batches, ["trace-0.json"])
    assert result.profile["phases"]["trace"]["calls"] == 2
    assert_adds_up(result.profile)
    assert "profiler" not in capfd.readouterr().err.lower()


def test_memory_needs_a_gpu_and_says_so(run, caplog):
    assert files(run(profile=["memory"]).path) == ["profile.json"]
    assert any("memory is" in message and "CUDA" in message for message in caplog.messages)


@pytest.mark.parametrize("kinds", [["memory"], ["trace", "memory"]])
def test_a_history_of_memory_alone_slows_no_batch(tmp_path, monkeypatch, caplog, kinds):
    """Four batches of a GPU that is not there, and a trace that does not start."""

    def busy(self):
        raise RuntimeError("another one is running")

    monkeypatch.setattr("torch.cuda.memory._record_memory_history", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", lambda path: open(path, "w").close())
    monkeypatch.setattr(torch.profiler.profile, "start", busy)
    profile = RunProfile(kinds, 0.0, tmp_path)
    module = SimpleNamespace(meter=PhaseMeter(torch.device("cpu"), profile.calls))
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer = SimpleNamespace(num_predict_batches=[4], strategy=strategy, is_global_zero=True, global_rank=0)
    profile.on_predict_start(trainer, module)
    for index in range(4):
        profile.on_predict_batch_start(trainer, module, None, index)
        profile.on_predict_batch_end(trainer, module, None, None, index)
    profile.on_predict_end(trainer, module)
    measured = profile.measured()
    assert (measured.traced_batches, measured.files) == (0, ["memory-0.pickle"])
    assert ("no trace: another one is running" in caplog.text) == ("trace" in kinds)


@pytest.mark.parametrize("silently", [True, False])
def test_a_full_disk_costs_the_trace_only(run, records, monkeypatch, caplog, silently):
    def export(trace, path):
        # As torch does: it writes what fits, and says nothing.
        Path(path).write_text('{"traceEvents": [')
        if not silently:
            full()

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    result = run(profile=["trace"])
    assert len(records(result.path)) == COUNT * 3
    assert files(result.path) == ["profile.json"]
    (said,) = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert "trace-0.json" in said
    assert ("disk may be full" if silently else "No space left") in said
    assert (result.profile["traced_batches"], result.profile["files"]) == (2, [])


def test_a_full_disk_costs_the_profile_only(run, monkeypatch, caplog):
    monkeypatch.setattr("fastmem_pl.run.profile.whole_file", full)
    result = run()
    assert result.profile["phases"]
    assert result.metrics == json.loads((result.path / "metrics.json").read_text())
    assert "No space left" in caplog.text


def test_a_batch_that_fails_ends_the_trace(run, monkeypatch):
    def fail(*args):
        raise ValueError("by the test")

    with monkeypatch.context() as patched:
        patched.setattr("fastmem_pl.run.predict.score_answer", fail)
        with pytest.raises(ValueError, match="by the test"):
            run(profile=["trace"])
    # torch allows one profiler at a time.
    assert run(profile=["trace"]).profile["traced_batches"] == 2


def test_a_run_goes_on_with_or_without_a_profile(run, monkeypatch):
    run(limit=2, profile=None)
    path = run(limit=4).path
    kept = path / "profile" / "profile.json"
    first = kept.read_text()
    assert json.loads(first)["num_samples"] == 2
    # Nothing left to do: what was measured stays.
    again = run(limit=4)
    assert (again.num_new, again.profile, kept.read_text()) == (0, {}, first)
    with monkeypatch.context() as patched:
        patched.setattr("fastmem_pl.run.session.score_records", lambda *args: ["factkb"])
        scored = run(limit=4)
    assert (scored.added_scores, scored.profile, kept.read_text()) == (["factkb"], {}, first)
    run(profile=None)
    assert kept.read_text() == first
    assert "profile" not in (path / "run.json").read_text()


def test_processes_gather_one_profile(run, tmp_path, answers):
    expected = run(name="one", batch_size=1)

    def work(rank):
        return run(name="several", devices=2, batch_size=1, profile=["phases", "trace"]).profile

    found, path = fork_ranks(2, work, tmp_path), tmp_path / "several"
    profile = read_profile(path)
    assert found == [profile, profile]
    assert [r["token_ids"] for r in answers(path)] == [r["token_ids"] for r in answers(expected.path)]
    assert files(path) == ["profile.json", "trace-0.json", "trace-1.json"]
    assert_adds_up(profile)
    assert profile["environment"]["processes"] == 2
    for phase, unit in itertools.product(("memorize", "decode"), ("samples", "tokens")):
        assert profile["phases"][phase][unit] == expected.profile["phases"][phase][unit] > 0
    assert profile["batch_sizes"] == expected.profile["batch_sizes"] == {"1": COUNT}


def test_seconds_are_those_of_the_slowest_and_tokens_those_of_all():
    def measured(**phases):
        return Measured(10.0, [PhaseCall(phase, "", *numbers) for phase, numbers in phases.items()], 0, [])

    first = measured(decode=(4.0, 2**30, 1, 40, 40), scoring=(1.0, 0))
    second = measured(decode=(8.0, 2**31, 1, 40, 40), memorize=(1.0, 3 * 2**30, 1, 10, 1))
    merged = summarize([first, second])
    decode = merged["phases"]["decode"]
    assert (decode["seconds"], decode["tokens"], decode["steps"]) == (8, 80, 80)
    assert (decode["tokens_per_second"], decode["ms_per_token"]) == pytest.approx((10, 200))
    assert decode["peak_memory_gib"] == 2
    # Done by the other one meanwhile.
    assert (merged["phases"]["scoring"]["seconds"], merged["phases"]["scoring"]["share"]) == (0, 0)
    assert_adds_up(merged)
    # Processes that hold one model do the same work.
    together = summarize([first, second], shared=False)["phases"]["decode"]
    assert (together["tokens"], together["peak_memory_gib"]) == (40, 2)


def test_python_is_told_as_well():
    with pytest.raises(FastMemError, match=r"trainer\.profile: 'traces' is unknown.*did you mean 'trace'"):
        FastMemTrainer(profile=["traces"])
    assert FastMemTrainer(profile="memory, trace").profile == ["phases", "trace", "memory"]
