"""The run folder: refusal of other settings, repair after a kill, one writer at a time."""

import json

import pytest

from fastmem_pl import FastMemError
from fastmem_pl.run.folder import RunFolder

IDENTITY = {"model": {"steps": 10, "methods": ["a", "b"]}, "data": {"limit": 5}}


def folder(path, identity=IDENTITY):
    return RunFolder(path, identity, ["a", "b"])


def record(index, method, text="x"):
    return {"index": index, "method": method, "prediction": text}


@pytest.fixture
def run(tmp_path):
    run = folder(tmp_path / "run")
    run.open("model: {}\n")
    run.append([record(0, "a"), record(0, "b")])
    run.append([record(1, "a"), record(1, "b", "ünïcode\u2028line")])
    run.close()
    return run


def reopened(run):
    again = folder(run.path)
    again.open("model: {}\n")
    again.close()
    return again.records()


def test_records_come_back(run):
    assert [(r["index"], r["method"]) for r in reopened(run)] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert reopened(run)[3]["prediction"] == "ünïcode\u2028line"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_written_sample_is_dropped_and_the_rest_kept(run, cut):
    content = run.predictions_path.read_bytes()
    run.predictions_path.write_bytes(content[:-cut])
    records = reopened(run)
    assert [(r["index"], r["method"]) for r in records] == [(0, "a"), (0, "b")]
    again = folder(run.path)
    again.open("")
    again.append([record(1, "a"), record(1, "b")])
    again.close()
    assert len(reopened(run)) == 4


def test_damaged_line_in_the_middle_is_named(run):
    lines = run.predictions_path.read_text().split("\n")
    lines[1] = "{garbage"
    run.predictions_path.write_text("\n".join(lines))
    with pytest.raises(FastMemError, match=r"predictions\.jsonl, line 2: not a record"):
        reopened(run)


def test_other_settings_are_refused_by_name(run):
    other = {"model": {"steps": 20, "methods": ["a", "b"]}, "data": {"limit": 5}}
    with pytest.raises(
        FastMemError, match=r"holds results of other settings \(model\.steps: there 10, here 20\)"
    ):
        folder(run.path, other).check()


def test_another_file_and_no_limit_are_told_in_words(tmp_path):
    first = {"model": {"methods": ["a"]}, "data": {"file_hash": "1" * 16, "limit": None}}
    opened = folder(tmp_path, first)
    opened.open("")
    opened.close()
    other = {**first, "data": {"file_hash": "2" * 16, "limit": 3}}
    with pytest.raises(FastMemError) as refused:
        folder(tmp_path, other).check()
    message = str(refused.value)
    assert "data.path: another file, or its content has changed" in message
    assert "data.limit: there all, here 3; it may be raised" in message
    assert "1111" not in message


@pytest.mark.parametrize(("limit", "fits"), [(5, True), (9, True), (None, True), (3, False)])
def test_limit_may_grow(run, limit, fits):
    wanted = folder(run.path, {**IDENTITY, "data": {"limit": limit}})
    if fits:
        wanted.check()
    else:
        with pytest.raises(FastMemError, match=r"data\.limit: there 5, here 3"):
            wanted.check()


def test_two_processes_do_not_write_to_one_folder(run):
    first, second = folder(run.path), folder(run.path)
    first.open("")
    with pytest.raises(FastMemError, match="another process is writing"):
        second.open("")
    first.close()
    second.open("")
    second.close()


def contents(path):
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def open_alone(run):
    run.open("")


@pytest.mark.parametrize("start", [RunFolder.check, open_alone])
@pytest.mark.parametrize(
    "name",
    ["predictions.jsonl", "work/thesis.tex", "parts/a.jsonl", "logs/metrics.csv", "best.yaml", "search.md"],
)
def test_a_folder_of_the_users_own_is_not_touched(tmp_path, name, start):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(FastMemError, match=r"holds \w+.* but no run\.json, so it is not from fastmem; give "):
        start(folder(tmp_path))
    assert contents(tmp_path) == {name: "mine\n"}


def test_a_run_json_of_another_program_is_not_touched(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(FastMemError, match=r"run\.json is damaged or not from fastmem; give another"):
        folder(tmp_path).open("")
    assert (tmp_path / "run.json").read_text() == "[]"


def test_what_a_run_left_that_was_killed_at_its_start_is_no_obstacle(tmp_path):
    for name in (".lock", ".fastmem-12-0123abcd.partial"):
        (tmp_path / name).touch()
    open_alone(folder(tmp_path))
    assert (tmp_path / "run.json").is_file()


def test_files_in_a_run_folder_that_the_run_has_not_made_stay(run):
    (run.path / "parts").mkdir()
    for name in ("mine.jsonl", "parts/mine.jsonl"):
        (run.path / name).write_text("mine")
    again = folder(run.path)
    again.open("")
    again.merge_parts()
    again.close()
    assert len(again.records()) == 4
    assert contents(run.path / "parts") == {"mine.jsonl": "mine"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(FastMemError, match="is a file; give a folder"):
        folder(tmp_path / "f").check()


def test_full_disk_keeps_what_was_there(run, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    run.open("")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FastMemError, match=r"No space left on device; what was answered before stays"):
        run.append([record(2, "a"), record(2, "b")])
    monkeypatch.undo()
    run.close()
    assert {r["index"] for r in reopened(run)} >= {0, 1}


def test_sorting_brings_back_the_order_of_the_data(run):
    in_order = run.predictions_path.read_bytes()
    lines = in_order.splitlines(keepends=True)
    run.predictions_path.write_bytes(b"".join(lines[2:] + lines[:2]))
    run.merge_parts()
    assert run.predictions_path.read_bytes() == in_order


def test_metrics_are_replaced_whole(run):
    run.write_metrics({"a": 1})
    run.write_metrics({"a": 2})
    assert json.loads(run.metrics_path.read_text()) == {"a": 2}
    assert not list(run.path.glob("*.partial"))
