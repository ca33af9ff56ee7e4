"""benchmarks/speed.py: what it measures, where, and the roofline that it compares with."""

import contextlib
import csv
import importlib
import io
import re
import runpy
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")

PROVENANCE = ("device", "threads", "torch", "transformers", "lightning", "commit", "date")


def run_speed(*options: object) -> tuple[int, str, str]:
    """Run `speed.py` as a command in the working folder; gives its exit status and what it says."""
    out, err, verbosity = io.StringIO(), io.StringIO(), transformers.utils.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "argv", ["speed.py", *map(str, options)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(BENCHMARKS / "speed.py"), run_name="__main__")
    transformers.utils.logging.set_verbosity(verbosity)
    return ended.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[int, str, str], list[dict], Path]:
    """What `speed.py` says and writes of one row."""
    folder = tmp_path_factory.mktemp("speed")
    options = "--shape tiny --device cpu --rows memorize --repeats 1 --out speed.csv"
    with contextlib.chdir(folder):
        done = run_speed(*options.split())
    path = folder / "speed.csv"
    with path.open(newline="") as file:
        return done, list(csv.DictReader(file)), path


def test_speed_measures_a_row_and_says_where(measured):
    (status, out, err), lines, path = measured
    assert status == 0, err
    assert [p.name for p in path.parent.iterdir()] == ["speed.csv"]
    assert {line["row"] for line in lines} - {"fit-predict"} == {"ceiling", "memorize"}
    assert {(line["shape"], line["precision"]) for line in lines} == {("tiny", "32-true")}
    for line in lines:
        # The published loop memorizes and answers in one.
        assert line["row"] != "fit-predict" or "published loop" in line["what"]
        assert all(line[name] for name in PROVENANCE), line
        assert (line["torch"], line["threads"]) == (torch.__version__, "1")
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", line["commit"])
        age = datetime.now(UTC) - datetime.strptime(line["date"], "%Y-%m-%d %H:%M %Z").replace(tzinfo=UTC)
        assert timedelta() <= age < timedelta(minutes=10)
    keys = [tuple(line[name] for name in ("shape", "precision", "row", "batch", "what")) for line in lines]
    assert len(set(keys)) == len(keys), "not tidy"
    for word in ("memorize", "roofline"):
        assert word in out
    assert "agree" in err, "the published loop was not compared"


def test_speed_gives_ratios_to_the_published_loop_and_the_roofline(measured):
    _, lines, _ = measured
    times = [line for line in lines if line["row"] == "memorize" and line["unit"] == "ms"]
    assert {1, 8} <= {int(line["batch"]) for line in times}
    ours = [line for line in times if line["what"] == "fastmem"]
    assert len(ours) == len({line["batch"] for line in ours}) > 1
    for line in ours:
        median = float(line["median"])
        assert 0 < float(line["low"]) <= median <= float(line["high"])
        assert line["repeats"] == "1"
        assert "published" in line["baseline"]
        assert float(line["ratio"]) == pytest.approx(median / float(line["baseline_value"]), rel=0.02)
        assert float(line["ratio_to_roofline"]) == pytest.approx(median / float(line["roofline"]), rel=0.02)
        assert 0 < float(line["overlapped"]) <= float(line["roofline"])


def test_speed_renders_markdown(measured):
    _, lines, path = measured
    content = path.read_bytes()
    status, out, _ = run_speed("render", path)
    assert status == 0
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"\|( ?:?-+:? ?\|)+", rows[1])
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + sum(line["row"] != "ceiling" for line in lines)
    for word in (lines[0]["device"], lines[0]["commit"], lines[0]["torch"]):
        assert word in out
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--rows", "memorise"), ("'memorise'", "memorize", "decode", "fit-predict")),
        (("--rows", "memorize,nothing"), ("'nothing'",)),
        (("--rows", ""), ("''",)),
        (("--precisions", "16-true"), ("'16-true'", "32-true")),
        (("--shape", "9b"), ("'9b'", "8b", "tiny")),
        (("--repeats", "few"), ("'few'",)),
    ],
)
def test_speed_refuses_what_it_does_not_know(tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_speed("--shape", "tiny", "--device", "cpu", "--out", "speed.csv", *options)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert err.endswith(f"{line}\n")
    assert [part for part in (options[0], *parts) if part not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_the_roofline_of_a_known_model_and_card(monkeypatch):
    """Llama-3-8B on an H100: memorizing near 12 ms a sample, a step at least as long as reading the weights."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed = importlib.import_module("speed")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    counts = speed.Counts(config, torch.bfloat16)
    h100 = speed.Ceilings(2.9e12, 7e14)
    assert 10 < h100.overlapped(counts.memorize(8, 165, 160, 10)) / 8 < 14
    weights = 8.03e9 - 128256 * 4096  # a row of the embedding is read, not all
    one = h100.milliseconds(counts.decode_step(1, 200))
    read = (weights + 3 * 4096 * 14336) * 2 / 2.9e12 * 1000
    assert read <= one < 1.1 * read
    memory = 3 * 4096 * 14336 * 2 / 2.9e12 * 1000
    assert h100.milliseconds(counts.decode_step(16, 200)) > one + 15 * memory * 0.9
    assert h100.milliseconds(counts.decode_step(1, 200, memory=False)) < one
