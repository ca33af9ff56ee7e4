"""Runs of `fastmem search` on tiny models, and ways to look at what they leave."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_module, make_tokenizer

from fastmem_pl import DecodingSettings, FastMemDataModule, FastMemTrainer, MemorizationSettings
from fastmem_pl.cli import main

Grid = Mapping[str, list[Any]]
Point = dict[str, float]

AXES = ("learning_rate", "steps", "kl_coeff")
SMALL = {"learning_rate": [3e-3, 1e-2], "steps": [2, 4], "kl_coeff": [0.1, 1.0]}
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
SUMMARIES = [
    {"article": "The cats sat on a red mat.\nA dog barked.", "summary": "The cat slept.\nA dog barked."},
    {"article": "Zoë's river rose by the mill.", "summary": "the cats slept soundly, as a river rose"},
    {"article": "Rain fell; nothing else happened that day in the long valley.", "summary": "Rain."},
]
SUMMARY = {
    "data__task": "summary",
    "data__answer_prefix": "A dog barked.\nThe cat slept, as rain fell",
    "search__every": 1,
    "max_new_tokens": 40,
}
_GROUPS = {
    **{field.name: "memorize" for field in fields(MemorizationSettings)},
    **{field.name: "decode" for field in fields(DecodingSettings)},
}


def flow(grid: Grid) -> str:
    """A grid as one writes it on the command line."""
    return "{" + ", ".join(f"{axis}: [{', '.join(map(str, values))}]" for axis, values in grid.items()) + "}"


def option(name: str) -> str:
    """``--data.path`` for ``data__path``; settings of the model by their short names."""
    path = name.replace("__", ".") if "__" in name else f"model.{_GROUPS.get(name, '')}.{name}"
    return f"--{path.replace('..', '.')}"


def options(**settings: object) -> list[str]:
    """Options of the command line."""
    parts = []
    for name, value in settings.items():
        parts += [option(name), str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return parts


def points_of(grid: Grid) -> list[Point]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(point: Point | None) -> tuple[tuple[str, float], ...] | None:
    return None if point is None else tuple(sorted(point.items()))


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(folder: Path) -> list[dict]:
    """Records of a run, whose last line is whole and whose numbers are JSON."""
    text = (folder / "predictions.jsonl").read_text("utf-8")
    assert text.endswith("\n")
    return [
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        for line in text.split("\n")[:-1]
    ]


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


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


def assert_same_answers(found: list[dict], expected: list[dict]) -> None:
    """The same records but for their times and the rounding of their curves."""
    ours, others = keyed(found), keyed(expected)
    assert ours.keys() == others.keys()
    for key, record in ours.items():
        assert record["token_ids"] == others[key]["token_ids"]
        assert record["scores"] == pytest.approx(others[key]["scores"], abs=1e-5)
        assert_same_curve(record["curve"], others[key]["curve"])


def refused_line(capsys: pytest.CaptureFixture, arguments: list[str], alone: bool = True) -> str:
    """What a command that is refused says; nothing but this line, if ``alone``."""
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), f"exit status {status}: {err}"
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if alone or "error" in line]
    assert len(lines) == 1, f"not one line: {err!r}"
    assert re.fullmatch(r"fastmem: error: .*", lines[0])
    return lines[0]


class Searches:
    """Runs commands on tiny models in folders of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._references: dict[str, dict[str, dict[int, dict]]] = {}
        self._searches: dict[str, list[dict]] = {}
        self._count = itertools.count()

    def model(self, family: str) -> Path:
        folder = self.root / "models" / family
        if not folder.is_dir():
            make_model(family).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        return folder

    def data(self, records: list[dict]) -> Path:
        path = self.root / f"data{abs(hash(json.dumps(records)))}.jsonl"
        return path if path.exists() else write(path, records)

    def arguments(self, family: str = "llama", data: list[dict] = DATA, **settings: object) -> list[str]:
        backbone = ["--model.backbone.source", str(self.model(family))]
        return [*backbone, *options(data__path=self.data(data), **{**DEFAULTS, **settings})]

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
        assert main(["search", *arguments, "--run_dir", str(folder)]) == 0
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
        given = {**DEFAULTS, **settings, **point, "methods": methods}
        key = json.dumps([family, data, given], sort_keys=True, default=str)
        if key not in self._references:
            folder = self.fresh()
            model = {name: value for name, value in given.items() if "__" not in name}
            source = {name[6:]: value for name, value in given.items() if name.startswith("data__")}
            # Without the command line, which takes half of the time.
            trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
            module = make_module(str(self.model(family)), **model)
            datamodule = FastMemDataModule(path=str(self.data(data)), **source)
            trainer.fit_predict(module, datamodule, run_dir=str(folder))
            found: dict[str, dict[int, dict]] = {}
            for line in (folder / "predictions.jsonl").read_text("utf-8").split("\n")[:-1]:
                record = json.loads(line)
                found.setdefault(record["method"], {})[record["index"]] = record
            self._references[key] = found
        return self._references[key]


@pytest.fixture(scope="session")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Searches:
    return Searches(tmp_path_factory.mktemp("searches"))
