"""Data of every task, small runs as a user starts them, and helpers that read what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from report_runs import Document

from fastmem_pl import BackboneSettings, ChatSettings, DecodingSettings, MemorizationSettings
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
QUIET = {"trainer__accelerator": "cpu", "trainer__enable_progress_bar": False}
FASTMEM = str(Path(sys.executable).with_name("fastmem"))
METHODS = ["zero-shot", "fastmem", "fastmem+cd"]
ALL_METHODS = ["zero-shot", "one-shot", "cad", "adacad", "coiecd", "cocoa", "ck-plug", "dola"]
ALL_METHODS += ["fastmem"] + [
    f"fastmem+{decoder}" for decoder in ("cd", "adacd", "cad", "adacad", "coiecd", "dola")
]
SUMMARIES = [
    {"article": "The cats sat on a red mat.\nA dog barked.", "summary": "The cat slept.\nA dog barked."},
    {"article": "Zoë's river rose by the mill.", "summary": "the cats slept soundly, as a river rose"},
    {"article": "Rain fell; nothing else happened that day in the long valley.", "summary": "Rain."},
]
ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
SUMMARY_TASKS = ("xsum", "cnndm", "wikihow", "summary")
RECORDS = dict.fromkeys(("nqswap", "nq", "nqswap_icl", "nq_icl"), NQ[:4])
RECORDS |= {"memotrap": MEMOTRAP[:1], "hotpotqa": HOTPOT[:1], "qa": QA[:2]} | dict.fromkeys(
    SUMMARY_TASKS, SUMMARIES
)
GROUPS = {
    "backbone": BackboneSettings,
    "memorize": MemorizationSettings,
    "decode": DecodingSettings,
    "chat": ChatSettings,
}


# The installed command, but that it kills itself once a number of batches are on disk.
_KILLED = """
import os, signal, sys
from fastmem_pl.cli import main
from fastmem_pl.run.folder import RunFolder

append, left = RunFolder.append, int(sys.argv[1])
def killed(self, records):
    global left
    append(self, records)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.append = killed
sys.exit(main(sys.argv[2:]))
"""


def run_until_killed(batches: int, arguments: list[str]) -> None:
    """Run a command in a process of its own, killed right after some batches are on disk."""
    command = [sys.executable, "-c", _KILLED, str(batches), *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


class Said(NamedTuple):
    status: int
    out: str
    err: str


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def read(run_dir: Path) -> list[dict]:
    """Records of a run, whose last line is whole and whose numbers are JSON."""
    *lines, rest = (run_dir / "predictions.jsonl").read_text("utf-8").split("\n")
    assert rest == ""
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def refuse_constant(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def options(**settings: object) -> list[str]:
    """Options of a command: settings of the model by their own names, ``data__path`` for ``--data.path``."""
    parts = []
    for name, value in settings.items():
        parts += [_option(name), str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return parts


def _option(name: str) -> str:
    if "__" in name or name == "run_dir":
        return f"--{name.replace('__', '.')}"
    groups = (group for group, kind in GROUPS.items() if name in {field.name for field in fields(kind)})
    return "--" + ".".join(["model", *groups, name])


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


def ids_of(records: list[dict]) -> dict[tuple[int, str], list[int]]:
    return {(r["index"], r["method"]): r["token_ids"] for r in records}


def metrics_of(folder: Path, method: str) -> dict:
    return json.loads((folder / "metrics.json").read_text())["groups"]["all"][method]["metrics"]


@cache
def shown(task: str) -> dict[str, str]:
    """What `fastmem tasks TASK` prints under each of its headings, and its list of scores."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["tasks", task]) == 0
    _, *parts = re.split(r"^  (\w[^\n]*):$\n", out.getvalue(), flags=re.MULTILINE)
    bodies = [re.sub(r"^    ", "", body, flags=re.MULTILINE).rstrip("\n") for body in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True)) | {
        "scores": re.search("scores: (.*)", out.getvalue())[1]
    }


@pytest.fixture(scope="session")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run, without the folder."""
    data = write(tmp_path_factory.mktemp("data") / "nq.json", NQ)
    model = {"backbone": tiny_folder, "steps": 3, "learning_rate": 0.01, "max_new_tokens": 6}
    source = {
        "data__task": "nqswap",
        "data__path": data,
        "data__batch_size": 2,
        "data__answer_prefix": PREFIX,
    }
    return options(**model, **source, **QUIET)


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
def refused_small(small: list[str], refused, tmp_path: Path, monkeypatch) -> Callable[..., str]:
    """The same for a command with the small options and others after them, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, command: str = "fit-predict") -> str:
        return refused(command, *small, "--run_dir", "run", *options)

    return call


@pytest.fixture
def run_methods(tiny_folder: Path, tmp_path: Path, monkeypatch) -> Callable[..., list[dict]]:
    """Answer a task's records in `tmp_path`, with settings of the model by their own names and of the data as
    `data__NAME`; gives the records.
    """
    monkeypatch.chdir(tmp_path)

    def call(task: str, methods=ALL_METHODS, data=None, run_dir="run", **settings) -> list[dict]:
        given = {"backbone": tiny_folder, "methods": [*methods], "steps": 2, "learning_rate": 0.01}
        given |= {"max_new_tokens": 3, "data__task": task, "run_dir": run_dir}
        given |= {"data__path": write(tmp_path / f"{task}.jsonl", data or RECORDS[task]), **settings}
        assert main(["fit-predict", *options(**given, **QUIET)]) == 0
        return read(tmp_path / run_dir)

    return call


def final_metrics(folder: Path) -> dict[str, float]:
    """What loggers get at the end of a run, by name."""
    found = {}
    for method, entry in json.loads((folder / "metrics.json").read_text())["groups"]["all"].items():
        for name, metric in entry["metrics"].items():
            found[f"all/{method}/{name}"] = metric["value"]
            found[f"all/{method}/{name}/standard_error"] = metric["standard_error"]
        for name, test in entry["against_zero_shot"].items():
            found[f"all/{method}/{name}/p_value"] = test["p_value"]
    return {name: value for name, value in found.items() if value is not None}
