"""Files of records: repair, merging those of several processes, and what a full disk leaves."""

import codecs
import errno
import json
import os

import pytest
from runs import answered as record

from fastmem_pl import FastMemError
from fastmem_pl.base.errors import RunStoppedError
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.records import append_records, as_line, merge_records, read_records, rescued


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path):
    run = RunFolder(path, {"model": {}}, ["a"])
    run.open("")
    return run


def indices(path):
    """Of the records, in the order of the file."""
    return [record["index"] for _, record in read_records(path)]


def write(path, *records, end=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(map(as_line, records)) + end)
    return path


ABSENT = object()
ENDS = "a\rb\r\nc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i"


@pytest.mark.parametrize("text", [ENDS, "half of a character: \ud83d", "\\ud83d"])
def test_any_text_comes_back(tmp_path, text):
    first = record(0, text=text)
    path = write(tmp_path / "1", record(1))
    append_records(path, [first], "1", path)
    assert [r for _, r in read_records(path)] == [record(1), first]
    run = opened(tmp_path / "run")
    run.append([record(1), first])
    run.merge_parts()
    assert run.records() == [first, record(1)]
    assert indices(run.predictions_path) == [0, 1], "not in the order of the data"
    run.replace(run.records()[:1])
    assert run.records() == [first]
    run.close()


def test_a_line_ends_at_its_newline_only(tmp_path):
    # Between the parts of a record, JSON takes a carriage return for a space.
    first, second = (json.dumps(record(i), separators=(",\r", ":")).encode() for i in range(2))
    (tmp_path / "1").write_bytes(first + b"\r\n" + second + b"\n")
    assert indices(tmp_path / "1") == [0, 1]


def test_files_are_merged_in_the_order_of_the_data_and_the_first_of_two_answers_counts(tmp_path):
    one = write(tmp_path / "1", record(4, "b"), record(4, "a"), record(0, "a"), record(0, "b", text="x"))
    two = write(tmp_path / "2", record(3, "a"), record(3, "b"), record(0, "b", text="y"))
    merged = [record for _, record in merge_records([one, two], ["a", "b"])]
    expected = [(0, "a"), (0, "b"), (3, "a"), (3, "b"), (4, "a"), (4, "b")]
    assert [(r["index"], r["method"]) for r in merged] == expected
    assert merged[1]["text"] == "x"


def test_records_of_different_points_are_different(tmp_path):
    path = write(tmp_path / "1", record(0, point={"steps": 1}), record(0, point={"steps": 2}), record(0))
    assert len(merge_records([path, path], [])) == 3


def test_a_sample_may_be_answered_in_parts_by_two_processes(tmp_path):
    one, two = write(tmp_path / "1", record(0, "a"), record(1, "a")), write(tmp_path / "2", record(0, "b"))
    assert {r["index"] for _, r in merge_records([one, two], ["a", "b"])} == {0}


@pytest.mark.parametrize("end", ['{"index": 1, "meth', '{"index": 1, "method": "a"}', "[1]", "\xff"])
def test_a_half_written_last_line_is_left_out(tmp_path, end):
    assert indices(write(tmp_path / "1", record(0), end=end)) == [0]


def test_a_damaged_line_is_named(tmp_path):
    path = write(tmp_path / "1", record(0), end="nonsense\n" + as_line(record(1)))
    with pytest.raises(FastMemError, match=r"1, line 2: not a record"):
        read_records(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: ABSENT}, f"object missing required field {name}")
            for name in ("scores", "prediction", "references")
        ),
        ({"scores": {"accuracy": "1"}}, r"scores\[...\]: expected float, found text"),
        ({"scores": None}, "scores: expected a mapping, found nothing"),
        ({"scores": {"accuracy": 1e999}}, "a number of it is not finite"),
        ({"references": 3}, "references: expected a list, found int"),
        ({"index": "0"}, "index: expected int, found text"),
        ({"index": -1}, "index: expected int >= 0"),
        ({"seconds": {"memorize": 1.0}}, "seconds: object missing required field decode"),
        ({"curve": {"cross_entropy": [1.0], "kl": [None]}}, "its curve has gaps"),
    ],
)
def test_a_record_that_no_run_writes_is_named(tmp_path, change, message):
    changed = {name: value for name, value in {**record(0), **change}.items() if value is not ABSENT}
    (tmp_path / "1").write_text(as_line(record(1)) + json.dumps(changed) + "\n")
    with pytest.raises(FastMemError, match=rf"1, line 2: not a record: {message}; remove the line"):
        read_records(tmp_path / "1")


def test_deep_records_are_named_and_a_mark_at_the_beginning_is_no_fault(tmp_path):
    path = write(tmp_path / "1", record(0))
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert indices(path) == [0]
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(FastMemError, match="line 1: not a record: not valid JSON"):
        read_records(path)


def test_a_line_cut_off_by_a_full_disk_is_removed_and_the_batch_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "run" / "p.jsonl", record(0))
    before, fsync = path.read_bytes(), os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}") == str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunStoppedError) as error:
        append_records(path, [record(1), record(1, "b")], "r1", path)
    assert path.read_bytes() == before
    (kept,) = rescued("r1")
    assert str(kept) in str(error.value)
    assert "No space left on device" in str(error.value)
    assert indices(kept) == [1, 1]
    assert error.value.exit_status == 75
    assert rescued("r2") == []


def test_without_any_room_the_loss_is_stated(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(RunStoppedError, match="the batch in work is lost"):
        append_records(tmp_path / "p.jsonl", [record(1)], "r", tmp_path / "gone")
    assert not (tmp_path / "p.jsonl").exists()


def test_what_was_rescued_comes_back_when_the_run_goes_on(tmp_path):
    run = opened(tmp_path / "run")
    run.append([record(0)])
    hidden = (tmp_path / "run").rename(tmp_path / "hidden")
    with pytest.raises(RunStoppedError, match=r"predictions\.jsonl: No such file or directory; .* kept in"):
        run.append([record(1)])
    run.close()
    # Nothing was made in the place of a folder that is not there.
    assert not (tmp_path / "run").exists()
    hidden.rename(tmp_path / "run")
    again = opened(tmp_path / "run")
    assert [r["index"] for r in again.records()] == indices(again.predictions_path) == [0, 1]
    again.close()
    # Another run that takes the folder's name has nothing to do with it.
    other = opened(tmp_path / "other")
    assert other.records() == []
    other.close()


@pytest.fixture
def joined(tmp_path):
    """The first of two processes in a folder, and the other one."""
    first, second = opened(tmp_path / "run"), RunFolder(tmp_path / "run", {"model": {}}, ["a"])
    second.join(1, first.id)
    yield first, second
    first.close()


def test_parts_are_merged_and_removed(joined, tmp_path):
    first, second = joined
    first.append([record(2)])
    second.append([record(1), record(3)])
    assert [r["index"] for r in first.records()] == [1, 2, 3]
    assert first.count_lines() == 3
    first.merge_parts()
    assert not (tmp_path / "run" / "parts").exists()
    assert first.count_lines() >= 3


def test_a_killed_merge_repeats_nothing(joined, tmp_path, monkeypatch):
    first, second = joined
    second.append([record(0)])
    with monkeypatch.context() as patch:
        # Killed after the merged file is in its place, before the parts are gone.
        patch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first.merge_parts()
    assert list((tmp_path / "run" / "parts").iterdir())
    first.merge_parts()
    assert [r["index"] for r in first.records()] == indices(first.predictions_path) == [0]
