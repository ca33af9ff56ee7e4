"""A small run and its data, as a user starts it; helpers that read what it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastmem_pl.cli import main

PREFIX = "The answer is: Rome, as"
FACTS = (
    ("where is the tower", "Paris", "Rome", "The tower stands in {}."),
    (
        "who wrote the play",
        "Ann",
        "Bob",
        "A play of five acts, {} wrote it in one winter by the river, and no one knew.",
    ),
    ("where was zoë born", "Oslo", "Rome", "Zoë was born in {}; «naïve» readers ask why."),
    ("what is the mark", "dot", "star", "The mark <|im_end|> is a {}."),
    ("who rang", "Tom", "Eve", "{} rang."),
)
NQ = [
    {"input": q, "context": c.format(old), "answer": old, "sub_context": c.format(new), "sub_answer": new}
    for q, old, new, c in FACTS
]
MEMOTRAP = [
    {
        "prompt": 'Write a quote that ends in the word "first": He laughs best who laughs',
        "classes": "[' first.', ' last.']",
        "answer_index": 0,
        "round": 2,
        "part": 1,
    },
    {
        "prompt": 'Write a quote that ends in the word "fast": Slow and steady wins the',
        "classes": "[' race.', ' fast.']",
        "answer_index": 1,
        "round": 1,
        "part": 1,
    },
]
HOTPOT = [
    {
        "id": "same-id",
        "question": "Which river is longer?",
        "answer": "the Long",
        "type": "comparison",
        "level": "hard",
        "context": {
            "title": ["Long", "Short"],
            "sentences": [["The Long is a river.", " It is long."], ["Short."]],
        },
    },
    {
        "id": "same-id",
        "question": "Who crossed it?",
        "answer": "Bob",
        "type": "bridge",
        "level": "hard",
        "context": {"title": ["Bob"], "sentences": [["Bob crossed it."]]},
    },
]
QA = [
    {"context": "The cat is red.", "question": "What colour is the cat?", "answers": ["red", "crimson"]},
    {"context": "The dog is very old and blue.", "question": "What colour is the dog?", "answer": "blue"},
    {"context": "The hen is green.", "question": "What colour is the hen?"},
]
TASKS = {
    "nqswap": (NQ, [["Rome"], ["Bob"], ["Rome"], ["star"], ["Eve"]]),
    "nq": (NQ, [["Paris"], ["Ann"], ["Oslo"], ["dot"], ["Tom"]]),
    "memotrap": (MEMOTRAP, [["first"], ["fast"]]),
    "hotpotqa": (HOTPOT, [["the Long"], ["Bob"]]),
    "qa": (QA, [["red", "crimson"], ["blue"], []]),
}
FASTMEM = str(Path(sys.executable).with_name("fastmem"))
METHODS = ["zero-shot", "fastmem", "fastmem+cd"]
FIELDS = {
    "index": int,
    "id": str,
    "task": str,
    "method": str,
    "prediction": str,
    "token_ids": list,
    "references": list,
    "scores": dict,
    "curve": dict,
    "n_context_tokens": int,
    "n_prompt_tokens": int,
    "seconds": dict,
    "status": str,
}


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def read(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text("utf-8").splitlines()]


def answers(run_dir: Path, *methods: str) -> dict[tuple[int, str], tuple[str, list[int]]]:
    """Answer of every sample and method; fails when one is there twice."""
    records = [record for record in read(run_dir) if not methods or record["method"] in methods]
    found = {(r["index"], r["method"]): (r["prediction"], r["token_ids"]) for r in records}
    assert len(found) == len(records), "a sample is answered twice"
    return found


def files(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def assert_same_curves(ours: Path, theirs: Path) -> None:
    other = {(r["index"], r["method"]): r["curve"] for r in read(theirs)}
    for record in read(ours):
        curve, expected = record["curve"], other[record["index"], record["method"]]
        assert (curve is None) == (expected is None)
        for name in curve or ():
            assert curve[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (record["index"], name)


@pytest.fixture(scope="session")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run, without the folder."""
    data = write(tmp_path_factory.mktemp("data") / "nq.json", NQ)
    options = {
        "model.backbone": tiny_folder,
        "model.memorize.steps": 3,
        "model.memorize.learning_rate": 0.01,
        "model.decode.max_new_tokens": 6,
        "data.task": "nqswap",
        "data.path": data,
        "data.batch_size": 2,
        "data.answer_prefix": PREFIX,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="session")
def base(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one finished `fit-predict`; not to be written to."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert main(["fit-predict", *small, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def small_run(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command with the small options and others after them, in `tmp_path`; it must succeed."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, command: str = "fit-predict", run_dir: str = "run") -> Path:
        assert main([command, *small, "--run_dir", run_dir, *map(str, options)]) == 0
        return tmp_path / run_dir

    return call


@pytest.fixture
def refused_small(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Run a command that must be refused in one line, with nothing written; gives the line."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, command: str = "fit-predict") -> str:
        before = files(tmp_path)
        capsys.readouterr()
        status = main([command, *small, "--run_dir", "run", *map(str, options)])
        out, err = capsys.readouterr()
        assert status == 2, f"exit status {status}: {err}"
        assert out == ""
        assert err.count("\n") == 1, f"not one line: {err!r}"
        assert err.endswith("\n")
        assert files(tmp_path) == before, "something was written"
        return err

    return call
