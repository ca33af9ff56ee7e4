"""The run folder: refusal of other settings and of other people's files, repair after a kill."""

import json
import re
import sys

import pytest
from conftest import make_module
from runs import answered
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemTrainer
from fastmem_pl.base.files import as_path
from fastmem_pl.run.folder import RunFolder


def folder(path, identity=None):
    return RunFolder(path, identity or {"model": {"steps": 10}}, ["a", "b"])


def reopened(path, identity=None, records=()):
    """A folder that was opened, given records, and closed."""
    run = folder(path, identity)
    run.open("model: {}\n")
    run.append(records)
    run.close()
    return run


def answers(index):
    return [answered(index, method) for method in ("a", "b")]


def contents(path):
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_written_sample_is_dropped_and_the_rest_kept(tmp_path, cut):
    run = reopened(tmp_path, records=answers(0) + answers(1))
    run.predictions_path.write_bytes(run.predictions_path.read_bytes()[:-cut])
    assert reopened(tmp_path).records() == answers(0)
    reopened(tmp_path, records=answers(1))
    assert reopened(tmp_path).records() == answers(0) + answers(1)


@pytest.mark.parametrize(
    ("name", "there", "here", "message"),
    [
        ("steps", 10, 20, "data.steps: there 10, here 20"),
        ("file_hash", "1" * 16, "2" * 16, "data.path: another file, or its content has changed"),
        ("limit", 5, 3, "data.limit: there 5, here 3; it may be raised"),
        ("limit", None, 3, "data.limit: there all, here 3; it may be raised"),
        ("limit", 5, 9, None),
        ("limit", 5, None, None),
    ],
)
def test_other_settings_are_refused_by_name_but_a_limit_may_grow(tmp_path, name, there, here, message):
    reopened(tmp_path, {"data": {name: there}})
    wanted = folder(tmp_path, {"data": {name: here}})
    if message is None:
        wanted.check()
    else:
        with pytest.raises(FastMemError, match=re.escape(f"holds results of other settings ({message})")):
            wanted.check()


@pytest.mark.parametrize("start", [RunFolder.check, lambda run: run.open("")], ids=["check", "open"])
@pytest.mark.parametrize(
    "name",
    ["predictions.jsonl", "work/thesis.tex", "parts/a.jsonl", "logs/metrics.csv", "search.md", "config.yaml"],
)
def test_a_folder_of_the_users_own_is_not_touched(tmp_path, name, start):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(FastMemError, match=r"holds \w+.* but no run\.json, so it is not from fastmem; give "):
        start(folder(tmp_path))
    assert contents(tmp_path) == {name: "mine\n"}


def test_a_run_json_of_another_program_is_not_touched(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(FastMemError, match=r"run\.json: expected .* list; .* not from fastmem; give "):
        folder(tmp_path).open("")
    assert (tmp_path / "run.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(256)), "is not UTF-8 text"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth"),
        ('{"schema_version": 1}', "missing required field id"),
        ('{"schema_version": 1, "id": [1], "identity": {}}', "id: expected text, found a list"),
        ('{"schema_version": 1, "id": "../../x", "identity": {}}', "id: expected text of another form"),
        (
            '{"schema_version": 1, "id": "0123456789abcdef", "identity": {"model": "x"}}',
            "expected a mapping, found text",
        ),
        (
            '{"schema_version": 2, "id": "0123456789abcdef", "identity": {}}',
            "of schema 2, and this program reads 1",
        ),
    ],
)
def test_a_run_json_that_no_run_of_this_version_has_is_not_touched(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = path.read_bytes()
    with pytest.raises(FastMemError, match=rf"run_dir: .*run\.json.*{message}.*; give another --run_dir"):
        folder(tmp_path).open("")
    assert path.read_bytes() == before


def test_a_folder_with_a_damaged_record_is_left_as_it_is(tmp_path):
    run = reopened(tmp_path, records=answers(0))
    run.predictions_path.write_text("{}\n")
    before = contents(tmp_path)
    with pytest.raises(FastMemError, match="line 1: not a record"):
        folder(tmp_path).open("model: {other: settings}")
    assert contents(tmp_path) == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(FastMemError, match="is a file; give a folder"):
        folder(tmp_path / "f").check()


def test_what_a_run_left_that_was_killed_at_its_start_is_no_obstacle(tmp_path):
    for name in (".lock", ".fastmem-12-0123abcd.partial"):
        (tmp_path / name).touch()
    reopened(tmp_path)
    assert (tmp_path / "run.json").is_file()


def test_files_in_a_run_folder_that_the_run_has_not_made_stay(tmp_path):
    reopened(tmp_path, records=answers(0))
    (tmp_path / "parts").mkdir()
    for name in ("mine.jsonl", "parts/mine.jsonl"):
        (tmp_path / name).write_text("mine")
    again = reopened(tmp_path)
    again.merge_parts()
    assert again.records() == answers(0)
    assert contents(tmp_path / "parts") == {"mine.jsonl": "mine"}


def test_metrics_are_replaced_whole(tmp_path):
    run = reopened(tmp_path)
    run.write_metrics({"a": 1})
    run.write_metrics({"a": 2})
    assert json.loads(run.metrics_path.read_text()) == {"a": 2}
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_behind_a_url_is_one_in_a_folder(tiny_folder, tmp_path, one_thread):
    pytest.importorskip("upath", reason="needs universal-pathlib: pip install 'fastmem-pl[ray]'")
    data, found = str(write_towers(tmp_path, 4)), []

    def run(mode, place):
        module = make_module(str(tiny_folder), steps=2, max_new_tokens=4)
        trainer = FastMemTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        getattr(trainer, mode)(module, FastMemDataModule("qa", data, batch_size=2), str(place))

    for place in (tmp_path / "run", "memory://bucket/run"):
        run("fit", place)
        run("predict", place)
        path = as_path(str(place))
        # What a killed run leaves.
        lines = (path / "predictions.jsonl").read_bytes().splitlines(keepends=True)
        (path / "predictions.jsonl").write_bytes(b"".join(lines[:7]))
        (path / "metrics.json").unlink()
        run("predict", place)
        records = [json.loads(line) for line in (path / "predictions.jsonl").read_bytes().splitlines()]
        found.append([(r["index"], r["method"], r["token_ids"]) for r in records])
        assert (path / "metrics.json").is_file()
        assert not list(path.glob("parts/*"))
        assert len(list(path.glob("memories/*.safetensors"))) == 4
    assert len(found[0]) == 12
    assert found[0] == found[1]
    with pytest.raises(FastMemError, match="memory://bucket/run holds results of other settings"):
        RunFolder(as_path("memory://bucket/run"), {"model": {"memorize": {"steps": 3}}}, []).check()


@pytest.mark.parametrize("url", ["nothing://bucket/run", "s3://bucket/run"])
def test_a_url_that_nothing_reads_is_refused(monkeypatch, url):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(FastMemError, match=f"^{url}: "):
        as_path(url)
