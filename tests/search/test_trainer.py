"""What `fastmem search` leaves, how it goes on after a stop, and what it judges by."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import make_module
from ranks import fork_ranks
from search_runs import (
    AXES,
    DATA,
    SMALL,
    SUMMARIES,
    SUMMARY,
    Grid,
    Point,
    Searches,
    assert_like,
    assert_same_answers,
    at,
    files,
    flow,
    keyed,
    name_of,
    points_of,
    read,
    refused_line,
    write,
)

from fastmem_pl import FastMemDataModule
from fastmem_pl.cli import main
from fastmem_pl.metrics import extract_answer
from fastmem_pl.search import SearchSettings, SearchTrainer
from fastmem_pl.search.job import RESULTS

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"search__every": 2, "search__objective": "contained"}


def summary_of(folder: Path) -> dict:
    text = (folder / "search.json").read_text("utf-8")
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def ranked(folder: Path) -> list[tuple]:
    return [name_of(row["point"]) for row in summary_of(folder)["ranking"]["points"]]


def best_of(folder: Path) -> Point:
    memorize = yaml.safe_load((folder / "best.yaml").read_text())["model"]["memorize"]
    return {axis: memorize[axis] for axis in AXES}


def assert_ranking_is_true(folder: Path, objective: str) -> None:
    """Means and standard errors are those of the records, best first."""
    records, rows = read(folder), summary_of(folder)["ranking"]["points"]
    for row in rows:
        scores = [r["scores"] for r in at(records, row["point"]).values()]
        values = [score[objective] for score in scores if objective in score]
        assert row["value"] == pytest.approx(statistics.mean(values))
        assert row["standard_error"] == pytest.approx(statistics.stdev(values) / len(values) ** 0.5)
    means = [row["value"] for row in rows]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) > 1, "a test that could not fail"
    assert name_of(best_of(folder)) == name_of(rows[0]["point"])


@pytest.fixture(scope="module")
def done(searches: Searches) -> Path:
    """Folder of one finished search; not to be written to."""
    return searches.search(SMALL, **COMMON)


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def test_the_folder_holds_all_results(done: Path) -> None:
    assert {*RESULTS, "config.yaml", "run.json", "predictions.jsonl"} <= {p.name for p in done.iterdir()}
    assert [path.name for path in done.rglob("*") if path.suffix in (".safetensors", ".partial")] == []
    assert sorted(ranked(done)) == sorted(map(name_of, points_of(SMALL)))
    assert ranked(done)[0] == name_of(best_of(done))
    text = (done / "search.md").read_text()
    assert all(word in text for word in ("zero-shot", "±", "contained"))
    root = ElementTree.parse(done / "heatmap.svg").getroot()
    shown = " ".join(part for element in root.iter() for part in (element.text, element.tail) if part)
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", shown)}
    assert all(set(values) <= numbers for values in SMALL.values())


def test_in_python_as_on_the_command_line(searches: Searches, done: Path, tmp_path: Path) -> None:
    module = make_module(str(searches.model("llama")), max_new_tokens=8)
    trainer = SearchTrainer(accelerator="cpu", enable_progress_bar=False, inference_mode=True)
    data = FastMemDataModule(path=str(searches.data(DATA)), task="nqswap", answer_prefix="The answer is:")
    settings = SearchSettings(grid=SMALL, every=2, objective="contained")
    result = trainer.search(module, data, settings, str(tmp_path))
    assert (result.num_samples, result.num_new) == (6, 6 * 9)
    assert_same_answers(read(tmp_path), read(done))
    again = trainer.search(module, data, settings, str(tmp_path))
    assert (again.num_new, again.ranking) == (0, result.ranking)
    assert len(data.samples) == 12, "the samples stay as they were"
    settings = SearchSettings(grid={"steps": [2], "alpha": [0.0, 0.5]}, every=6)
    best = trainer.search(module, data, settings, str(tmp_path / "alpha")).ranking.best
    assert best.point.keys() == {"learning_rate", "steps", "kl_coeff", "alpha"}


def aimed(records: list[dict], point: Point | None) -> list[dict]:
    """The data with those answers right that one point gave."""
    found = {index: extract_answer(r["prediction"]) for index, r in at(records, point).items()}
    return [record | {"sub_answer": found.get(i, "x")} for i, record in enumerate(DATA)]


INNER = {"learning_rate": [1e-2, 3e-2, 6e-3], "steps": [2, 6, 12], "kl_coeff": [1.0]}
MIDDLE = {"learning_rate": 1e-2, "steps": 6, "kl_coeff": 1.0}


@pytest.fixture
def aim(searches: Searches, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Search on data of which one point alone, or zero-shot, answers every sample as the data wants.

    Returns folder, records, and what was printed, as one line.
    """

    def search(point: Point | None, grid: Grid = INNER, **settings: object) -> tuple[Path, list[dict], str]:
        further = {"weight_decay": 0.3, "max_context_tokens": 100}
        settings = {"search__every": 2, "max_new_tokens": 16, **further, **settings}
        data = aimed(searches.records(grid, **settings), point)
        capsys.readouterr()
        folder = searches.search(grid, data=data, search__objective="exact_match", **settings)
        shutil.move(folder, tmp_path / "aimed")
        printed, records = " ".join("".join(capsys.readouterr()).split()), read(tmp_path / "aimed")
        for other in [*points_of(grid), None]:
            right = all(r["scores"]["exact_match"] for r in at(records, other).values())
            assert right == (name_of(other) == name_of(point)), "choose other data"
        return tmp_path / "aimed", records, printed

    return search


def test_a_best_point_inside_and_clearly_better_runs_as_it_is(aim, tmp_path, monkeypatch) -> None:
    folder, records, printed = aim(MIDDLE)
    assert best_of(folder) == MIDDLE
    assert ranked(folder)[0] == name_of(MIDDLE)
    for text in (printed, (folder / "search.md").read_text()):
        assert "zero-shot" in text
        assert not re.search("beyond|standard error:", text)
    monkeypatch.chdir(tmp_path)
    before = files(folder)
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert "search" not in config
    assert config["data"]["limit"] is None
    assert main(["fit-predict", "--config", str(folder / "best.yaml"), "--run_dir", "again"]) == 0
    assert before == files(folder), "the search's own files were written to"
    found = {r["index"]: r for r in read(Path("again")) if r["method"] == "fastmem"}
    assert_like(at(records, MIDDLE), found)


def test_a_warning_where_the_best_is_on_the_edge(aim) -> None:
    folder, _, printed = aim({**MIDDLE, "steps": 12})
    assert best_of(folder) == {**MIDDLE, "steps": 12}
    for text in (printed, (folder / "search.md").read_text()):
        assert re.findall(r"best (\w+), [^;]* end; the optimum may lie beyond", text) == ["steps"]


def test_best_yaml_has_the_settings_of_the_decoder(aim, tmp_path, monkeypatch) -> None:
    grid = {**{axis: [value] for axis, value in MIDDLE.items()}, "alpha": [0.1, 2.0, 1.0]}
    folder, records, printed = aim(MIDDLE | {"alpha": 2.0}, grid, kl_target=0.2)
    monkeypatch.chdir(tmp_path)
    assert main(["fit-predict", "--config", str(folder / "best.yaml"), "--run_dir", "again"]) == 0
    found = {r["index"]: r for r in read(tmp_path / "again") if r["method"] == "fastmem+cd"}
    assert_like(at(records, MIDDLE | {"alpha": 2.0}), found)
    assert "best alpha, 2, is at the upper end" in printed


def half_a_last_line(lines: list[bytes]) -> bytes:
    return b"".join(lines[:29]) + lines[29][: len(lines[29]) // 2]


def lines_missing_in_the_middle(lines: list[bytes]) -> bytes:
    return b"".join(line for i, line in enumerate(lines) if i % 3)


def one_point_missing(lines: list[bytes]) -> bytes:
    return b"".join(line for line in lines if json.loads(line)["point"] != points_of(SMALL)[3])


@pytest.mark.parametrize(
    "cut",
    [
        half_a_last_line,
        lines_missing_in_the_middle,
        one_point_missing,
    ],
)
def test_a_search_goes_on(searches: Searches, done, copied, cut: Callable[[list[bytes]], bytes]) -> None:
    predictions = copied / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    content = cut(lines)
    predictions.write_bytes(content)
    if cut is not one_point_missing:
        for name in RESULTS:
            (copied / name).unlink()
    searches.search(SMALL, run_dir=copied, **COMMON)
    kept = {line for line in content.splitlines(keepends=True) if line in lines}
    assert kept <= set(predictions.read_bytes().splitlines(keepends=True)), "a record was made again"
    assert_same_answers(read(copied), read(done))
    assert ranked(copied) == ranked(done)
    assert (copied / "heatmap.svg").read_bytes() == (done / "heatmap.svg").read_bytes()


def test_a_finished_search_is_not_made_again(searches: Searches, done, copied, capsys) -> None:
    assert main(["search", "--config", str(done / "config.yaml"), "--run_dir", str(copied)]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert (copied / "predictions.jsonl").read_bytes() == (done / "predictions.jsonl").read_bytes()
    assert summary_of(copied) == summary_of(done)


def test_a_grown_grid_keeps_what_is_done(searches: Searches, done: Path) -> None:
    small = {"learning_rate": [1e-2], "steps": [4, 2], "kl_coeff": [1.0]}
    folder = searches.search(small, **COMMON)
    before = keyed(read(folder))
    assert len(before) == 6 * (len(points_of(small)) + 1)
    searches.search(SMALL, run_dir=folder, **COMMON)
    assert before.items() <= keyed(read(folder)).items()
    assert_same_answers(read(folder), read(done))
    assert ranked(folder) == ranked(done)


def test_a_killed_search_goes_on(searches: Searches, tmp_path: Path) -> None:
    """Records are there before the search ends."""
    settings = {"search__every": 1, "max_new_tokens": 12}
    folder = tmp_path / "run"
    given = searches.arguments(search__grid=flow(SMALL), **settings)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmem_pl", "search", *given, "--run_dir", str(folder)], env=environment
    )
    predictions = folder / "predictions.jsonl"
    while not predictions.exists() or predictions.read_bytes().count(b"\n") < 9:
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = [line for line in predictions.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(written) < 12 * 9, "killed too late"
    assert not (folder / "best.yaml").exists()
    searches.search(SMALL, run_dir=folder, **settings)
    assert set(written) <= set(predictions.read_bytes().splitlines(keepends=True))
    expected = {(i, name) for i in range(12) for name in (None, *map(name_of, points_of(SMALL)))}
    assert set(keyed(read(folder))) == expected


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"search__method": "fastmem+cd"}, "fastmem+cd"),
        ({"data": DATA[:11]}, "data"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_folder_of_other_settings_is_refused(searches, copied, capsys, settings: dict, part: str) -> None:
    before = files(copied)
    arguments = searches.arguments(**{"search__grid": flow(SMALL), **COMMON, **settings})
    line = refused_line(capsys, ["search", *arguments, "--run_dir", str(copied)])
    assert "run_dir" in line
    assert part in line
    assert files(copied) == before


def test_searches_and_runs_do_not_share_a_folder(searches: Searches, copied, tmp_path, capsys) -> None:
    run = tmp_path / "other"
    assert main(["fit-predict", *searches.arguments(steps=1), "--run_dir", str(run)]) == 0
    given = searches.arguments(search__grid=flow(SMALL), steps=1)
    for folder, arguments in (
        (copied, ["fit-predict", *searches.arguments()]),
        (run, ["search", *given]),
    ):
        before = files(folder)
        assert "run_dir" in refused_line(capsys, [*arguments, "--run_dir", str(folder)])
        assert files(folder) == before


def test_rouge_is_an_objective(searches: Searches) -> None:
    data = [*SUMMARIES, {"article": "No summary is known of this."}]
    folder = searches.search(SMALL, data=data, search__objective="rougeL", **SUMMARY)
    records = read(folder)
    assert {r["index"] for r in records if not r["scores"]} == {3}
    assert_ranking_is_true(folder, "rougeL")
    settings = {name: value for name, value in SUMMARY.items() if name != "search__every"}
    point = points_of(SMALL)[0]
    assert_like(at(records, point), searches.fit_predict(point, "fastmem", data=data, **settings)["fastmem"])


def test_scores_with_a_model_of_their_own_are_objectives_and_added_after_a_kill(
    searches: Searches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastmem_pl.run.scoring.load_metric_model",
        lambda *args: lambda answers, contexts: [len(set(answer)) / 100 for answer in answers],
    )
    given = {**SUMMARY, "factkb_model": "some/model", "search__objective": "factkb"}
    folder = searches.search(SMALL, data=SUMMARIES, **given)
    expected, order = keyed(read(folder)), ranked(folder)
    for record in expected.values():
        assert record["scores"]["factkb"] == pytest.approx(len(set(record["prediction"])) / 100)
    assert_ranking_is_true(folder, "factkb")
    # As it is when the last answer has come, but no such score.
    bare = [dict(record, scores=dict(record["scores"])) for record in expected.values()]
    for record in bare:
        del record["scores"]["factkb"], record["score_models"]
    write(folder / "predictions.jsonl", bare[:-2])
    searches.search(SMALL, data=SUMMARIES, run_dir=folder, **given)
    assert_same_answers(read(folder), [*expected.values()])
    assert ranked(folder) == order


def test_print_config_shows_what_was_given_and_reads_again(searches, capsys, tmp_path, monkeypatch) -> None:
    def printed(*arguments: str) -> dict:
        assert main(["search", *arguments, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    monkeypatch.chdir(tmp_path)
    paper = SearchSettings()
    assert printed("--config", "search")["search"]["grid"] == paper.grid
    assert [len(values) for values in paper.grid.values()] == [4, 3, 5]
    given = searches.arguments(search__grid=flow(SMALL), search__objective="f1", search__every=7)
    config = printed(*given, "--run_dir", "run")
    assert config["search"]["grid"] == SMALL
    assert (config["search"]["objective"], config["search"]["every"]) == ("f1", 7)
    Path("saved.yaml").write_text(yaml.safe_dump(config))
    assert printed("--config", "saved.yaml") == config
    assert not Path("run").exists()


def test_a_grid_is_shared_out_among_processes(searches: Searches, tmp_path: Path) -> None:
    source, path = str(searches.model("llama")), str(searches.data(DATA))

    def search(name: str, devices: int) -> list[tuple]:
        trainer = SearchTrainer(accelerator="cpu", devices=devices, enable_progress_bar=False)
        data = FastMemDataModule(path=path, task="nqswap", answer_prefix="The answer is:")
        module, settings = make_module(source, max_new_tokens=4), SearchSettings(grid=SMALL, every=4)
        result = trainer.search(module, data, settings, str(tmp_path / name))
        return [(name_of(row.point), row.value) for row in result.ranking.points]

    expected = search("one", 1)
    assert fork_ranks(2, lambda rank: search("several", 2), tmp_path) == [expected] * 2
    assert_same_answers(read(tmp_path / "several"), read(tmp_path / "one"))
    assert not (tmp_path / "several" / "parts").exists()
