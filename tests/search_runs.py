"""Runs of `fastmem search` on tiny models, and ways to look at what they leave."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import make_module, save_model
from runs import QUIET, options, read, write

from fastmem_pl import FastMemDataModule, FastMemTrainer
from fastmem_pl.cli import main

Grid = Mapping[str, list[Any]]
Point = dict[str, float]

AXES = ("learning_rate", "steps", "kl_coeff")
SMALL = {"learning_rate": [3e-3, 1e-2], "steps": [2, 4], "kl_coeff": [0.1, 1.0]}
SOURCE = {"task": "nqswap", "answer_prefix": "The answer is:"}


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
SUMMARY = {
    "data__task": "summary",
    "data__answer_prefix": "A dog barked.\nThe cat slept, as rain fell",
    "max_new_tokens": 40,
}


def points_of(grid: Grid) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(point: Point | None) -> tuple[tuple[str, float], ...] | None:
    return None if point is None else tuple(sorted(point.items()))


def keyed(records: list[dict]) -> dict[Any, dict]:
    """Records by sample and point; fails when one is there twice."""
    found = {(r["index"], name_of(r["point"])): r for r in records}
    assert len(found) == len(records), "a point of a sample is there twice"
    return found


def at(records: list[dict], point: Point | None) -> dict[int, dict]:
    """Records of one point by sample; ``None`` for zero-shot."""
    found = {r["index"]: r for r in records if name_of(r["point"]) == name_of(point)}
    assert found, f"no records of {point}"
    return found


def assert_same_curve(ours: dict | None, other: dict | None) -> None:
    assert (ours is None) == (other is None)
    if ours is None:
        return
    assert ours.keys() == other.keys()
    for name, values in other.items():
        assert [v is None for v in ours[name]] == [v is None for v in values], name
        finite = [[v for v in found if v is not None] for found in (ours[name], values)]
        assert finite[0] == pytest.approx(finite[1], rel=1e-4, abs=1e-6), name


def assert_like(found: dict[int, dict], expected: dict[int, dict]) -> None:
    """Records of one point are those of a `fit-predict` run: fields, answers, curves to 1e-4, strengths to 1e-3."""
    for index, ours in found.items():
        other = expected[index]
        assert other.keys() <= ours.keys() - {"point"}
        assert_same_curve(ours["curve"], other["curve"])
        assert ours.get("strengths", []) == pytest.approx(other.get("strengths", []), rel=1e-3, abs=1e-6)
        for field in other.keys() - {"curve", "seconds", "strengths"}:
            assert ours[field] == other[field], (field, index, ours["point"])


def assert_same_answers(found: list[dict], expected: list[dict]) -> None:
    """The same records but for their times and the rounding of their curves."""
    ours, others = keyed(found), keyed(expected)
    assert ours.keys() == others.keys()
    for key, record in ours.items():
        assert record["token_ids"] == others[key]["token_ids"]
        assert record["scores"] == pytest.approx(others[key]["scores"], abs=1e-5)
        assert_same_curve(record["curve"], others[key]["curve"])


class Searches:
    """Runs commands on tiny models in folders of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._references: dict[str, dict[str, dict[int, dict]]] = {}
        self._searches: dict[str, list[dict]] = {}
        self._count = itertools.count()

    def model(self, family: str = "llama") -> Path:
        folder = self.root / "models" / family
        return folder if folder.is_dir() else save_model(folder, family=family)

    def data(self, records: list[dict] = DATA) -> Path:
        path = self.root / f"data{abs(hash(json.dumps(records)))}.jsonl"
        return path if path.exists() else write(path, records)

    def arguments(self, family: str = "llama", data: list[dict] = DATA, **settings: object) -> list[str]:
        source = {f"data__{name}": value for name, value in SOURCE.items()} | {"data__path": self.data(data)}
        given = {"backbone": self.model(family), "max_new_tokens": 8, **QUIET, **source, **settings}
        return options(**given)

    def fresh(self) -> Path:
        return self.root / f"run{next(self._count)}"

    def search(
        self, grid: Grid = SMALL, family: str = "llama", run_dir: Path | None = None, **settings
    ) -> Path:
        """Run `fastmem search`; gives its folder."""
        folder = run_dir or self.fresh()
        arguments = self.arguments(family, search__grid=grid, **settings)
        assert main(["search", *arguments, "--run_dir", str(folder)]) == 0
        return folder

    def records(self, grid: Grid = SMALL, family: str = "llama", **settings: object) -> list[dict]:
        """Records of a search; made once."""
        key = json.dumps([grid, family, settings], sort_keys=True, default=str)
        if key not in self._searches:
            self._searches[key] = read(self.search(grid, family, **settings))
        return self._searches[key]

    def fit_predict(
        self, point: Point, method: str, family: str = "llama", data: list[dict] = DATA, **settings: object
    ) -> dict[str, dict[int, dict]]:
        """Records of a separate `fit-predict` run, by method and index; made once."""
        both = ["fastmem", "fastmem+cd"]
        # Where several tests compare with a point, its methods share the run.
        methods = ["zero-shot", *(both if method in both and not settings else [method])]
        given = {"max_new_tokens": 8, **settings, **point, "methods": methods}
        key = json.dumps([family, data, given], sort_keys=True, default=str)
        if key not in self._references:
            model = {name: value for name, value in given.items() if "__" not in name}
            source = {name[6:]: value for name, value in given.items() if name.startswith("data__")}
            # Without the command line, which takes half of the time.
            trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
            module = make_module(str(self.model(family)), **model)
            datamodule = FastMemDataModule(path=str(self.data(data)), **{**SOURCE, **source})
            found = read(trainer.fit_predict(module, datamodule, run_dir=str(self.fresh())).path)
            self._references[key] = {
                name: {r["index"]: r for r in found if r["method"] == name} for name in methods
            }
        return self._references[key]


@pytest.fixture(scope="session")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Searches:
    return Searches(tmp_path_factory.mktemp("searches"))
