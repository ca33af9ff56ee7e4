"""Searches by Optuna: trials that go on, are given up, are shared; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
import yaml

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli import main
from fastmem_pl.search import optimize, plots
from fastmem_pl.search import study as study_module
from fastmem_pl.search.optimize import _point
from fastmem_pl.search.optuna_settings import OptunaSettings
from fastmem_pl.search.ranking import rank
from fastmem_pl.search.sampler import place_of
from fastmem_pl.search.study import SharedStudy

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = {"learning_rate": [1e-3, 3e-1], "steps": [1, 4]}
COUNT = 5


@pytest.fixture(autouse=True)
def few_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time of a tiny search."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(optimize, "plot_study", lambda *args: [])


@pytest.fixture
def with_plots() -> None:
    """Draw them."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records = [
        {
            "context": f"The tower {i} stands in Rome{'!' * i}",
            "question": f"Where is {i}?",
            "answers": ["e", "Rome"],
        }
        for i in range(COUNT)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def command(tiny_folder: Path, data: Path, tmp_path: Path):
    """Run `fastmem search`; returns the status."""

    def run(folder: str = "run", command: str = "search", options: tuple = (), **optuna_settings) -> int:
        settings = {"trials": 4, "parallel": 2, "space": SPACE, "pruner": "none", **optuna_settings}
        arguments = [
            *(
                "--model.backbone.source",
                str(tiny_folder),
                "--model.decode.max_new_tokens",
                "4",
                "--data.task",
                "qa",
            ),
            *("--data.path", str(data), "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", "--run_dir", str(tmp_path / folder)),
        ]
        if command == "search":
            arguments += ["--search.every", "1", "--search.objective", "contained"]
            arguments += ["--search.optuna", yaml.safe_dump(settings, default_flow_style=True, width=10**6)]
        return main([command, *arguments, *options])

    return run


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def key(point: dict | None):
    return point and tuple(sorted(point.items()))


def trials_of(database: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="fastmem", storage=f"sqlite:///{database}").trials


def states(database: Path) -> dict[str, int]:
    return dict(Counter(trial.state.name for trial in trials_of(database)))


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastmem: error")]
    assert len(lines) == 1
    return lines[0]


def test_trials_are_answered_like_runs_of_their_own_and_ranked(command, tmp_path, with_plots, capsys):
    assert command(trials=5) == 0
    folder = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "Searched 5 points" in printed
    assert "heatmap" not in printed
    records, trials = read(folder), trials_of(folder / "optuna.db")
    assert len(records) == COUNT * (5 + 1)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    for trial in trials:
        own = [r for r in records if r["trial"] == trial.number]
        assert [key(r["point"]) for r in own] == [key({**trial.params, "kl_coeff": 0.1})] * COUNT
        mean = sum(r["scores"]["contained"] for r in own) / COUNT
        assert trial.value == pytest.approx(mean)
        # From a quarter of the samples on, and to the last.
        assert sorted(trial.intermediate_values) == [2, 3, 4, 5]
        assert trial.intermediate_values[5] == pytest.approx(mean)
    assert [r["trial"] for r in records if r["point"] is None] == [None] * COUNT
    summary = json.loads((folder / "search.json").read_text())
    assert summary["study"]["trials"] == {"complete": 5}
    assert summary["ranking"]["best"]["value"] == pytest.approx(max(trial.value for trial in trials))
    pictures = sorted(path.name for path in folder.glob("*.svg"))
    assert pictures == [f"optuna-{name}.svg" for name in ("history", "importances", "parallel", "slice")]
    text = (folder / "search.md").read_text()
    assert "Heat map" not in text
    for name in pictures:
        assert ElementTree.parse(folder / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f"({name})" in text
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert key({name: best["model"][name] for name in ("learning_rate", "steps", "kl_coeff")}) == key(
        summary["ranking"]["best"]["point"]
    )
    best_trial = next(
        t for t in trials if key({**t.params, "kl_coeff": 0.1}) == key(summary["ranking"]["best"]["point"])
    )
    given = [f"--model.{name}={value}" for name, value in {**best_trial.params, "kl_coeff": 0.1}.items()]
    assert command("alone", "fit-predict", (*given, "--model.methods", "[zero-shot, fastmem]")) == 0
    alone = {(r["index"], r["method"]): r["token_ids"] for r in read(tmp_path / "alone")}
    found = {
        (r["index"], r["method"]): r["token_ids"] for r in records if r["trial"] in (None, best_trial.number)
    }
    assert found == alone


def place(record):
    return record["index"]


def test_a_study_goes_on_and_answers_nothing_twice(command, tmp_path, capsys, caplog):
    folder = tmp_path / "run"
    assert command(trials=3) == 0
    before = read(folder)
    assert command(trials=6) == 0
    assert "3 of 6 trials are finished" in caplog.text
    assert [record for record in read(folder) if record in before] == sorted(before, key=place)
    assert len({(r["index"], key(r["point"])) for r in read(folder)}) == len(read(folder)) == COUNT * 7
    assert command(trials=6) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert len(read(folder)) == COUNT * 7


# TPE draws its first ten at random.
@pytest.mark.parametrize(("sampler", "count"), [("tpe", 14), ("random", 6), ("qmc", 6)])
def test_the_seed_fixes_the_points_of_a_study_that_is_stopped_or_not(sampler, count, tmp_path):
    def points(folder: str, seed: int, stops: bool) -> list[dict]:
        settings = OptunaSettings(SPACE, trials=count, sampler=sampler, pruner="none", parallel=4, seed=seed)
        asked = []
        study = SharedStudy(settings, tmp_path / folder, minimize=False)
        (tmp_path / folder).mkdir()
        study.open({"model": {}})
        while trials := study.ask():
            if stops and len(asked) == 4:
                stops = False
                study.close()
                study.open({"model": {}})  # this folder's process was killed: its trials are queued again
                continue
            for trial in trials:
                study.finish(trial, -((math.log(trial.params["learning_rate"]) + 3) ** 2))
                asked.append(trial.params)
        study.close()
        return asked

    one = points("one", 0, False)
    assert len({tuple(p.items()) for p in one}) == count
    assert points("stopped", 0, True) == one
    assert points("other", 1, False) != one


def test_an_interrupt_keeps_answers_and_the_same_points_go_on(command, tmp_path, monkeypatch, capsys):
    assert command("whole", parallel=4) == 0
    usual, calls = optimize.TrialModule.predict_step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(self, *args)

    monkeypatch.setattr(optimize.TrialModule, "predict_step", interrupted)
    assert command(parallel=4) == 130
    assert "the same command goes on" in capsys.readouterr().err
    folder = tmp_path / "run"
    before = read(folder)
    assert len(before) == 2 * 5
    assert states(folder / "optuna.db") == {"FAIL": 4, "WAITING": 4}
    assert command(parallel=4) == 0
    assert [record for record in read(folder) if record in before] == sorted(before, key=place)
    assert len(read(folder)) == COUNT * 5
    assert states(folder / "optuna.db") == {"FAIL": 4, "COMPLETE": 4}
    whole = {(r["index"], key(r["point"])): r["token_ids"] for r in read(tmp_path / "whole")}
    assert {(r["index"], key(r["point"])): r["token_ids"] for r in read(folder)} == whole


class _GivesUp(optuna.pruners.BasePruner):
    """Gives one trial up at its first report."""

    def prune(self, study, trial):
        return trial.number == 1


def test_a_trial_that_is_given_up_is_evaluated_no_further(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optuna.pruners, "MedianPruner", _GivesUp)
    assert command(pruner="median", parallel=4) == 0
    folder = tmp_path / "run"
    trials = trials_of(folder / "optuna.db")
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    answered = Counter(record["trial"] for record in read(folder))
    assert answered == {None: COUNT, 0: COUNT, 1: 2, 2: COUNT, 3: COUNT}
    ranking = json.loads((folder / "search.json").read_text())["ranking"]
    assert [entry["n"] for entry in ranking["points"]] == [COUNT, COUNT, COUNT, 2]
    assert key(ranking["points"][-1]["point"]) == key({**trials[1].params, "kl_coeff": 0.1})
    assert sum("given up" in line for line in ranking["warnings"]) == 1
    assert "same command" not in capsys.readouterr().out
    size = len(read(folder))
    assert command(pruner="median", parallel=4) == 0
    assert len(read(folder)) == size


def test_low_is_good_for_format_failure(command, tmp_path):
    assert command(options=("--search.objective", "format_failure")) == 0
    found = optuna.load_study(study_name="fastmem", storage=f"sqlite:///{tmp_path / 'run' / 'optuna.db'}")
    assert found.direction == optuna.study.StudyDirection.MINIMIZE
    best = json.loads((tmp_path / "run" / "search.json").read_text())["ranking"]["best"]
    assert best["value"] == pytest.approx(found.best_value)


def test_trials_are_judged_by_a_model_once_they_are_answered(command, tmp_path, monkeypatch, data):
    monkeypatch.setattr(
        "fastmem_pl.run.scoring.load_metric_model",
        lambda *args: lambda answers, contexts: [len(set(answer)) / 10 for answer in answers],
    )
    records = [{"article": f"The tower {i} stands{'!' * i}.", "summary": "It stands."} for i in range(COUNT)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--data.task", "summary", "--data.fields", "{article: article, summary: summary}")
    options += ("--search.objective", "factkb", "--model.factkb_model", "none")
    assert command(pruner="median", options=options) == 0
    answers = read(tmp_path / "run")
    for trial in trials_of(tmp_path / "run" / "optuna.db"):
        scores = [len(set(r["prediction"])) / 10 for r in answers if r["trial"] == trial.number]
        assert trial.value == pytest.approx(sum(scores) / COUNT)
        assert not trial.intermediate_values


def test_two_workers_share_a_study_and_both_rank_all(command, tmp_path, monkeypatch, capsys):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    usual, others = optimize.TrialModule.predict_step, []

    def second_comes(self, *args):
        if not others:
            others.append(1)
            monkeypatch.setattr(optimize.TrialModule, "predict_step", usual)
            others.append(command("second", trials=5, storage=storage))
        return usual(self, *args)

    monkeypatch.setattr(optimize.TrialModule, "predict_step", second_comes)
    assert command("first", trials=5, storage=storage) == 0
    assert others == [1, 0]
    assert states(tmp_path / "shared.db") == {"COMPLETE": 5}
    answered = [{r["trial"] for r in read(tmp_path / name)} - {None} for name in ("first", "second")]
    assert answered == [{0, 1}, {2, 3, 4}]
    first, second = (json.loads((tmp_path / n / "search.json").read_text()) for n in ("first", "second"))
    assert (first["num_points"], second["num_points"]) == (5, 3)
    assert any("2 trials are still running" in line for line in second["ranking"]["warnings"])
    assert command("second", trials=5, storage=storage) == 0
    second = json.loads((tmp_path / "second" / "search.json").read_text())
    assert [p["point"] for p in second["ranking"]["points"]] == [
        p["point"] for p in first["ranking"]["points"]
    ]
    capsys.readouterr()
    # A third that comes late ranks what is there, and one with other samples is refused.
    assert command("third", trials=5, storage=storage) == 0
    assert command("fourth", trials=5, storage=storage, options=("--data.limit", "3")) == 2
    line = refusal(capsys)
    assert "data.samples: there 5, here 3" in line
    assert not (tmp_path / "fourth").exists()


def test_trials_of_a_killed_worker_are_run_by_another(command, tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    assert command("first", trials=2, storage=storage) == 0
    settings = OptunaSettings(SPACE, trials=4, parallel=2, storage=storage, pruner="none")
    dead = SharedStudy(settings, tmp_path / "dead", minimize=False)
    dead.open(optuna.load_study(study_name="fastmem", storage=storage).user_attrs["fastmem"])
    asked = [trial.params for trial in dead.ask()]
    dead.close()
    assert states(tmp_path / "shared.db") == {"COMPLETE": 2, "RUNNING": 2}
    monkeypatch.setattr(study_module, "_GRACE", 1)
    monkeypatch.setattr(
        optuna.storages.RDBStorage, "_get_stale_trial_ids", lambda self, study: stale(self, study)
    )

    def stale(storage, study):
        running = (TrialState.RUNNING,)
        return [
            t._trial_id
            for t in storage.get_all_trials(study, states=running)
            if t.user_attrs["run_dir"].endswith("dead")
        ]

    assert command("first", trials=4, storage=storage) == 0
    assert states(tmp_path / "shared.db") == {"COMPLETE": 4, "FAIL": 2}
    complete = [t.params for t in trials_of(tmp_path / "shared.db") if t.state == TrialState.COMPLETE]
    assert complete[2:] == asked


def test_a_running_trial_of_the_own_folder_does_not_block(command, tmp_path):
    assert command(trials=2) == 0
    database = tmp_path / "run" / "optuna.db"
    found = optuna.load_study(study_name="fastmem", storage=f"sqlite:///{database}")
    found.ask()  # killed before it knew its values
    found.ask().set_user_attr("run_dir", str(tmp_path / "run"))
    assert command(trials=4) == 0
    assert states(database) == {"COMPLETE": 4, "FAIL": 2}


def test_workers_that_ask_at_the_same_moment_do_not_exceed_the_number(tmp_path):
    settings = OptunaSettings(SPACE, trials=3, parallel=2, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    workers = [SharedStudy(settings, tmp_path / name, minimize=False) for name in "ab"]
    for worker in workers:
        worker.open({"model": {}})
    # As if both had counted before either asked.
    workers[1].running = lambda: 0
    asked = [worker.ask() for worker in workers]
    assert [len(trials) for trials in asked] == [2, 1]
    assert place_of(workers[0].study.trials, 3) == 3
    assert workers[0].study.trials[3].state == TrialState.FAIL
    for worker in workers:
        worker.close()


def test_signs_of_life_go_on_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_HEARTBEAT", 0.01)
    monkeypatch.setattr(study_module.SharedStudy, "_connect", _connect_with_whole_seconds)
    study = SharedStudy(OptunaSettings(SPACE), tmp_path, minimize=False)
    study.open({"model": {}})
    trials = study.ask()
    beats = []
    monkeypatch.setattr(study, "_beat", beats.append)
    with study.alive(trials):
        for _ in range(200):
            if len(beats) >= 16:
                break
            study_module.threading.Event().wait(0.01)
    assert {*beats} == {trial.number for trial in trials}
    study.close()


def _connect_with_whole_seconds(self):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "_HEARTBEAT", 60)
        _usual_connect(self)


_usual_connect = SharedStudy._connect


def test_settings_of_another_study_are_refused(command, tmp_path, capsys):
    assert command(trials=2) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert command(trials=2, space={**SPACE, "steps": [1, 5]}) == 2
    assert "search.space.steps: there [1, 4], here [1, 5]" in refusal(capsys)
    assert command(trials=2, options=("--search.objective", "f1")) == 2
    assert "search.objective: there 'contained', here 'f1'" in refusal(capsys)
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert command(trials=2, study="another", options=("--search.objective", "f1")) == 0
    # The answers are the same, whatever they are judged by.
    assert len(read(tmp_path / "run")) == COUNT * 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"space": {}}, "space: empty"),
        ({"space": {"learning_rate": [1e-3]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [1e-3, 1e-3]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [1e-3, 1e-5]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [1e-3, math.inf]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [0, 1e-3]}}, "above 0"),
        ({"space": {"kl_coeff": [0, 1]}}, "above 0"),
        ({"space": {"steps": [0, 5]}}, "at least 1"),
        ({"space": {"steps": [1.5, 5]}}, "no whole number"),
        ({"space": {"top_p": [0.5, 2]}}, "search.optuna.space.top_p"),
        ({"space": {"learning_rat": [1e-5, 1e-3]}}, "did you mean 'learning_rate'"),
        ({"space": {"relative_top": [0.1, 0.5]}}, "does not depend on relative_top"),
        ({"trials": 0}, "search.optuna.trials"),
        ({"parallel": 0}, "search.optuna.parallel"),
        ({"seed": -1}, "search.optuna.seed"),
        ({"storage": "study.db"}, "sqlite:///study.db"),
        ({"storage": "postgresql://host:port/db"}, "is no URL"),
        ({"storage": "sqlite:////nowhere/at/all/study.db"}, "no such folder"),
        ({"storage": "nodatabase://host/study"}, "search.optuna.storage"),
        ({"sampler": "tpo"}, "sampler"),
    ],
)
def test_mistakes_are_refused_in_one_line_and_nothing_is_written(command, tmp_path, capsys, settings, named):
    assert command(**settings) == 2
    assert named in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_optuna_is_refused_with_what_to_install(command, tmp_path, capsys, monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else usual(name, *a)
    )
    assert command() == 2
    assert 'pip install "fastmem-pl[optuna]"' in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_plot_that_fails_is_a_line_in_the_log(tmp_path, monkeypatch, caplog):
    def fails(study, name):
        raise ValueError("no\nroom")

    monkeypatch.setattr(plots, "_PLOTS", {"slice": plots._PLOTS["slice"], "history": fails})
    found, empty = optuna.create_study(), optuna.create_study()
    found.optimize(lambda trial: trial.suggest_float("alpha", 0, 1), n_trials=2)
    opened, style = plt.get_fignums(), dict(plt.rcParams)
    assert plots.plot_study(found, tmp_path, "accuracy") == ["optuna-slice.svg"]
    assert [r.message for r in caplog.records] == ["optuna-history.svg could not be drawn: no room"]
    assert plots.plot_study(empty, tmp_path, "accuracy") == []
    assert (plt.get_fignums(), dict(plt.rcParams)) == (opened, style)


def test_a_best_value_near_the_end_of_its_range_is_told():
    def records(point, value):
        fields = {
            "scores": {"accuracy": value},
            "status": "ok",
            "output_words": 1,
            "seconds": {"memorize": 0, "decode": 0},
        }
        return [{"index": i, "point": point, **fields} for i in range(3)]

    def lines(**point):
        ranges = {"learning_rate": (1e-6, 1e-2, True), "alpha": (0.0, 1.0, False), "steps": (1, 50, True)}
        found = rank(
            records(None, 0.0) + records(point, 1.0), "accuracy", {n: [v] for n, v in point.items()}, ranges
        )
        return [line for line in found.warnings if "the range" in line]

    assert lines(learning_rate=1e-4, alpha=0.5, steps=7) == []
    # Three decades above the lowest is the middle of a logarithmic scale, and near the lowest of another.
    assert lines(learning_rate=1.1e-6, alpha=0.001, steps=1) == [
        "the best learning_rate, 1.1e-06, is at the lower end of the range; the optimum may lie beyond it: lower 1e-06"
    ]
    assert len(lines(learning_rate=9.5e-3, alpha=0.99, steps=50)) == 3


def test_a_storage_that_breaks_is_told_in_one_line(tmp_path):
    study = SharedStudy(OptunaSettings(SPACE), tmp_path, minimize=False)
    study.open({"model": {}})
    (tmp_path / "optuna.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(FastMemError, match=r"search\.optuna\.storage: .* failed: ") as error:
        study.ask()
    assert "\n" not in str(error.value)
    study.close()


def test_a_password_is_not_shown(tmp_path):
    settings = OptunaSettings(SPACE, storage="postgresql://me:secret@host/db")
    assert "secret" not in SharedStudy(settings, tmp_path, minimize=False).url


def test_points_hold_every_memory_axis():
    class Model:
        class settings:
            learning_rate, steps, kl_coeff = 1e-4, 10, 0.1

    class Settings:
        optuna = OptunaSettings({"alpha": [0, 1], "steps": [1, 5]})

    point = _point(Model, Settings, {"alpha": 0.5, "steps": 3})
    assert point == {"learning_rate": 1e-4, "steps": 3, "kl_coeff": 0.1, "alpha": 0.5}
