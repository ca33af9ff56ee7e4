"""What `fastmem search` leaves, how it goes on after a stop, and what it judges by."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from conftest import make_module
from ranks import fork_ranks
from runs import SUMMARIES, files, options, read, refuse_constant, run_until_killed, write
from search_runs import (
    AXES,
    DATA,
    SMALL,
    SOURCE,
    SUMMARY,
    Grid,
    Point,
    Searches,
    assert_like,
    assert_same_answers,
    at,
    keyed,
    name_of,
    points_of,
)

from fastmem_pl import FastMemDataModule
from fastmem_pl.cli import main
from fastmem_pl.metrics import extract_answer
from fastmem_pl.search import SearchSettings, SearchTrainer
from fastmem_pl.search.job import RESULTS

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"search__every": 2, "search__objective": "contained"}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text("utf-8"), parse_constant=refuse_constant)


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


def searcher(searches: Searches, devices: int = 1, max_new_tokens: int = 8):
    """Searches in Python, with one trainer, module and data."""
    usual = {"accelerator": "cpu", "enable_progress_bar": False, "inference_mode": True}
    trainer = SearchTrainer(devices=devices, **usual)
    data = FastMemDataModule(path=str(searches.data()), **SOURCE)
    module = make_module(str(searches.model()), max_new_tokens=max_new_tokens)

    def search(folder: Path, **settings):
        result = trainer.search(module, data, SearchSettings(grid=SMALL, **settings), str(folder))
        assert len(data.samples) == 12, "the samples stay as they were"
        return result

    return search


def test_in_python_as_on_the_command_line(searches: Searches, done: Path, tmp_path: Path) -> None:
    search, settings = searcher(searches), {"every": 2, "objective": "contained"}
    result = search(tmp_path, **settings)
    assert (result.num_samples, result.num_new) == (6, 6 * 9)
    assert_same_answers(read(tmp_path), read(done))
    again = search(tmp_path, **settings)
    assert (again.num_new, again.ranking) == (0, result.ranking)


def test_a_grid_is_shared_out_among_processes(searches: Searches, tmp_path: Path) -> None:
    def ranks(name: str, devices: int) -> list[tuple]:
        found = searcher(searches, devices, max_new_tokens=4)(tmp_path / name, every=4).ranking.points
        return [(name_of(row.point), row.value) for row in found]

    expected = ranks("one", 1)
    assert fork_ranks(2, lambda rank: ranks("several", 2), tmp_path) == [expected] * 2
    assert_same_answers(read(tmp_path / "several"), read(tmp_path / "one"))
    assert not (tmp_path / "several" / "parts").exists()


def aimed(records: list[dict], point: Point | None) -> list[dict]:
    """The data with those answers right that one point gave."""
    found = {index: extract_answer(r["prediction"]) for index, r in at(records, point).items()}
    return [record | {"sub_answer": found.get(i, "x")} for i, record in enumerate(DATA)]


INNER = {"learning_rate": [1e-2, 3e-2, 6e-3], "steps": [2, 6, 12], "kl_coeff": [1.0]}
MIDDLE = {"learning_rate": 1e-2, "steps": 6, "kl_coeff": 1.0}


@pytest.fixture
def aim(searches: Searches, tmp_path: Path, capsys, monkeypatch):
    """Search on data of which one point alone, or zero-shot, answers every sample as the data wants.

    Returns folder, records, and what was printed, as one line.
    """
    monkeypatch.chdir(tmp_path)

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


def run_best(folder: Path, method: str) -> dict[int, dict]:
    """Records that ``best.yaml`` gives, run in the working folder."""
    before = files(folder)
    assert main(["fit-predict", "--config", str(folder / "best.yaml"), "--run_dir", "again"]) == 0
    assert before == files(folder), "the search's own files were written to"
    return {r["index"]: r for r in read(Path("again")) if r["method"] == method}


def test_a_best_point_inside_and_clearly_better_runs_as_it_is(aim) -> None:
    folder, records, printed = aim(MIDDLE)
    assert best_of(folder) == MIDDLE
    assert ranked(folder)[0] == name_of(MIDDLE)
    for text in (printed, (folder / "search.md").read_text()):
        assert "zero-shot" in text
        assert not re.search("beyond|standard error:", text)
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert "search" not in config
    assert config["data"]["limit"] is None
    assert_like(at(records, MIDDLE), run_best(folder, "fastmem"))


def test_best_yaml_has_the_settings_of_the_decoder_and_an_edge_is_warned_of(aim) -> None:
    grid = {**{axis: [value] for axis, value in MIDDLE.items()}, "alpha": [0.1, 2.0, 1.0]}
    folder, records, printed = aim(MIDDLE | {"alpha": 2.0}, grid, kl_target=0.2)
    assert_like(at(records, MIDDLE | {"alpha": 2.0}), run_best(folder, "fastmem+cd"))
    for text in (printed, (folder / "search.md").read_text()):
        edges = re.findall(r"best (\w+), [^;]* is at the (\w+) end; the optimum may lie beyond", text)
        assert edges == [("alpha", "upper")]


CUTS = {
    "half a last line": lambda lines: b"".join(lines[:29]) + lines[29][: len(lines[29]) // 2],
    "lines missing in the middle": lambda lines: b"".join(line for i, line in enumerate(lines) if i % 3),
    "one point missing": lambda lines: b"".join(
        line for line in lines if json.loads(line)["point"] != points_of(SMALL)[3]
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_search_goes_on(searches: Searches, done, copied, cut: str) -> None:
    predictions = copied / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    content = CUTS[cut](lines)
    predictions.write_bytes(content)
    if cut != "one point missing":
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
    given = ["search", *searches.arguments(search__grid=SMALL, **settings), "--run_dir", str(folder)]
    run_until_killed(1, given)
    predictions = folder / "predictions.jsonl"
    written = predictions.read_bytes().splitlines(keepends=True)
    assert 0 < len(written) < 12 * 9
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
def test_a_folder_of_other_settings_is_refused(searches, copied, refused, settings, part) -> None:
    arguments = searches.arguments(**{"search__grid": SMALL, **COMMON, **settings})
    line = refused("search", *arguments, "--run_dir", copied)
    assert "run_dir" in line
    assert part in line


def test_searches_and_runs_do_not_share_a_folder(searches: Searches, copied, tmp_path, refused) -> None:
    run, given = tmp_path / "other", searches.arguments(steps=1)
    assert main(["fit-predict", *given, "--run_dir", str(run)]) == 0
    assert "run_dir" in refused("fit-predict", *given, "--run_dir", copied)
    assert "run_dir" in refused("search", *given, *options(search__grid=SMALL), "--run_dir", run)


def test_scores_with_a_model_of_their_own_are_objectives_and_added_after_a_kill(searches, score) -> None:
    data = [*SUMMARIES, {"article": "No summary is known of this."}]
    settings = {**SUMMARY, "factkb_model": "some/model"}
    given = {"data": data, "search__every": 1, "search__objective": "factkb", **settings}
    folder = searches.search(SMALL, **given)
    expected, order = keyed(read(folder)), ranked(folder)
    for record in expected.values():
        assert record["scores"]["factkb"] == pytest.approx(score(record["prediction"]))
        assert ("rougeL" in record["scores"]) == (record["index"] < 3)
    point = points_of(SMALL)[0]
    separate = searches.fit_predict(point, "fastmem", data=data, **settings)["fastmem"]
    assert_like(at([*expected.values()], point), separate)
    assert_ranking_is_true(folder, "factkb")
    # As it is when the last answer has come, but no such score.
    bare = [dict(record, scores=dict(record["scores"])) for record in expected.values()]
    for record in bare:
        del record["scores"]["factkb"], record["score_models"]
    write(folder / "predictions.jsonl", bare[:-2])
    searches.search(SMALL, run_dir=folder, **given)
    assert_same_answers(read(folder), [*expected.values()])
    assert ranked(folder) == order


def test_print_config_shows_what_was_given_and_reads_again(searches, say, tmp_path, monkeypatch) -> None:
    def printed(*arguments: str) -> dict:
        return yaml.safe_load(say("search", *arguments, "--print_config").out)

    monkeypatch.chdir(tmp_path)
    paper = SearchSettings()
    assert printed("--config", "search")["search"]["grid"] == paper.grid
    assert [len(values) for values in paper.grid.values()] == [4, 3, 5]
    given = searches.arguments(search__grid=SMALL, search__objective="f1", search__every=7)
    config = printed(*given, "--run_dir", "run")
    assert config["search"]["grid"] == SMALL
    assert (config["search"]["objective"], config["search"]["every"]) == ("f1", 7)
    Path("saved.yaml").write_text(yaml.safe_dump(config))
    assert printed("--config", "saved.yaml") == config
    assert not Path("run").exists()
