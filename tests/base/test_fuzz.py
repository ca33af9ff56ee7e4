"""Mutated files through the loaders: what they hold is accepted or refused in one line, and nothing is written."""

import contextlib
import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import NQ, answered, write
from safetensors import safe_open

from fastmem_pl import FastMemError, Memory
from fastmem_pl.cli.configs import read_configs
from fastmem_pl.data import read_samples
from fastmem_pl.memory import read_header
from fastmem_pl.memory.files import checked
from fastmem_pl.report.runs import read_profile, read_run
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.records import as_line, read_records

pytestmark = pytest.mark.usefixtures("one_thread")
# Of all kinds together 2,000; the seed of a failure is printed with it (print_blob).
bounded = settings(
    max_examples=200,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
IDENTITY = {"model": {"memorize": {"steps": 3}, "methods": ["a"]}, "data": {"task": "qa"}, "trainer": {}}
ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        10**30,
        1e999,
        float("nan"),
        "",
        "\ud83d",
        "\x1b]0;t\x07",
        "x" * 400,
        [],
        {},
        [[]],
        {"": {}},
    ]
)
VALUES = st.recursive(
    ODD, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one, max_size=3)
)


def places(value, above=()):
    """Paths to all parts of nested values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, part in parts for place in places(part, (*above, key)))]


@st.composite
def structures(draw, value):
    """The value with some of its parts replaced or removed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        if not place:
            value = deepcopy(draw(VALUES))
            continue
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[place[-1]] = deepcopy(draw(VALUES))
        else:
            del inner[place[-1]]
    return value


@st.composite
def mutated(draw, content: bytes):
    """The content with bytes changed, cut out, repeated or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        new = draw(st.one_of(st.binary(max_size=8), st.just(content[start:end] * 3), st.just(b"[" * 3000)))
        content = content[:start] + new + content[end:]
    return content


def contents(value, text=None):
    """Bytes of a file that held the JSON, or the lines, of a value."""
    lines = isinstance(value, list) and text is None
    whole = "".join(map(as_line, value)) if lines else text or json.dumps(value)

    def dump(v):
        return (
            "".join(json.dumps(one) + "\n" for one in v) if lines and isinstance(v, list) else json.dumps(v)
        )

    return mutated(whole.encode()) | structures(value).map(lambda changed: dump(changed).encode())


def survives(load, folder: Path) -> None:
    """Accepted, or refused in one line that can be shown; nothing is written."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with contextlib.suppress(FastMemError):
        load()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


CONFIG = {
    "seed_everything": 3,
    "run_dir": "runs/x",
    "model": {"backbone": {"source": "demo"}, "memorize": {"steps": 3, "learning_rate": 1e-4}, "chat": {}},
    "data": {"task": "qa", "path": "x.json", "fields": {"context": "c"}},
}
YAML = "a: &a [1, 2]\nmodel: {memorize: {steps: 1e-4, kl_coeff: *a}}\ndata:\n  path: |\n    x\n"


@bounded
@given(content=contents(CONFIG) | mutated(YAML.encode()))
def test_configs(tmp_path, content):
    path = put(tmp_path / "mine.yaml", content)
    # What is accepted can be passed on.
    survives(lambda: json.dumps(read_configs([str(path)]).settings), tmp_path)


RECORD = {"id": 3, "context": "c", "question": "q", "answers": ["a"], "task": "qa"}
TRAP = {"task": "memotrap", "prompt": "a: b", "classes": "['x', 'y']", "answer_index": 1}
HOTPOT = {"task": "hotpotqa", "question": "q", "answer": "a", "context": {"sentences": [["One."]]}}


@bounded
@given(content=contents([RECORD, {"task": "nqswap", **NQ[0]}, TRAP, HOTPOT]))
def test_data(tmp_path, content):
    path = put(tmp_path / "data.jsonl", content)
    survives(lambda: read_samples(path, "mixed"), tmp_path)


MANIFEST = {"schema_version": 1, "id": "0123456789abcdef", "identity": IDENTITY}


@bounded
@given(content=contents(MANIFEST))
def test_run_json(tmp_path, content):
    put(tmp_path / "run.json", content)
    survives(RunFolder(tmp_path, IDENTITY, ["a"]).check, tmp_path)


RECORDS = [answered(0, curve={"cross_entropy": [1.0], "kl": [0.0]}, scores={"contained": 1.0}), answered(1)]


@bounded
@given(content=contents(RECORDS))
def test_records(tmp_path, content):
    path = put(tmp_path / "predictions.jsonl", content)
    survives(lambda: read_records(path), tmp_path)


@bounded
@given(content=contents({"groups": {}, "num_samples": 2, "peak_memory_gib": {"decode": 1.0}}))
def test_metrics(tmp_path, content):
    put(tmp_path / "metrics.json", content)
    survives(RunFolder(tmp_path, IDENTITY, ["a"]).metrics, tmp_path)


@bounded
@given(
    name=st.sampled_from(["run.json", "predictions.jsonl", "metrics.json", "config.yaml"]),
    content=contents(MANIFEST) | contents(RECORDS) | mutated(YAML.encode()),
)
def test_reports(tmp_path, name, content):
    put(tmp_path / "run.json", json.dumps(MANIFEST).encode())
    write(tmp_path / "predictions.jsonl", RECORDS)
    for other in ("metrics.json", "config.yaml"):
        (tmp_path / other).unlink(missing_ok=True)
    put(tmp_path / name, content)
    survives(lambda: read_run(tmp_path), tmp_path)


PHASE = {"seconds": 1.0, "calls": 1, "first_seconds": 1.0, "median_seconds": None, "samples": 1, "share": 1.0}
PROFILE = {
    "wall_seconds": 1.0,
    "phases": {"decode": {**PHASE, "peak_memory_gib": 0.1}},
    "batch_sizes": {"1": 1},
}


@bounded
@given(content=contents({**PROFILE, "num_samples": 1, "mode": "fit", "environment": {"processes": 1}}))
def test_profiles(tmp_path, content):
    put(tmp_path / "profile" / "profile.json", content)
    survives(lambda: read_profile(tmp_path), tmp_path)


@settings(bounded, max_examples=400)
@given(data=st.data())
def test_memories(kept, tmp_path, data):
    whole = kept.read_bytes()
    # Most of a file is tensors, and damage to them is found by the digest.
    end = 8 + int.from_bytes(whole[:8], "little")
    path = put(tmp_path / "m.fastmem", data.draw(mutated(whole[:end])) + whole[end:])
    survives(lambda: (read_header(path), Memory.load(path)), tmp_path)
    with safe_open(kept, "pt") as file:
        stated = file.metadata()
    for name in ("settings", "curve", "windows"):
        if name in stated:
            stated[name] = json.dumps(data.draw(structures(json.loads(stated[name]))))
    survives(lambda: checked(stated), tmp_path)


TEMPLATE = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@bounded
@given(content=mutated(TEMPLATE.encode()))
def test_templates(tmp_path, tokenizer, content):
    from fastmem_pl.backbone import ChatEncoder

    tokenizer.chat_template = content.decode("utf-8", "replace")
    survives(lambda: ChatEncoder(tokenizer), tmp_path)


@settings(bounded, max_examples=30)
@given(data=st.data())
def test_model_folders(tiny_folder, tmp_path, data):
    from fastmem_pl import Backbone

    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder, folder)
    path = folder / data.draw(
        st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"])
    )
    put(path, data.draw(contents(json.loads(path.read_bytes()))))
    survives(lambda: Backbone.load(str(folder)), tmp_path)
