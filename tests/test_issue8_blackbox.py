"""Black-box checks of reports, comparisons, profiles, loggers and `fastmem env`: what a user sees of them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from made_runs import METHODS, RIGHT, Maker, Page, mcnemar, spread
from test_issue_blackbox import NQ, PREFIX, answers, files, read, write

from fastmem_pl.cli import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

PAPER = {
    "model.backbone": "meta-llama/Meta-Llama-3-8B-Instruct",
    "model.steps": 10,
    "model.learning_rate": 1e-5,
    "model.kl_coeff": 0.1,
    "model.max_new_tokens": 100,
    "model.dola_layers": "high",
    "data.answer_prefix": "",
    "trainer.precision": "bf16-true",
}
PUBLISHED = {"zero-shot": 0.591, "dola": 0.594, "fastmem": 0.715, "fastmem+cd": 0.716, "fastmem+dola": 0.714}
HOSTILE = [
    "</script><script>window.bad = 1; alert(1)</script>",
    "<img src=x onerror=\"window.bad=1;alert('x')\"><svg onload=alert(1)>",
    "[bold]loud[/bold] [/red] [link=http://evil.example/]x[/link] | a | b |\n# heading\n\n```\n---",
    "<!-- <script> --> ]]> {{ 7 * 7 }} {% raw %} ${x} `tick` &lt;b&gt; \\u003c",
    "‮right-to-left‬ שלום مرحبا 🦀👩‍👩‍👧 é \u2028\u2029 ﷽",
    "bell\x07 escape\x1b[31m null\x00 del\x7f \ufffe \x85",
    "-->'\"><a href=javascript:alert(1)>x</a><iframe src=http://evil.example></iframe>",
    "</textarea></title></style></svg><base href='http://evil.example/'><meta http-equiv=refresh>",
]


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small real run, without the folder."""
    given = {
        "model.backbone": tiny_folder,
        "model.methods": "[zero-shot, fastmem, dola]",
        "model.steps": 3,
        "model.learning_rate": 0.01,
        "model.max_new_tokens": 6,
        "data.task": "nqswap",
        "data.path": write(tmp_path_factory.mktemp("data") / "nq.json", NQ),
        "data.batch_size": 2,
        "data.answer_prefix": PREFIX,
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
def make(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "250")
    return Maker(tmp_path / "runs", real)


@pytest.fixture
def say(capsys: pytest.CaptureFixture) -> Callable[..., Said]:
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
    """Run a command that must be refused in one line, with nothing written; gives the line."""

    def call(*arguments: object) -> str:
        before = files(tmp_path)
        said = say(*arguments, expect=2)
        assert said.out == ""
        assert said.err.count("\n") == 1, f"not one line: {said.err!r}"
        assert files(tmp_path) == before, "something was written"
        return said.err

    return call


@pytest.fixture
def pages(say) -> Callable[..., tuple[Page, str]]:
    """Report into `page.html` of the working folder; gives the page and the Markdown."""

    def call(*arguments: object) -> tuple[Page, str]:
        say("report", *arguments, "--out", "page.html")
        return Page(Path("page.html").read_text("utf-8")), Path("page.md").read_text("utf-8")

    return call


def shows(text: str, value: float, error: float | None = None) -> bool:
    """Is this value, with its standard error, in a text as a percentage or a fraction?"""
    for scale, digits, sign in ((100, 1, r"\s?%?"), (1, 3, "")):
        number = rf"(?<![\d.]){scale * value:.{digits}f}{sign}"
        if error is not None:
            number += rf"\s*(?:±|\+/-|\()\s*{scale * error:.{digits}f}(?!\d)"
        if re.search(number, text):
            return True
    return False


def p_values(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\bp\s*[=<≈]\s*(\d[\d.]*(?:e-?\d+)?)", text)]


def has_p(text: str, expected: float) -> bool:
    return any(abs(found - expected) < 0.0006 for found in p_values(text))


def rows_of(markdown: str) -> list[list[str]]:
    """Cells of all table rows; fails where a row is not as wide as the rows around it."""
    rows: list[list[str]] = []
    previous = 0
    for line in markdown.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip())[1:-1] if line.startswith("|") else []
        assert not cells or previous in (0, len(cells)), f"a row of another width: {line!r}"
        previous = len(cells)
        rows += [[cell.strip() for cell in cells]] if cells else []
    assert rows, f"no table: {markdown}"
    return rows


def row_of(markdown: str, word: str) -> str:
    """The rows that name this as a whole word."""
    word = rf"(?<![\w+.-]){re.escape(word)}(?![\w+.-])"
    return "\n".join(
        row for row in (" | ".join(cells) for cells in rows_of(markdown)) if re.search(word, row)
    )


def metric(folder: Path, method: str, name: str = "accuracy") -> tuple[float, float]:
    found = json.loads((folder / "metrics.json").read_text())["groups"]["all"][method]["metrics"][name]
    return found["value"], found["standard_error"]


def accuracy(indices: range, n: int) -> tuple[float, float]:
    found = spread([float(index in indices) for index in range(n)])
    return found["value"], found["standard_error"]


def assert_selfcontained(page: Page) -> None:
    loading = ["src", "href", "xlink:href", "srcset", "data", "poster", "action", "background", "formaction"]
    for tag, attrs in page.elements:
        assert tag not in ("iframe", "object", "embed", "base"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), f"<{tag} {name}={value}>"
            if name in loading and value:
                cited = tag == "a" and name == "href" and value.startswith("https://")
                assert cited or value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
            assert not re.search(r"url\(\s*['\"]?(?!#|data:)\w", value), value
    for style in page.styles:
        assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)\w", style), "a style loads something"
    assert "\x00" not in page.source


def test_one_run_writes_beside_its_records(make: Maker, say) -> None:
    folder = make()
    before = files(make.root)
    said = say("report", folder)
    after = files(make.root)
    assert {name for name in after if name not in before} == {"run/report.html", "run/report.md"}
    assert before.items() <= after.items()
    assert not list(Path.cwd().iterdir())
    assert "report.html" in said.out
    say("report", folder)
    assert files(make.root) == after, "the same run gives another page"


def test_several_runs_write_here(make: Maker, say) -> None:
    title = "A <b>bold</b> | title & more"
    say("report", make("one", n=10), make("two", n=10, settings={"model.kl_coeff": 0.3}), "--title", title)
    assert {path.name for path in Path.cwd().iterdir()} == {"report.html", "report.md"}
    page = Page(Path("report.html").read_text("utf-8"))
    assert any(title in heading for heading in page.headings)
    assert "<b>bold</b>" not in page.source


def test_of_a_real_run(real: Path, tmp_path: Path, pages, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, markdown = pages(real)
    assert_selfcontained(page)
    for method in ("zero-shot", "fastmem", "dola"):
        assert shows(row_of(markdown, method), *metric(real, method))
    for row in NQ:
        assert row["sub_context"][:6] in page.everything
    assert "Please extract from the context" in page.everything, "no prompt"
    for record in read(real):
        assert record["prediction"][:20] in page.everything


@pytest.fixture(scope="module")
def usual(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, str, str]:
    """A finished run with its page, Markdown and terminal table."""
    folder = Maker(tmp_path_factory.mktemp("usual") / "runs", real)()
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        assert main(["compare", str(folder)]) == 0
        terminal = out.getvalue()
        assert main(["report", str(folder)]) == 0
    html, markdown = ((folder / f"report.{suffix}").read_text("utf-8") for suffix in ("html", "md"))
    return folder, Page(html), markdown, terminal


def test_numbers_are_those_of_the_records(usual) -> None:
    folder, page, markdown, terminal = usual
    assert_selfcontained(page)
    groups = json.loads((folder / "metrics.json").read_text())["groups"]["all"]
    for text in (page.text, markdown, terminal):
        for method in METHODS:
            for name in ("accuracy", "f1", "format_failure", "original"):
                assert shows(text, *metric(folder, method, name)), (method, name)
        for method in METHODS[1:3]:
            test = groups[method]["against_zero_shot"]["accuracy"]
            assert has_p(text, test["p_value"]), (method, test, text)
            assert re.search(rf"\b{test['gained']}\b[^\n]*\b{test['lost']}\b", text), (method, test)
    for row in rows_of(markdown):
        for number in re.findall(r"\d+\.\d+%? ± \d+\.\d+", " ".join(row)):
            assert number in page.text
            assert number in terminal


def test_charts_of_the_issue(usual) -> None:
    page = usual[1]
    said = " ".join(page.headings).lower()
    for words in (
        "loss|cross.entropy",
        "kl|distance from the model",
        "context length|length of the context",
        "perplexity",
        "format",
        "original|memorized world|instead of the context",
        "seconds|time",
        "memory",
        "layer",
    ):
        assert re.search(words, said), words
    charts = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(charts) >= 8
    assert all("currentColor" in chart or "var(--" in chart for chart in charts)
    assert "prefers-color-scheme" in "".join(page.styles)
    assert any(tag == "meta" and attrs.get("name") == "viewport" for tag, attrs in page.elements)


@pytest.mark.parametrize(
    ("methods", "missing"), [(METHODS[:3], "layer"), (("zero-shot", "dola"), "loss over|distance from")]
)
def test_no_empty_charts(make: Maker, pages, methods: tuple[str, ...], missing: str) -> None:
    page, _ = pages(make(methods=methods, n=12))
    assert not re.search(missing, " ".join(page.headings).lower())


@pytest.mark.parametrize("width", [40, 80])
def test_compare_loses_nothing_in_a_narrow_terminal(make: Maker, say, monkeypatch, width: int) -> None:
    folders = [make("one"), make("two", task="qa"), make("three", task="summary", methods=METHODS[:2])]
    before = files(make.root.parent)
    monkeypatch.setenv("COLUMNS", str(width))
    out = say("compare", *folders).out
    assert "…" not in out
    for method, value in (("fastmem", "75.0"), ("fastmem+cd", "37.5"), ("zero-shot", "42.5")):
        assert value in out, (method, out)
    assert files(make.root.parent) == before, "compare writes"


def test_bootstrap_of_scores_that_are_no_yes_or_no(make: Maker, say) -> None:
    folder = make(task="summary", methods=("zero-shot", "fastmem", "dola"))
    scores = {m: [r["scores"]["rougeL"] for r in read(folder) if r["method"] == m] for m in METHODS}
    draw = random.Random(0)
    said = say("compare", folder).out
    for method in ("fastmem", "dola"):
        assert shows(said, *metric(folder, method, "rougeL"))
        pairs = [a - b for a, b in zip(scores[method], scores["zero-shot"], strict=True)]
        means = [statistics.mean(draw.choices(pairs, k=len(pairs))) for _ in range(2000)]
        p = min(1.0, 2 * min(sum(m <= 0 for m in means), sum(m >= 0 for m in means)) / len(means))
        assert any(abs(found - p) < 0.05 for found in p_values(said)), (method, p, said)


@pytest.mark.parametrize("n", [1, 2])
def test_few_samples(make: Maker, say, n: int) -> None:
    folder = make(n=n)
    said = say("compare", folder).out
    if n == 1:
        say("report", folder)
        said += Page((folder / "report.html").read_text("utf-8")).text
    assert not re.search(r"\bnan\b", said.lower())


def test_different_datasets_stand_side_by_side(make: Maker, pages) -> None:
    folders = [make("one"), make("two", task="qa", n=30)]
    page, markdown = pages(*folders)
    for text in (page.text, markdown):
        assert {"nqswap", "qa"} <= set(re.findall(r"\w+", text.lower()))
    for folder in folders:
        assert shows(row_of(markdown, "fastmem"), *metric(folder, "fastmem"))


def test_two_tasks_of_one_file_are_two_datasets(make: Maker, say) -> None:
    data = make.data("common", "nqswap", 40, {})
    right = {"fastmem": range(10)}
    folders = [make("one", data=data), make("two", data=data, task="nq", right=right)]
    out = say("compare", *folders).out
    first = next(line for line in out.splitlines() if line.startswith("│ fastmem "))
    assert first.count("75.0%") == 1, "the mean of one task stands for both"
    assert first.count("25.0%") == 1, "the mean of one task stands for both"
    assert "all: 40 samples" not in out


@pytest.mark.parametrize("names", [("one", "two"), ("a/run", "b/run")])
@pytest.mark.parametrize("settings", [{"model.learning_rate": 0.0003}, {}], ids=str)
def test_the_same_data_twice(make: Maker, say, names: tuple[str, str], settings: dict) -> None:
    data = make.data("common", "nqswap", 40, {})
    one = make(names[0], data=data)
    two = make(names[1], data=data, settings=settings, right={"fastmem": range(3, 28)})
    out = say("compare", one, two).out
    headings = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│ fastmem ")]
    assert len(set(headings)) == 2, out
    assert shows(out, *metric(one, "fastmem"))
    assert shows(out, *metric(two, "fastmem"))
    assert has_p(out, mcnemar(16, 3))
    assert has_p(out, mcnemar(11, 3))


@pytest.mark.parametrize("order", [1, -1])
def test_zero_shot_of_another_run_on_the_same_data(make: Maker, say, order: int) -> None:
    data = make.data("common", "nqswap", 40, {})
    folders = [make(f"run{i}", data=data, methods=(method,)) for i, method in enumerate(METHODS[:2])]
    out = say("compare", *folders[::order]).out
    assert has_p(out, mcnemar(16, 3)), out
    assert re.search(r"\b16\b.*\b3\b", out)


def test_zero_shot_of_a_longer_run_is_paired_by_sample(make: Maker, say) -> None:
    data = make.data("common", "nqswap", 40, {})
    longer = make("longer", data=data, methods=("zero-shot",))
    shorter = make("shorter", data=data, methods=("fastmem",), n=24, settings={"data.limit": 24})
    out = say("compare", longer, shorter).out
    assert has_p(out, mcnemar(7, 3)), out
    assert shows(out, *accuracy(RIGHT["fastmem"], 24))


@pytest.mark.parametrize(
    "other",
    [
        {"model.backbone": "other/model", "model.fingerprint": "0123456789abcdef"},
        {"data.answer_prefix": "The answer is: maybe"},
        {"model.system_prompt": "Be brief."},
        {"data.file_hash": "0123456789abcdef"},
        {"data.task": "nq"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_zero_shot_of_something_else_is_not_compared_with(make: Maker, say, other: dict) -> None:
    data = make.data("common", "nqswap", 40, {})
    one = make("one", data=data, methods=("zero-shot",))
    two = make("two", data=data, methods=("fastmem",), settings=other, task=other.get("data.task", "nqswap"))
    assert not p_values(say("compare", one, two).out)


def test_published_numbers_beside_the_papers_config(make: Maker, pages, say) -> None:
    folder = make(methods=tuple(PUBLISHED), settings=PAPER)
    page, markdown = pages(folder)
    for text in (page.text, markdown, say("compare", folder).out):
        assert re.search("publ|paper", text, re.IGNORECASE)
        for method, value in PUBLISHED.items():
            assert shows(text, value), f"{method}: {value} is missing"
    for method, value in PUBLISHED.items():
        assert shows(row_of(markdown, method), value)


@pytest.mark.parametrize(
    "other",
    [
        {"model.learning_rate": 1e-4},
        {"model.steps": 20},
        {"model.kl_coeff": 1.0},
        {"model.num_layers": 2},
        {"model.weight_decay": 0.1},
        {"model.kl_target": 0.1},
        {"model.backbone": "meta-llama/Llama-3.2-1B-Instruct"},
        {"model.quantization": "bnb-4bit"},
        {"model.temperature": 0.7},
        {"model.repetition_penalty": 1.3},
        {"model.system_prompt": "Be brief."},
        {"model.chat_template": False},
        {"model.max_context_tokens": 500},
        {"model.max_new_tokens": 10},
        {"data.answer_prefix": "The answer is:"},
        {"data.task": "nq_icl"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_no_published_number_beside_another_config(make: Maker, say, other: dict) -> None:
    task = other.get("data.task", "nqswap")
    out = say("compare", make(methods=tuple(PUBLISHED), settings={**PAPER, **other}, task=task)).out
    assert not shows(out, PUBLISHED["fastmem"])
    assert not shows(out, PUBLISHED["fastmem+cd"])


def test_a_setting_of_one_method_leaves_the_others_published_numbers(make: Maker, say) -> None:
    out = say("compare", make(methods=tuple(PUBLISHED), settings={**PAPER, "model.alpha": 2.0})).out
    assert shows(out, PUBLISHED["fastmem"])
    assert not shows(out, PUBLISHED["fastmem+cd"])


def cut(folder: Path, samples: int, methods: int = len(METHODS)) -> list[bytes]:
    """Leave the first samples in a run folder; gives the other lines."""
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_bytes(b"".join(lines[: samples * methods]))
    (folder / "metrics.json").unlink(missing_ok=True)
    return lines[samples * methods :]


@pytest.mark.parametrize("left", ["whole", "half a line", "half a sample", "parts", "only parts"])
def test_stopped_runs_are_reported_as_far_as_they_are(make: Maker, pages, say, left: str) -> None:
    folder = make()
    rest = cut(folder, 0 if left == "only parts" else 25)
    with open(folder / "predictions.jsonl", "ab") as file:
        file.write({"half a line": rest[0][:70], "half a sample": rest[0] + rest[1]}.get(left, b""))
    if "parts" in left:
        (folder / "parts").mkdir()
        shared = 4 * (10 if left == "parts" else 35)
        (folder / "parts" / "host-1-0abc.jsonl").write_bytes(b"".join(rest[:shared]) + rest[shared][:30])
    if left == "only parts":
        (folder / "predictions.jsonl").unlink()
    done = 35 if "parts" in left else 25
    before = files(folder)
    texts = [say("compare", folder).out]
    if left == "parts":
        page, markdown = pages(folder)
        texts += [page.text, markdown]
        assert re.search("stopped|not finished|unfinished|incomplete|partial|so far|not complete", page.text)
    for text in texts:
        assert shows(text, *accuracy(RIGHT["fastmem"], done)), text
        assert str(done) in text
    assert files(folder) == before, "a report writes to a stopped run"


def test_a_stopped_run_beside_a_finished_one(make: Maker, say) -> None:
    data = make.data("common", "nqswap", 40, {})
    one, two = make("one", data=data), make("two", data=data, settings={"model.steps": 20})
    cut(two, 25)
    out = say("compare", one, two).out
    assert shows(out, *metric(one, "fastmem"))
    assert shows(out, *accuracy(RIGHT["fastmem"], 25))
    assert re.search(r"\btwo\b.*(25|stopped|so far)", out)


@pytest.mark.parametrize("left", ["empty", "half a line", "gone"])
def test_nothing_answered_yet(make: Maker, refused, left: str) -> None:
    folder = make()
    first = cut(folder, 0)[0]
    if left == "gone":
        (folder / "predictions.jsonl").unlink()
    else:
        (folder / "predictions.jsonl").write_bytes(first[:50] if left == "half a line" else b"")
    for command in ("report", "compare"):
        assert str(folder) in refused(command, folder)


def test_odd_values_of_a_run(make: Maker, pages) -> None:
    """A fit that failed, an answer that is not Unicode, a sample nobody knows the answer of."""
    folder = make(task="qa")
    records = read(folder)
    for record in records:
        if record["index"] == 4 and record["curve"]:
            record |= {"status": "not memorized: the loss was not finite"}
            record["curve"]["kl"] = [0.0, float("nan"), float("inf")]
        if record["index"] == 5:
            record |= {"prediction": "half \ud83e a crab", "id": "\udc00"}
        if record["index"] == 6:
            record |= {"references": [], "scores": {"format_failure": 0.0}}
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page, markdown = pages(folder)
    assert "the loss was not finite" in page.everything
    found = [
        r["scores"]["accuracy"] for r in records if r["method"] == "fastmem" and "accuracy" in r["scores"]
    ]
    assert shows(markdown, *[spread(found)[name] for name in ("value", "standard_error")])


def holds_contexts(page: Page, name: str) -> bool:
    return f"Told in {name} number 7" in page.everything.replace('"], ["', "").replace('", "', "")


def test_data_that_moved(make: Maker, pages, refused) -> None:
    folders = [make("one"), make("two", task="qa")]
    moved = make.root / "moved.jsonl"
    (make.root / "data-one.jsonl").rename(moved)
    page, markdown = pages(folders[0])
    assert not holds_contexts(page, "data-one")
    assert re.search("(?i)missing", page.text)
    assert shows(markdown, *metric(folders[0], "fastmem"))
    page, _ = pages(*folders, "--data", moved)
    assert holds_contexts(page, "data-one")
    assert holds_contexts(page, "data-two")
    for nowhere in ("nowhere.jsonl", "."):
        line = refused("report", folders[0], "--data", nowhere)
        assert "--data" in line
        assert nowhere in line


@pytest.mark.parametrize("change", ["other contexts", "no JSON", "a folder"])
def test_changed_data_is_not_shown(make: Maker, pages, change: str) -> None:
    folder = make(n=12)
    data = make.root / "data-run.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    if change == "a folder":
        data.unlink()
        data.mkdir()
    else:
        data.write_text("no json" if change == "no JSON" else "".join(lines).replace("Told", "Lied"))
    page, markdown = pages(folder)
    assert not holds_contexts(page, "data-run")
    assert "Lied in" not in page.everything
    assert shows(markdown, *metric(folder, "fastmem"))
    assert re.search(r"missing.*data|data.*missing", page.text), "no word about the data"


def test_data_of_another_run(make: Maker, say) -> None:
    folder = make(n=12)
    other = make.data("other", "nqswap", 12, {})
    said = say("report", folder, "--out", "page.html", "--data", other, expect=None)
    assert said.status in (0, 2)
    if said.status == 2:
        assert "other.jsonl" in said.err
        assert not Path("page.html").exists()
    else:
        page = Page(Path("page.html").read_text("utf-8"))
        assert "Told in other" not in page.everything
        assert "--data" in page.text + said.out + said.err


def damaged(make: Maker, kind: str) -> tuple[Path, str]:
    """A folder that cannot be reported, and what the line must name."""
    if kind == "missing":
        return make.root / "nothing", "nothing"
    if kind == "foreign":
        (make.root / "photos").mkdir(parents=True)
        (make.root / "photos" / "cat.jpg").write_text("")
        return make.root / "photos", "photos"
    folder = make("run")
    if kind == "file":
        return make.root / "data-run.jsonl", "data-run.jsonl"
    name, kind = kind.split(":")
    lines = (folder / name).read_text().splitlines(keepends=True)
    if name == "predictions.jsonl":
        record = json.loads(lines[5])
        change = {
            "scores": {"scores": "high"},
            "score": {"scores": {"accuracy": "yes"}},
            "none": {"scores": {"accuracy": None}},
            "curve": {"curve": [1, "a"]},
            "index": {"index": "five"},
            "method": {"method": ["fastmem"]},
            "prediction": {"prediction": None},
            "seconds": {"seconds": "long"},
        }
        texts = {"garbage": "{not json", "list": "[1]", "empty": "{}", "binary": "\udcff\udcfe"}
        lines[5] = texts.get(kind) or json.dumps({**record, **change[kind]})
        lines[5] += "\n"
    else:
        texts = {"garbage": '{"a": ', "empty": "", "list": "[]", "gone": "{}", "string": '{"identity": "x"}'}
        lines = [texts[kind]]
    (folder / name).write_text("".join(lines), errors="surrogateescape")
    return folder, name


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "foreign",
        "file",
        *(f"predictions.jsonl:{kind}" for kind in ("garbage", "binary", "list", "empty")),
        *(f"metrics.json:{kind}" for kind in ("garbage", "empty", "list")),
        *(f"run.json:{kind}" for kind in ("garbage", "empty", "list", "gone", "string")),
    ],
)
def test_damaged_folders_get_one_line(make: Maker, refused, kind: str) -> None:
    folder, name = damaged(make, kind)
    for command in ("compare", "report"):
        assert name in refused(command, folder)


@pytest.mark.parametrize(
    "kind", ["scores", "score", "none", "curve", "index", "method", "prediction", "seconds"]
)
def test_records_of_another_form_end_no_command_in_a_traceback(make: Maker, say, kind: str) -> None:
    """They are left out, or the file is named."""
    folder, name = damaged(make, f"predictions.jsonl:{kind}")
    said = say("report", folder, expect=None)
    assert said.status in (0, 2)
    if said.status == 2:
        assert said.err.count("\n") == 1
        assert name in said.err
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("command", "more", "word"),
    [("fit", [], "memor|answer"), ("search", ["--search.grid", "{steps: [1, 2]}"], "search")],
)
def test_folders_of_other_commands(options, make: Maker, refused, say, command, more, word: str) -> None:
    folder = make.root / "run"
    say(command, *options, *more, "--run_dir", folder)
    for reporter in ("report", "compare"):
        line = refused(reporter, folder)
        assert str(folder) in line
        assert re.search(word, line.replace(str(folder), ""))


def test_mistakes_on_the_command_line(make: Maker, refused, say) -> None:
    folder = make(n=4)
    assert "--title" in refused("report", folder, "--titel", "x")
    assert "--json" in refused("env", "--jsno")
    for command in ("report", "compare"):
        assert "profile" in refused(command, folder, "--profile")
        said = say(command, expect=2)
        assert "run" in said.err.lower()
        assert len(said.err.splitlines()) <= 4


@pytest.mark.parametrize(
    "target", ["file/page.html", "folder", "/proc/nowhere/page.html", "page.md", "dir.html"]
)
def test_targets_that_cannot_be_written(make: Maker, refused, target: str) -> None:
    folder = make(n=2)
    Path("file").write_text("")
    for name in ("folder", "dir.md"):
        Path(name).mkdir()
    line = refused("report", folder, "--out", target)
    assert Path(target).stem in line or str(Path(target).parent) in line
    for name in ("predictions.jsonl", "metrics.json", "run.json"):
        refused("report", folder, "--out", folder / name)


@pytest.fixture(scope="module")
def hostile(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of hostile texts with its report."""
    fields = ("id", "question", "context", "reference", "original", "prediction")
    texts = {
        index: {field: HOSTILE[(index + place) % len(HOSTILE)] for place, field in enumerate(fields)}
        for index in range(2 * len(HOSTILE))
    }
    make = Maker(tmp_path_factory.mktemp("hostile") / "runs", real)
    name, settings = "a|b [bold] [_red] <i>x&y", {"model.backbone": "[red]|<b>"}
    folder = make(name, task="qa", methods=METHODS[:3], texts=texts, settings=settings)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["report", str(folder)]) == 0
    return folder


def test_hostile_texts_stay_texts(hostile: Path, usual, say, make: Maker) -> None:
    page, markdown = (
        Page((hostile / "report.html").read_text("utf-8")),
        (hostile / "report.md").read_text("utf-8"),
    )
    assert_selfcontained(page)
    count = [[tag for tag, _ in one.elements].count for one in (page, usual[1])]
    for tag in ("script", "style", "meta", "img", "title", "link", "i"):
        assert count[0](tag) == count[1](tag), tag
    for text in ("alert(1)", "{{ 7 * 7 }}", "right-to-left"):
        assert text in page.everything, "a text is lost"
    rows_of(markdown)
    assert not re.search(r"<(script|img|i)\b", markdown)
    out = say("compare", hostile, make("plain", task="qa")).out
    assert "[bold]" in out, "rich took the folder's name for markup"
    assert "\x1b" not in out


def test_hostile_page_in_a_browser(hostile: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda one: None if one.url.startswith(("file:", "data:")) else wrong.append(one.url)
        )
        page.goto((hostile / "report.html").as_uri())
        for _ in range(len(HOSTILE) + 2):
            page.keyboard.press("j")
        assert page.evaluate("window.bad") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "the page scrolls sideways"
        browser.close()
    assert not wrong


def test_env(say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MY_SECRET",
    ):
        monkeypatch.setenv(name, f"hush-{name.lower()}")
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("COLUMNS", "200")
    texts = [say("env").out, say("env", "--json").out]
    assert isinstance(json.loads(texts[1]), dict)
    for text in texts:
        assert "hush-" not in text
        for word in ("torch", "lightning", "transformers", "fastmem", "python", "triton", "cuda", "optuna"):
            assert word in text.lower(), word
        assert str(tmp_path / "c") in text
        assert re.search("demo|smollm2", text.lower())
        assert sys.version.split()[0] in text
    assert not (tmp_path / "c").exists(), "env makes the cache folder"


@pytest.fixture
def run(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say) -> Callable[..., Said]:
    """Run `fit-predict` with the small options and others, into `run` of the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *more, expect=0: say("fit-predict", *options, "--run_dir", "run", *more, expect=expect)


@pytest.fixture
def refused_run(run, tmp_path: Path) -> Callable[..., str]:
    def call(*more: str) -> str:
        before = files(tmp_path)
        said = run(*more, expect=2)
        assert said.err.count("\n") == 1, said.err
        assert files(tmp_path) == before
        return said.err

    return call


def found_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, dict):
        own = [value[name]] if name in value else []
        return own + [one for inner in value.values() for one in found_in(inner, name)]
    return [one for inner in value for one in found_in(inner, name)] if isinstance(value, list) else []


def test_profile(run, real: Path, pages) -> None:
    said = run("--profile")
    assert [path.name for path in Path("run/profile").iterdir()] == ["profile.json"]
    profile = json.loads(Path("run/profile/profile.json").read_text())
    for phase in ("trunk", "memorize", "prefill", "decode", "scoring"):
        assert phase in said.out.lower(), "the table at the end lacks a phase"
        assert phase in json.dumps(profile)
    assert re.search(r"tok(en)?s?\s*/\s*s", said.out)
    assert re.search("peak|GiB", said.out)
    shares = [share for share in found_in(profile, "share") if isinstance(share, float)]
    assert not shares or sum(shares) == pytest.approx(1, abs=0.02)
    assert answers(Path("run")) == answers(real)
    page, _ = pages("run")
    assert re.search("(?i)profile|where the time|time split", " ".join(page.headings))
    assert "prefill" in page.text


def test_profile_with_trace_and_memory(run, real: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = run("--profile=trace,memory")
    traces = list(Path("run/profile").glob("trace-*.json"))
    assert traces
    assert json.loads(traces[0].read_text())["traceEvents"]
    assert Path("run/profile/profile.json").is_file()
    assert not list(Path("run/profile").glob("memory-*")), "a snapshot of CUDA memory without CUDA"
    assert re.search("memory[^\n]*CUDA|CUDA[^\n]*memory", said.err + said.out + caplog.text)
    assert answers(Path("run")) == answers(real)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--profile=foo"], ["foo", "trace", "memory"]),
        (["--profile=tracee"], ["tracee", "trace"]),
        (["--trainer.profile", "[phasse]"], ["phasse", "phases"]),
        (["--trainer.logger", "csvv"], ["csvv", "csv"]),
        (["--trainer.logger", "[csv, wanbd]"], ["wanbd", "wandb"]),
    ],
)
def test_misspelled_profiles_and_loggers(refused_run, given: list[str], words: list[str]) -> None:
    line = refused_run(*given)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["search", "fit", "predict"])
def test_profile_of_other_commands(options, make: Maker, say, command: str) -> None:
    grid = ["--search.grid", "{steps: [1, 2]}"] if command == "search" else []
    said = say(command, *options, *grid, "--run_dir", "run", "--profile", expect=None)
    if said.status == 0 and command != "search":
        assert Path("run/profile/profile.json").is_file()
    else:
        assert said.status == 2
        assert said.err.count("\n") == 1, said.err
        assert "profile" in said.err


def test_profile_configs(say, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*more: str) -> dict:
        return yaml.safe_load(say("fit-predict", *more, "--print_config").out)

    base = ["--data.path", "x.json", "--config"]
    assert settings(*base, "smollm2,qa,profile")["trainer"]["profile"] == ["phases"]
    assert settings(*base, "smollm2,qa", "--profile")["trainer"]["profile"] == ["phases"]
    both = settings(*base, "smollm2,qa", "--profile=trace,memory")["trainer"]["profile"]
    assert both == ["phases", "trace", "memory"]
    paper = settings("--config", "paper-profile")
    assert paper["trainer"]["profile"]
    assert paper["data"]["path"]


def logged(folder: Path) -> dict[str, list[str]]:
    """What stands in each column of `logs/metrics.csv`."""
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def lengths(folder: Path) -> dict[str, int]:
    return {name: len(values) for name, values in logged(folder).items()}


def test_csv_by_default(real: Path) -> None:
    columns = logged(real)
    curves = [float(v) for name in columns if re.search("cross_entropy|loss", name) for v in columns[name]]
    for record in read(real):
        for value in (record["curve"] or {}).get("cross_entropy", ()):
            assert any(v == pytest.approx(value, rel=1e-3) for v in curves), "a curve is not there"
    finals = [float(v) for name, values in columns.items() if "accuracy" in name for v in values]
    assert any(v == pytest.approx(metric(real, "fastmem")[0]) for v in finals)


def test_no_logger(run, real: Path) -> None:
    run("--trainer.logger", "false")
    assert not Path("run/logs").exists()
    assert answers(Path("run")) == answers(real)


def test_going_on_logs_nothing_twice(run, real: Path) -> None:
    run("--data.limit", "2")
    run()
    assert lengths(Path("run")) == lengths(real)
    run()
    assert lengths(Path("run")) == lengths(real), "a complete run is logged again"


def test_tensorboard_beside_csv(run) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("no tensorboard")
    run("--trainer.logger", "[csv, tensorboard]")
    assert logged(Path("run"))
    assert [path for path in Path("run/logs").rglob("events.out.tfevents*") if path.stat().st_size > 500]


def test_lightnings_own_loggers(run) -> None:
    run("--trainer.logger", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: mine}}")
    assert any("accuracy" in path.read_text().splitlines()[0] for path in Path("mine").rglob("metrics.csv"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("way", ["--trainer.logger", "--config"])
def test_loggers_that_are_not_installed(refused_run, name: str, way: str) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    line = refused_run(way, name)
    assert name in line
    assert "pip install" in line


def test_the_csv_is_complete_after_a_kill(run, options: list[str], tmp_path: Path, real: Path) -> None:
    slow = ["--model.steps", "300", "--model.learning_rate", "1e-5", "--data.batch_size", "1"]
    arguments = ["fit-predict", *options, "--run_dir", "run", *slow]
    killed = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    killed.start()
    done = Path("run/predictions.jsonl")
    end = time.monotonic() + 60
    while not (done.exists() and done.read_bytes().count(b"\n") >= 6) and time.monotonic() < end:
        assert killed.is_alive(), "ended too early"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not Path("run/metrics.json").exists()
    run(*slow)
    ours, theirs = lengths(Path("run")), lengths(real)
    assert set(theirs) <= set(ours)
    for name, count in theirs.items():
        if re.search("accuracy|contained|f1", name):
            assert ours[name] == count, name
    columns = logged(Path("run"))
    curves = {
        round(float(v), 3) for name in columns if re.search("cross_entropy|loss", name) for v in columns[name]
    }
    for record in read(Path("run")):
        if record["curve"]:
            first, last = (round(record["curve"]["cross_entropy"][i], 3) for i in (0, -1))
            assert {first, last} <= curves, f"the curve of sample {record['index']} is not whole"


def test_help_teaches_and_is_quick(tmp_path: Path) -> None:
    code = """
import contextlib, io, json, resource, sys
from fastmem_pl.cli import main
said = {}
for command in ("report", "compare", "env", ""):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"] if command else ["--help"])
    said[command] = out.getvalue()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([said, "torch" in sys.modules, used.ru_utime + used.ru_stime]))
"""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=variables
    )
    assert ran.returncode == 0, ran.stderr
    said, torch_was_imported, seconds = json.loads(ran.stdout)
    for command, words in {
        "report": ["runs/", "--out", "--data", "--title"],
        "compare": ["runs/"],
        "env": ["--json"],
    }.items():
        assert command in said[""], f"fastmem --help lacks {command}"
        for word in (f"fastmem {command}", *words):
            assert word in said[command]
    assert not torch_was_imported
    assert seconds < 3
