"""A small real run of the tiny model, and commands as a user gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from report_runs import Document

from fastmem_pl.cli import main

_FACTS = (
    ("where is the tower", "Paris", "Rome", "The tower stands in {}."),
    ("who wrote the play", "Ann", "Bob", "A play of five acts, {} wrote it in one winter by the river."),
    ("where was zoë born", "Oslo", "Rome", "Zoë was born in {}; «naïve» readers ask why."),
    ("what is the mark", "dot", "star", "The mark <|im_end|> is a {}."),
    ("who rang", "Tom", "Eve", "{} rang."),
)
NQ = [
    {"input": q, "context": c.format(old), "answer": old, "sub_context": c.format(new), "sub_answer": new}
    for q, old, new, c in _FACTS
]


class Said(NamedTuple):
    status: int
    out: str
    err: str


def files(folder: Path) -> dict[str, bytes | None]:
    """Content of everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def read(run_dir: Path) -> list[dict]:
    lines = (run_dir / "predictions.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def answers(run_dir: Path) -> dict[tuple[int, str], tuple[str, list[int]]]:
    return {(r["index"], r["method"]): (r["prediction"], r["token_ids"]) for r in read(run_dir)}


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small real run, without the folder."""
    data = tmp_path_factory.mktemp("data") / "nq.json"
    data.write_text(json.dumps(NQ))
    given = {
        "model.backbone": tiny_folder,
        "model.methods": "[zero-shot, fastmem, dola]",
        "model.memorize.steps": 3,
        "model.memorize.learning_rate": 0.01,
        "model.decode.max_new_tokens": 6,
        "data.task": "nqswap",
        "data.path": data,
        "data.batch_size": 2,
        "data.answer_prefix": "The answer is: Rome, as",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def real(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model; not to be written to."""
    folder = tmp_path_factory.mktemp("real") / "run"
    assert main(["fit-predict", *options, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture) -> Callable[..., Said]:
    """Runs a command."""

    def call(*arguments: object, expect: int | None = 0) -> Said:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code or 0
        said = Said(status, *capsys.readouterr())
        assert expect is None or status == expect, said
        assert not re.search("Traceback|Warning:", said.err), said.err
        return said

    return call


@pytest.fixture
def refused(say, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused in one line, with nothing written; gives the line."""

    def call(*arguments: object) -> str:
        before = files(tmp_path)
        said = say(*arguments, expect=2)
        assert said.out == ""
        assert said.err.count("\n") == 1, f"not one line: {said.err!r}"
        assert files(tmp_path) == before, "something was written"
        return said.err

    return call


@pytest.fixture
def pages(say) -> Callable[..., tuple[Document, str]]:
    """Reports into `page.html` of the working folder; gives the page and the Markdown."""

    def call(*arguments: object) -> tuple[Document, str]:
        say("report", *arguments, "--out", "page.html")
        return Document(Path("page.html").read_text("utf-8")), Path("page.md").read_text("utf-8")

    return call


@pytest.fixture
def run(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say) -> Callable[..., Said]:
    """Runs `fit-predict` with the small options and others, into `run` of the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *more, expect=0: say("fit-predict", *options, "--run_dir", "run", *more, expect=expect)


@pytest.fixture
def refused_run(options: list[str], refused, tmp_path: Path, monkeypatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    return lambda *more: refused("fit-predict", *options, "--run_dir", "run", *more)
