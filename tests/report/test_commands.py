"""`fastmem report` and `fastmem compare` as a user sees them: files, numbers, refusals, hostile names."""

import json
import re
from pathlib import Path

import pytest
from report_runs import HOSTILE, assert_loads_nothing, cells_of
from runs import NQ, files, read

from fastmem_pl.cli import main

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def finished(make_run, two_methods):
    return make_run("run", two_methods)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_a_page_and_its_tables_beside_the_records(finished, say):
    before = files(finished)
    assert str(finished / "report.html") in say("report", finished).out
    after = files(finished)
    assert after.keys() - before.keys() == {"report.html", "report.md"}
    assert before.items() <= after.items()
    page, text = after["report.html"].decode(), after["report.md"].decode()
    assert "The tower of town 3" in page
    assert "91.7% ± 8.3" in page
    assert "**91.7% ± 8.3** (+6 −1, p = 0.125)" in text
    say("report", finished)
    assert files(finished) == after, "the same run gives another page"


def test_several_runs_go_to_the_working_folder(finished, make_run, two_methods, say):
    say("report", finished, make_run("other", two_methods), "--title", "Two <b> | & more")
    assert {path.name for path in Path.cwd().iterdir()} == {"report.html", "report.md"}
    assert "<title>Two &lt;b&gt; | &amp; more</title>" in Path("report.html").read_text()
    assert Path("report.md").read_text().startswith(r"# Two &lt;b> \| & more")


@pytest.fixture(scope="module")
def real(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "run"
    methods = ["--model.methods", "[zero-shot, fastmem, dola]"]
    assert main(["fit-predict", *small, *methods, "--run_dir", str(folder)]) == 0
    return folder


def test_a_real_run(real, pages, say):
    """Page, Markdown and terminal show the numbers of ``metrics.json``, and the page all texts."""
    page, markdown = pages(real)
    assert_loads_nothing(page)
    groups = json.loads((real / "metrics.json").read_text())["groups"]["all"]
    rows = {cells[0]: " ".join(cells) for cells in reversed(cells_of(markdown))}
    terminal = say("compare", real).out
    for method in ("zero-shot", "fastmem", "dola"):
        for name in ("accuracy", "f1", "format_failure", "original"):
            found = groups[method]["metrics"][name]
            shown = f"{100 * found['value']:.1f}% ± {100 * found['standard_error']:.1f}"
            assert shown in page.text
            assert shown in terminal
        assert f"{100 * groups[method]['metrics']['accuracy']['value']:.1f}%" in rows[method]
    held = page.text + json.dumps(page.data, ensure_ascii=False)
    assert "Please extract from the context" in held, "no prompt"
    for text in [*(row["sub_context"][:6] for row in NQ), *(r["prediction"][:20] for r in read(real))]:
        assert text in held
    assert {"Loss over the steps", "Layers that DoLa contrasts with", "Peak memory", "Time"} <= {
        text.strip() for text in page._text
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--out", "x.txt"], "--out: x.txt is no name of a page"),
        (["RUN", "--out", "RUN/metrics.json"], "is no name of a page"),
        (["RUN", "--out", "no/x.html"], "--out: there is no folder no"),
        (["RUN", "--out", "file/x.html"], "--out: there is no folder file"),
        (["RUN", "--out", "/proc/nowhere/x.html"], "--out: there is no folder /proc/nowhere"),
        (["RUN", "--out", "."], "--out: . is no name of a page"),
        (["RUN", "--out", "dir.html"], "--out: dir.md is a folder"),
        (["RUN", "--data", "nothing.json"], "--data: no such file: nothing.json"),
        (["RUN", "--data", "."], "--data: no such file: ."),
        (["RUN", "--titel", "x"], "--titel; did you mean --title?"),
        (["RUN", "--profile"], "--profile"),
        (["nothing"], "no such run folder: nothing"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(finished, refused, arguments, message):
    Path("file").write_text("")
    Path("dir.md").mkdir()
    assert message in refused("report", *(part.replace("RUN", str(finished)) for part in arguments))


@pytest.mark.parametrize("name", ["x.html", "x.md"])
def test_files_that_no_report_wrote_are_replaced_with_force_only(finished, refused, say, name):
    mine, command = Path(name), ("report", str(finished), "--out", "x.html")
    mine.write_text("# my own\n")
    assert f"--out: {name} exists and is not from fastmem report; give --force" in refused(*command)
    assert mine.read_text() == "# my own\n"
    say(*command, "--force")
    # Its own ones it replaces.
    say(*command)
    if name == "x.md":
        mine.write_text(mine.read_text() + "\nMy conclusion.\n")
        refused(*command)


def test_commands_need_a_run(say):
    for command in ("report", "compare"):
        said = say(command, expect=2).err
        assert f"{command}: give a run folder" in said


def test_compare_prints_the_numbers_of_the_page_and_writes_nothing(
    finished, make_run, two_methods, only, say, tmp_path, monkeypatch
):
    runs = [finished, make_run("other", two_methods, data="other.jsonl"), only("fastmem")]
    before = files(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    out = say("compare", *runs).out
    assert "91.7% ± 8.3" in out
    assert "p = 0.125" in out
    assert "…" not in out, "something is cut off in a narrow terminal"
    assert files(tmp_path) == before


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples(make_run, two_methods, pages, say, count):
    folder = make_run("run", two_methods[: 2 * count])
    page, markdown = pages(folder)
    assert not re.search(r"\bnan\b", (page.text + markdown + say("compare", folder).out).lower())


@pytest.mark.parametrize(
    ("command", "more", "word"),
    [("fit", [], "memories, not answers"), ("search", ["--search.grid", "{steps: [1, 2]}"], "is a search")],
)
def test_folders_of_other_commands(small, tmp_path, refused, say, command, more, word):
    folder = tmp_path / "run"
    say(command, *small, *more, "--run_dir", folder)
    for reporter in ("report", "compare"):
        line = refused(reporter, folder)
        assert str(folder) in line
        assert word in line


def test_hostile_texts_stay_texts(hostile, make_run, two_methods, pages, say):
    page, markdown = pages(hostile)
    assert_loads_nothing(page)
    held = page.text + json.dumps(page.data, ensure_ascii=False)
    for text in ("alert(1)", "{{ 7 * 7 }}", "right-to-left"):
        assert text in held, "a text is lost"
    assert [sample["question"] for sample in page.data["samples"]][:2] == HOSTILE[1:3]
    plain, _ = pages(make_run("plain", two_methods))
    for tag in ("script", "style", "meta", "title", "i"):
        assert len(page.tags(tag)) == len(plain.tags(tag)), tag
    assert cells_of(markdown)
    assert not re.search(r"<(script|img|i)\b", markdown)
    out = say("compare", hostile, "../plain").out
    assert "[bold]" in out, "rich took the folder's name for markup"
    assert "\x1b" not in out


def test_odd_values_of_a_run(make_run, two_methods, pages):
    """A fit that failed, an answer that is not Unicode, a sample nobody knows the answer of."""
    for record in two_methods:
        if record["index"] == 4 and record["curve"]:
            record["status"] = "not memorized: the loss was not finite"
            record["curve"]["kl"] = [float("nan"), float("inf")]
        if record["index"] == 5:
            record |= {"prediction": "half \ud83e a crab", "id": "\udc00"}
        if record["index"] == 6:
            record |= {"references": [], "scores": {"format_failure": 0.0}}
    page, markdown = pages(make_run("run", two_methods))
    assert "the loss was not finite" in json.dumps(page.data)
    assert "**90.9% ± 9.1** (n = 11; +6 −1, p = 0.125)" in markdown
