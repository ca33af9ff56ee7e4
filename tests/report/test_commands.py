"""`fastmem report` and `fastmem compare` from the command line."""

import pytest

from fastmem_pl.cli import main


@pytest.fixture
def run(tmp_path, two_methods, make_run):
    return make_run("run", two_methods)


def test_a_page_and_its_tables(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert str(run / "report.html") in out
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "The tower of town 3" in page
    assert "91.7% ± 8.3" in page
    assert "**91.7% ± 8.3** (+6 −1, p = 0.125)" in text


def test_the_same_run_gives_the_same_page(run, tmp_path):
    for name in ("a.html", "b.html"):
        assert main(["report", str(run), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_several_runs_go_to_the_working_folder(run, make_run, two_methods, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(make_run("other", two_methods)), "--title", "Two & more"]) == 0
    assert "<title>Two &amp; more</title>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report: give a run folder"),
        (["RUN", "--out", "x.txt"], "--out: x.txt is no name of a page"),
        (["RUN", "--out", "no/x.html"], "--out: there is no folder no"),
        (["RUN", "--out", "."], "--out: . is a folder"),
        (["RUN", "--data", "nothing.json"], "--data: no such file: nothing.json"),
        (["RUN", "--titel", "x"], "unknown option --titel; did you mean '--title'?"),
        (["nothing"], "no such run folder: nothing"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert main(["report", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["x.html", "x.md"])
def test_files_that_no_report_wrote_are_replaced_with_force_only(run, capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / name
    mine.write_text("# my own\n")
    assert main(["report", str(run), "--out", "x.html"]) == 2
    assert f"--out: {name} exists and is not from fastmem report; give --force" in capsys.readouterr().err
    assert mine.read_text() == "# my own\n"
    assert len(list(tmp_path.glob("x.*"))) == 1
    assert main(["report", str(run), "--out", "x.html", "--force"]) == 0
    # Its own ones it replaces.
    assert main(["report", str(run), "--out", "x.html"]) == 0
    if name == "x.md":
        mine.write_text(mine.read_text() + "\nMy conclusion.\n")
        assert main(["report", str(run), "--out", "x.html"]) == 2


def test_compare_prints_the_numbers_of_the_page(run, capsys):
    assert main(["compare", str(run)]) == 0
    out = capsys.readouterr().out
    assert "91.7% ± 8.3" in out
    assert "p = 0.125" in out


def test_compare_needs_a_run(capsys):
    assert main(["compare"]) == 2
    assert "compare: give a run folder" in capsys.readouterr().err
