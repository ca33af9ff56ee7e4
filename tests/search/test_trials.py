"""Searches by Optuna: trials that go on, are given up, are shared; and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState
from runs import QUIET, options, read, write
from search_runs import keyed, name_of

from fastmem_pl.cli import main
from fastmem_pl.search import OptunaSettings, trials
from fastmem_pl.search.evaluate import SearchModule
from fastmem_pl.search.trials import distributions_of, sampler_of

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = {"learning_rate": [1e-3, 3e-1], "steps": [1, 4]}
COUNT = 5


@pytest.fixture(autouse=True)
def few_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time of a tiny search."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(trials, "plot_study", lambda *args: [])


@pytest.fixture
def with_plots() -> None:
    """Draw them."""


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path):
    """Of `fastmem search` by trials."""
    records = [
        {"context": f"The tower {i} stands in Rome{'!' * i}", "question": f"Where is {i}?", "answers": ["e"]}
        for i in range(COUNT)
    ]
    source = {"data__task": "qa", "data__path": write(tmp_path / "data.jsonl", records)}
    search = {"search__every": 1, "search__objective": "contained"}
    usual = {"backbone": tiny_folder, "max_new_tokens": 4, **QUIET, **source, **search}

    def made(folder: str = "run", given: dict | None = None, **optuna_settings) -> list[str]:
        settings = {"trials": 4, "parallel": 2, "space": SPACE, "pruner": "none", **optuna_settings}
        text = yaml.safe_dump(settings, default_flow_style=True, width=10**6)
        told = {"run_dir": tmp_path / folder, "search__optuna": text, **(given or {})}
        return ["search", *options(**{**usual, **told})]

    return made


@pytest.fixture
def command(arguments, tmp_path):
    """Runs it; gives the folder."""

    def call(folder: str = "run", given: dict | None = None, expect: int = 0, **settings) -> Path:
        assert main(arguments(folder, given, **settings)) == expect
        return tmp_path / folder

    return call


def study_of(database: Path) -> optuna.Study:
    return optuna.load_study(study_name="fastmem", storage=f"sqlite:///{database}")


def states(database: Path) -> dict[str, int]:
    return dict(Counter(trial.state.name for trial in study_of(database).trials))


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


def answered(records: list[dict]) -> dict:
    return {key: record["token_ids"] for key, record in keyed(records).items()}


@pytest.fixture
def at_step(monkeypatch):
    """Does something at each predict step of searches, given how many there were."""

    def act(work: Callable[[int], None]) -> None:
        step, steps = SearchModule.predict_step, itertools.count(1)

        def acting(self, *args):
            work(next(steps))
            return step(self, *args)

        monkeypatch.setattr(SearchModule, "predict_step", acting)

    return act


def test_trials_are_answered_like_points_of_a_grid_and_ranked(command, with_plots, capsys, monkeypatch):
    beaten, usual = set(), optuna.storages.RDBStorage.record_heartbeat

    def noted(self, trial_id):
        beaten.add(trial_id)
        usual(self, trial_id)

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", noted)
    folder = command(trials=5)
    printed = capsys.readouterr().out
    assert "Searched 5 points" in printed
    assert "heatmap" not in printed
    records, found = read(folder), study_of(folder / "optuna.db").trials
    assert len(records) == COUNT * (5 + 1)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 5
    assert beaten == {trial._trial_id for trial in found}
    for trial in found:
        own = [r for r in records if r["trial"] == trial.number]
        assert [name_of(r["point"]) for r in own] == [name_of({**trial.params, "kl_coeff": 0.1})] * COUNT
        mean = sum(r["scores"]["contained"] for r in own) / COUNT
        assert trial.value == pytest.approx(mean)
        # From a quarter of the samples on, and to the last.
        assert sorted(trial.intermediate_values) == [2, 3, 4, 5]
        assert trial.intermediate_values[5] == pytest.approx(mean)
    assert [r["trial"] for r in records if r["point"] is None] == [None] * COUNT
    summary = summary_of(folder)
    assert summary["study"]["trials"] == {"complete": 5}
    best = summary["ranking"]["best"]
    assert best["value"] == pytest.approx(max(trial.value for trial in found))
    pictures = sorted(path.name for path in folder.glob("*.svg"))
    assert pictures == [f"optuna-{name}.svg" for name in ("history", "importances", "parallel", "slice")]
    text = (folder / "search.md").read_text()
    assert "Heat map" not in text
    for name in pictures:
        assert ElementTree.parse(folder / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f"({name})" in text
    memorize = yaml.safe_load((folder / "best.yaml").read_text())["model"]["memorize"]
    assert {name: memorize[name] for name in best["point"]} == best["point"]
    grid = {name: [value] for name, value in best["point"].items()}
    alone = command("alone", {"search__optuna": None, "search__grid": grid})
    assert answered(read(alone)).items() <= answered(records).items()


def test_a_study_goes_on_and_answers_nothing_twice(command, capsys, caplog):
    folder = command(trials=3)
    before = answered(read(folder))
    study_of(folder / "optuna.db").ask()  # killed before it knew its values
    command(trials=6)
    assert states(folder / "optuna.db") == {"COMPLETE": 6, "FAIL": 1}
    assert "3 of 6 trials are finished" in caplog.text
    found = read(folder)
    assert answered(found).items() >= before.items()
    assert len(found) == COUNT * 7, "a session that goes on asked for points that were there"
    command(trials=6)
    assert "nothing was left to do" in capsys.readouterr().out
    assert len(read(folder)) == COUNT * 7


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_the_seed_fixes_the_points_of_a_session(sampler, tmp_path):
    def asked(seed: int = 0, begun: int = 0, storage: str | None = None, folder: str = "a") -> list[dict]:
        settings = OptunaSettings(SPACE, sampler=sampler, seed=seed, storage=storage)
        study = optuna.create_study(sampler=sampler_of(settings, begun, tmp_path / folder))
        points = []
        # TPE draws its first ten at random.
        for _ in range(14):
            trial = study.ask(distributions_of(SPACE))
            study.tell(trial, -((math.log(trial.params["learning_rate"]) + 3) ** 2))
            points.append(trial.params)
        return points

    one = asked()
    assert len({tuple(p.items()) for p in one}) == 14
    assert asked() == one == asked(folder="b")
    assert asked(seed=1) != one
    if sampler != "qmc":
        # It alone knows from the storage which of its points are taken.
        assert asked(begun=4) != one
        shared = [asked(storage="sqlite:///x", folder=name) for name in "ab"]
        assert shared[0] != shared[1]


def test_an_interrupt_keeps_answers_and_the_same_points_go_on(command, at_step, capsys):
    whole = command("whole", parallel=4)

    def interrupted(step):
        if step == 3:
            raise KeyboardInterrupt

    at_step(interrupted)
    folder = command(parallel=4, expect=130)
    assert "the same command goes on" in capsys.readouterr().err
    before = answered(read(folder))
    assert len(before) == 2 * 5
    # As after a kill: whoever has the folder's lock knows that nobody runs them.
    assert states(folder / "optuna.db") == {"RUNNING": 4}
    command(parallel=4)
    assert states(folder / "optuna.db") == {"FAIL": 4, "COMPLETE": 4}
    found = answered(read(folder))
    assert found.items() >= before.items()
    assert found == answered(read(whole))


class _GivesUp(optuna.pruners.BasePruner):
    """Gives one trial up at its first report."""

    def prune(self, study, trial):
        return trial.number == 1


def test_a_trial_that_is_given_up_is_evaluated_no_further(command, monkeypatch, capsys):
    monkeypatch.setattr(optuna.pruners, "MedianPruner", _GivesUp)
    folder = command(pruner="median", parallel=4)
    found = study_of(folder / "optuna.db").trials
    assert [t.state.name for t in found] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    counts = Counter(record["trial"] for record in read(folder))
    assert counts == {None: COUNT, 0: COUNT, 1: 2, 2: COUNT, 3: COUNT}
    ranking = summary_of(folder)["ranking"]
    assert [entry["n"] for entry in ranking["points"]] == [COUNT, COUNT, COUNT, 2]
    assert name_of(ranking["points"][-1]["point"]) == name_of({**found[1].params, "kl_coeff": 0.1})
    assert sum("given up" in line for line in ranking["warnings"]) == 1
    assert "same command" not in capsys.readouterr().out
    command(pruner="median", parallel=4)
    assert len(read(folder)) == counts.total()


def test_low_is_good_for_format_failure(command):
    folder = command(given={"search__objective": "format_failure"}, trials=2)
    found = study_of(folder / "optuna.db")
    assert found.direction == optuna.study.StudyDirection.MINIMIZE
    assert summary_of(folder)["ranking"]["best"]["value"] == pytest.approx(found.best_value)


def test_trials_are_judged_by_a_model_once_they_are_answered(command, tmp_path, score):
    records = [{"article": f"The tower {i} stands{'!' * i}.", "summary": "It stands."} for i in range(COUNT)]
    source = {"data__task": "summary", "data__path": write(tmp_path / "summaries.jsonl", records)}
    given = {**source, "search__objective": "factkb", "factkb_model": "none"}
    folder = command(given=given, pruner="median")
    answers = read(folder)
    for trial in study_of(folder / "optuna.db").trials:
        scores = [score(r["prediction"]) for r in answers if r["trial"] == trial.number]
        assert trial.value == pytest.approx(sum(scores) / COUNT)
        assert not trial.intermediate_values


def test_two_workers_share_a_study_and_both_rank_all(command, arguments, tmp_path, at_step, refused):
    storage, others = f"sqlite:///{tmp_path / 'shared.db'}", []

    def second_comes(step):
        if step == 1:
            others.append(command("second", trials=5, storage=storage))

    at_step(second_comes)
    first = command("first", trials=5, storage=storage)
    (second,) = others
    assert states(tmp_path / "shared.db") == {"COMPLETE": 5}
    assert [{r["trial"] for r in read(path)} for path in (first, second)] == [{None, 0, 1}, {None, 2, 3, 4}]
    points = [trial.params["learning_rate"] for trial in study_of(tmp_path / "shared.db").trials]
    assert len(set(points)) == 5, "both asked for the same points"
    assert (summary_of(first)["num_points"], summary_of(second)["num_points"]) == (5, 3)
    assert any("2 trials are still running" in line for line in summary_of(second)["ranking"]["warnings"])
    command("second", trials=5, storage=storage)
    ranked = [summary_of(path)["ranking"]["points"] for path in (first, second)]
    assert [entry["point"] for entry in ranked[0]] == [entry["point"] for entry in ranked[1]]
    # A third that comes late ranks what is there; one with other samples or another aim is refused.
    command("third", trials=5, storage=storage)
    for given, part in (
        ({"data__limit": 3}, "search.samples: there 5, here 3"),
        ({"search__objective": "f1"}, "search.objective: there 'contained', here 'f1'"),
    ):
        assert part in refused(*arguments("fourth", given, trials=5, storage=storage))


def test_trials_of_a_killed_worker_are_run_by_another(command, tmp_path, at_step, monkeypatch):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"

    def dies(step):
        if step == 1:
            raise KeyboardInterrupt

    at_step(dies)
    command("dead", trials=2, storage=storage, expect=130)
    study = study_of(tmp_path / "shared.db")
    asked = [trial.params for trial in study.trials]
    # The grace period of a worker without a heartbeat has passed.
    monkeypatch.setattr(
        optuna.storages.RDBStorage,
        "_get_stale_trial_ids",
        lambda self, study: [
            t._trial_id
            for t in self.get_all_trials(study, states=(TrialState.RUNNING,))
            if t.user_attrs["run_dir"].endswith("dead")
        ],
    )
    command("first", trials=2, storage=storage)
    assert states(tmp_path / "shared.db") == {"COMPLETE": 2, "FAIL": 2}
    assert [t.params for t in study.trials if t.state == TrialState.COMPLETE] == asked


def test_a_trial_that_went_to_another_worker_is_left_to_it(command, tmp_path, at_step, caplog):
    def taken(step):
        if step == 2:
            study_of(tmp_path / "run" / "optuna.db").tell(0, state=TrialState.FAIL)

    at_step(taken)
    command(trials=1)
    assert "trial 0 went to another worker" in caplog.text
    assert states(tmp_path / "run" / "optuna.db") == {"FAIL": 1, "COMPLETE": 1}


def test_a_folder_keeps_to_one_study_and_a_broken_one_is_one_line(command, arguments, refused, say):
    folder = command(trials=2)
    space = arguments(trials=2, space={**SPACE, "steps": [1, 5]})
    assert "search.space.steps: there [1, 4], here [1, 5]" in refused(*space)
    (folder / "optuna.db").write_bytes(b"no database at all" * 100)
    line = say(*arguments(trials=3), expect=2).err
    assert line.count("\n") == 1
    assert "search.optuna.storage: sqlite:///" in line
    assert "the same command goes on" in line


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"space": {}}, "space: empty"),
        ({"space": {"learning_rate": [1e-3, 1e-5]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [1e-3, math.inf]}}, "lowest and the highest"),
        ({"space": {"learning_rate": [0, 1e-3]}}, "above 0"),
        ({"space": {"kl_coeff": [0, 1]}}, "above 0"),
        ({"space": {"top_p": [0.5, 2]}}, "search.optuna.space.top_p"),
        ({"trials": 0}, "search.optuna.trials"),
        ({"seed": -1}, "search.optuna.seed"),
        ({"storage": "study.db"}, "sqlite:///study.db"),
        ({"storage": "postgresql://host:port/db"}, "is no URL"),
        ({"storage": "postgresql://me:secret@host:1/db"}, "search.optuna.storage: postgresql://me:***@host"),
        ({"storage": "sqlite:////nowhere/at/all/study.db"}, "unable to open"),
        ({"storage": "nodatabase://host/study"}, "search.optuna.storage"),
        ({"sampler": "tpo"}, "sampler"),
    ],
    ids=str,
)
def test_mistakes_are_refused_in_one_line_and_nothing_is_written(arguments, refused, settings, named):
    assert named in refused(*arguments(**settings))


def test_several_devices_and_a_missing_optuna_are_refused(arguments, refused, monkeypatch):
    assert "search.optuna.storage" in refused(*arguments(given={"trainer__devices": 2}))
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else usual(name, *a)
    )
    assert 'pip install "fastmem-pl[optuna]"' in refused(*arguments())
