"""Profiles: they add up, they change no result, and nothing that happens to them stops a run."""

import errno
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import make_module
from ranks import fork_ranks
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemTrainer
from fastmem_pl.base.phases import PhaseCall
from fastmem_pl.cli import main
from fastmem_pl.data.reader import PACKAGED, read_samples
from fastmem_pl.report.table import profile_table
from fastmem_pl.run.callbacks import tracing
from fastmem_pl.run.profile import PHASES, Profiler, merge, profile_path, read_profile

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]
COUNT, STEPS, NEW_TOKENS = 5, 3, 6
WORKED = ("trunk", "memorize", "prefill", "decode", "scoring")


@pytest.fixture
def data_file(tmp_path):
    return write_towers(tmp_path, COUNT)


@pytest.fixture
def run(tmp_path, data_file, tiny, monkeypatch):
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def start(name="run", mode="fit_predict", limit=None, batch_size=2, model=None, **trainer):
        settings = {"accelerator": "cpu", "logger": False, "profile": ["phases"], **trainer}
        loop = FastMemTrainer(enable_progress_bar=False, **settings)
        module = make_module(
            "tiny", **{"steps": STEPS, "learning_rate": 1e-3, "max_new_tokens": NEW_TOKENS, **(model or {})}
        )
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=batch_size)
        return getattr(loop, mode)(module, data, run_dir=str(tmp_path / name))

    return start


def records(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def files(folder):
    return sorted(path.name for path in (folder / "profile").iterdir())


def assert_adds_up(profile):
    phases = profile["phases"]
    assert list(phases) == [phase for phase in PHASES if phase in phases]
    assert sum(numbers["seconds"] for numbers in phases.values()) == pytest.approx(profile["wall_seconds"])
    assert sum(numbers["share"] for numbers in phases.values()) == pytest.approx(1)
    assert all(numbers["seconds"] >= 0 for numbers in phases.values())


def test_results_are_the_same_with_and_without_a_profile(run):
    plain = run("plain", profile=None)
    profiled = run("profiled", profile=["trace"])
    assert records(profiled.path) == records(plain.path)
    assert profiled.metrics["peak_memory_gib"].keys() == plain.metrics["peak_memory_gib"].keys()
    assert profiled.metrics["settings"] == plain.metrics["settings"]
    assert plain.profile == {}
    assert not (plain.path / "profile").exists()


def test_shares_add_up_and_tokens_are_counted(run, tiny):
    before = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - before
    profile = json.loads(profile_path(result.path).read_text())
    assert profile == json.loads(json.dumps(result.profile))
    assert_adds_up(profile)
    assert 0 < profile["wall_seconds"] <= elapsed
    assert profile["batch_sizes"] == {"1": 1, "2": 2}
    assert (profile["mode"], profile["num_samples"], profile["files"]) == ("fit-predict", COUNT, [])
    assert profile["environment"]["device"]["type"] == "cpu"
    assert profile["settings"]["model"]["backbone"] == "tiny"

    found, phases = records(result.path), profile["phases"]
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
        answers = [record["token_ids"] for record in found if record["method"] == method]
        assert (numbers["samples"], numbers["calls"]) == (COUNT, 3)
        assert numbers["tokens"] == sum(map(len, answers))
        assert max(map(len, answers)) <= numbers["steps"] <= 3 * NEW_TOKENS
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
    fitted = run(mode="fit").profile["phases"]
    assert set(fitted) == {"load", "trunk", "memorize", "memories", "other"}
    result = run(mode="predict")
    assert_adds_up(result.profile)
    # Nothing is memorized while saved memories are read.
    assert set(result.profile["phases"]) == {"load", "memories", "prefill", "decode", "scoring", "other"}
    assert result.profile["batch_sizes"] == {"1": 1, "2": 2}


def test_without_steps_there_is_no_trunk_pass_of_contexts(run):
    phases = run(model={"steps": 0}).profile["phases"]
    assert "trunk" not in phases
    assert "tokens" not in phases["memorize"]


@pytest.mark.parametrize(("batch_size", "batches"), [(3, 2), (1, 3)])
def test_trace_has_our_labels_of_a_few_batches(run, batch_size, batches, capfd):
    result = run(profile=["trace"], batch_size=batch_size)
    assert files(result.path) == ["profile.json", "trace-0.json"]
    events = json.loads((result.path / "profile" / "trace-0.json").read_text())["traceEvents"]
    names = Counter(event.get("name") for event in events if event.get("cat") == "user_annotation")
    assert {name: names[name] for name in ("trunk", "memorize", "fastmem+cd", "prefill")} == {
        "trunk": batches,
        "memorize": batches,
        "fastmem+cd": batches,
        "prefill": batches,
    }
    assert names["decode"] == 3 * batches
    assert any("aten::" in event.get("name", "") for event in events)
    assert result.profile["traced_batches"] == batches
    assert result.profile["files"] == ["trace-0.json"]
    assert result.profile["phases"]["trace"]["calls"] == 2
    assert_adds_up(result.profile)
    assert "profiler" not in capfd.readouterr().err.lower()


def test_memory_needs_a_gpu_and_says_so(run, caplog):
    result = run(profile=["memory"])
    assert files(result.path) == ["profile.json"]
    said = [entry.getMessage() for entry in caplog.records if "memory is" in entry.getMessage()]
    assert len(said) == 1
    assert "CUDA" in said[0]


@pytest.mark.parametrize("silently", [True, False])
def test_a_full_disk_costs_the_trace_only(run, monkeypatch, caplog, silently):
    def export(trace, path):
        # As torch does: it writes what fits, and says nothing.
        Path(path).write_text('{"traceEvents": [')
        if not silently:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tracing.torch.profiler.profile, "export_chrome_trace", export)
    result = run(profile=["trace"])
    assert len(records(result.path)) == COUNT * 3
    assert files(result.path) == ["profile.json"]
    said = [entry.getMessage() for entry in caplog.records if "cannot write" in entry.getMessage()]
    assert len(said) == 1
    assert "trace-0.json" in said[0]
    assert ("disk may be full" if silently else "No space left") in said[0]


def test_a_full_disk_costs_the_profile_only(run, monkeypatch, caplog):
    def write(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastmem_pl.run.profile.write_atomic", write)
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
    result = run(profile=["trace"])
    assert files(result.path) == ["profile.json", "trace-0.json"]


def test_a_run_goes_on_with_or_without_a_profile(run):
    run(limit=2, profile=None)
    path = run(limit=4).path
    first = profile_path(path).read_text()
    assert json.loads(first)["num_samples"] == 2
    # Nothing left to do: what was measured stays.
    again = run(limit=4)
    assert (again.num_new, again.profile) == (0, {})
    assert profile_path(path).read_text() == first
    run(profile=None)
    assert profile_path(path).read_text() == first
    assert "profile" not in (path / "run.json").read_text()


@pytest.mark.parametrize("kinds", [["phases"], ["phases", "trace"]])
def test_processes_gather_one_profile(run, tmp_path, kinds):
    expected = run("one", profile=None).path

    def work(rank):
        return run("several", devices=2, batch_size=1, profile=kinds).profile

    found = fork_ranks(2, work, tmp_path)
    path = tmp_path / "several"
    profile = json.loads(profile_path(path).read_text())
    assert found == [profile, profile]
    assert [record["token_ids"] for record in records(path)] == [r["token_ids"] for r in records(expected)]
    assert files(path) == ["profile.json"] + (["trace-0.json", "trace-1.json"] if "trace" in kinds else [])
    assert_adds_up(profile)
    assert [part["name"] for part in profile["processes"]] == ["0", "1"]
    assert profile["phases"]["memorize"]["samples"] == COUNT
    new = sum(len(record["token_ids"]) for record in records(path))
    assert profile["phases"]["decode"]["tokens"] == new
    assert profile["batch_sizes"] == {"1": COUNT}
    assert profile["num_samples"] == COUNT


def test_elastic_workers_keep_their_own(run, tmp_path):
    def work(rank):
        return run("shared", elastic=True, chunk_samples=1, stale_after=1.0, batch_size=1).num_new

    new = fork_ranks(2, work, tmp_path)
    path = tmp_path / "shared"
    assert sum(new) == COUNT
    assert not profile_path(path).exists()
    assert len(list((path / "profile").glob("profile-*.json"))) == sum(1 for count in new if count)
    merged = read_profile(path)
    assert_adds_up(merged)
    assert (merged["num_samples"], merged["phases"]["memorize"]["samples"]) == (COUNT, COUNT)


def kept(path):
    return {file: json.loads(file.read_text()) for file in sorted((path / "profile").glob("profile*.json"))}


def test_elastic_workers_of_two_sessions_are_not_merged(run, tmp_path):
    def session(limit):
        def work(rank):
            settings = {"chunk_samples": 1, "stale_after": 1.0, "batch_size": 1}
            return run("shared", limit=limit, elastic=True, **settings).num_new

        return fork_ranks(2, work, tmp_path)

    path = tmp_path / "shared"
    assert sum(session(3)) == 3
    before = kept(path)
    new = session(COUNT)
    assert sum(new) == COUNT - 3
    profile = read_profile(path)
    assert_adds_up(profile)
    assert (profile["num_samples"], profile["phases"]["memorize"]["samples"]) == (COUNT - 3, COUNT - 3)
    assert profile["environment"]["processes"] == len(profile["processes"]) == sum(map(bool, new))
    assert not before.keys() & kept(path).keys()


@pytest.mark.parametrize("first", [True, False])
def test_the_last_session_counts_whether_elastic_or_not(run, tmp_path, first):
    run(limit=2, elastic=first)
    path = run(limit=4, elastic=not first, batch_size=1).path
    assert len(kept(path)) == 1
    assert profile_path(path).exists() is first
    assert (read_profile(path)["num_samples"], read_profile(path)["batch_sizes"]) == (2, {"1": 2})


def test_a_session_that_was_killed_before_it_removed_the_earlier_ones(run, tmp_path):
    path = run(limit=3).path
    earlier = profile_path(path).read_text()
    run(limit=4, elastic=True)
    (worker,) = kept(path)
    profile_path(path).write_text(earlier)
    # Of a version that did not say which session it was.
    old = profile_path(path, "old")
    old.write_text(json.dumps({k: v for k, v in json.loads(earlier).items() if k != "session"}))
    for file, age in ((worker, 0), (profile_path(path), 10), (old, 20)):
        os.utime(file, (time.time() - age,) * 2)
    assert read_profile(path)["num_samples"] == 1
    os.utime(profile_path(path), (time.time() + 10,) * 2)
    assert read_profile(path)["num_samples"] == 3


@pytest.mark.parametrize("elastic", [False, True])
def test_scores_alone_take_no_profiles_place(run, monkeypatch, elastic):
    def added(run, model, datamodule):
        return ["factkb"]

    path = run(elastic=True).path
    before = kept(path)
    monkeypatch.setattr("fastmem_pl.run.session.score_records", added)
    result = run(elastic=elastic)
    assert (result.num_new, result.added_scores, result.profile) == (0, ["factkb"], {})
    assert kept(path) == before


def part(name, wall, **phases):
    profiler = Profiler(["phases"], time.perf_counter() - wall)
    profiler.calls = [PhaseCall(phase, "", *numbers) for phase, numbers in phases.items()]
    return profiler.part(name)


def test_seconds_are_those_of_the_slowest_and_tokens_those_of_all():
    first = part("0", 10, decode=(4.0, 2**30, 1, 40, 40), scoring=(1.0, 0))
    second = part("1", 10, decode=(8.0, 2**31, 1, 40, 40), memorize=(1.0, 3 * 2**30, 1, 10, 1))
    merged = merge([first, second])
    assert merged["phases"]["decode"]["seconds"] == 8
    assert (merged["phases"]["decode"]["tokens"], merged["phases"]["decode"]["steps"]) == (80, 80)
    assert merged["phases"]["decode"]["tokens_per_second"] == pytest.approx(10 + 5)
    assert merged["phases"]["decode"]["ms_per_token"] == pytest.approx(200)
    assert merged["phases"]["decode"]["peak_memory_gib"] == 2
    # Done by the other one meanwhile.
    assert (merged["phases"]["scoring"]["seconds"], merged["phases"]["scoring"]["share"]) == (0, 0)
    assert_adds_up(merged)
    # Processes that hold one model do the same work.
    together = merge([first, second], shared=False)
    assert together["phases"]["decode"]["tokens"] == 40
    assert together["phases"]["decode"]["peak_memory_gib"] == 2


def test_damaged_profile(tmp_path):
    assert read_profile(tmp_path) is None
    profile_path(tmp_path).parent.mkdir()
    profile_path(tmp_path).write_text('{"phases": {}}')
    with pytest.raises(FastMemError, match=r"profile\.json is damaged"):
        read_profile(tmp_path)


def places(value, path=()):
    """Where something stands in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", [None, "worker"])
def test_a_profile_is_shown_or_called_damaged(run, name):
    """Without anything that it has, and with something else in its place."""
    path = run(elastic=name is not None).path
    (file,) = kept(path)
    whole, damaged, other = file.read_text(), 0, object()
    for place in places(json.loads(whole)):
        for value in (other, None, "x"):
            profile = json.loads(whole)
            inner = profile
            for key in place[:-1]:
                inner = inner[key]
            if value is other:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            file.write_text(json.dumps(profile))
            try:
                profile_table(read_profile(path))
            except FastMemError:
                damaged += 1
    assert damaged > 20
    file.write_text(whole.replace('"wall_seconds"', '"seconds"'))
    with pytest.raises(FastMemError, match=r"\.json is damaged"):
        read_profile(path)


def resolved(capsys, *arguments, command="fit-predict"):
    assert main([command, *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)["trainer"]["profile"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["--profile"], ["phases"]),
        (["--profile", "--data.limit", "2"], ["phases"]),
        (["--profile=trace"], ["phases", "trace"]),
        (["--profile=memory,trace"], ["phases", "trace", "memory"]),
        (["--profile", "trace, memory"], ["phases", "trace", "memory"]),
        (["--profile", "--trainer.profile", "[trace]"], ["trace"]),
        (["--trainer.profile", "trace"], "trace"),
        (["--config", "profile"], ["phases"]),
        (["--config", "profile", "--profile=trace"], ["phases", "trace"]),
    ],
)
def test_the_option(capsys, given, expected):
    assert resolved(capsys, *given) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit-predict", "--profile=trase"], "--profile: 'trase' is unknown.*did you mean 'trace'"),
        (["fit-predict", "--profile="], "--profile: '' is unknown; allowed: memory, phases, trace"),
        (["fit", "--trainer.profile", "[phasse]"], "trainer.profile.*'phasse'.*did you mean 'phases'"),
        (["fit", "--trainer.profile", "trace,phasse"], "trainer.profile: 'phasse' is .* mean 'phases'"),
        (["search", "--profile"], "--profile: not with search; allowed with fit-predict, fit, predict"),
        (["ask", "x.fastmem", "--profile=trace"], "--profile: not with ask"),
        (["tasks", "--profile"], "--profile: not with tasks"),
        (["compare", "x", "--profile"], "--profile: not with compare"),
        (["fit-predcit", "--profile"], "'fit-predcit' is no command"),
        (["search", "--config", "smollm2,search,profile"], "trainer.profile: a search is not profiled"),
    ],
)
def test_what_is_refused(capsys, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not list(tmp_path.iterdir())


def test_python_is_told_as_well():
    with pytest.raises(FastMemError, match=r"trainer\.profile: 'traces' is unknown.*did you mean 'trace'"):
        FastMemTrainer(profile=["traces"])
    assert FastMemTrainer(profile="memory, trace").profile == ["phases", "trace", "memory"]


def test_the_table_at_the_end(capsys, data_file, tiny_folder, tmp_path, monkeypatch):
    arguments = [
        "--data.task",
        "qa",
        "--data.path",
        str(data_file),
        "--data.limit",
        "2",
        "--model.memorize.steps",
        "1",
    ]
    arguments += ["--model.backbone", str(tiny_folder), "--run_dir", str(tmp_path / "run"), "--profile"]
    for command in ("fit", "predict"):
        assert main([command, *arguments, "--model.decode.max_new_tokens", "3"]) == 0
        said = capsys.readouterr().out
        assert f"profile of {command}: 2 samples, " in said
        assert ("decode: fastmem+cd" in said) == (command == "predict")
        assert f"profile: {tmp_path / 'run' / 'profile'}" in said.replace("\n", "")
    # Complete already.
    assert main(["predict", *arguments, "--model.decode.max_new_tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "profile of" not in said
    assert "profile: nothing was measured" in said
    monkeypatch.setattr("fastmem_pl.run.session.score_records", lambda *args: ["factkb"])
    assert main(["predict", *arguments, "--model.decode.max_new_tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "nothing was" not in said
    assert f"profile: only scores were added; {tmp_path / 'run' / 'profile'} stays as it was" in said


def test_the_paper_profile_is_one_context_and_several_questions(capsys):
    assert main(["fit-predict", "--config", "paper-profile", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["max_context_tokens"], config["data"]["batch_size"]) == (2500, 1)
    assert config["trainer"]["profile"] == ["phases"]
    samples = read_samples(PACKAGED[config["data"]["path"]], config["data"]["task"])
    assert len({sample.context for sample in samples}) == 1
    # The first warms up, and a median of others needs two.
    assert len({sample.question for sample in samples}) == len(samples) >= 3
    # The answers stand in what is left after the cut, by words: a token is one at most, on average.
    shown = " ".join(samples[0].context.split()[:1800])
    assert all(any(answer in shown for answer in sample.references) for sample in samples)


@pytest.mark.demo
def test_the_packaged_context_fills_the_papers_limit(demo):
    sample = read_samples(PACKAGED["long"], "qa")[0]
    assert demo.chat.count_tokens([sample.context])[0] > 2900
