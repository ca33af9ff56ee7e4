"""A run folder goes on where it was left, whatever was cut off, and takes no other run's results."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import save_model
from runs import FASTMEM, METHODS, NQ, answers, files, write
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_command_does_nothing_twice(small_run) -> None:
    before = files(small_run())["predictions.jsonl"]
    assert files(small_run())["predictions.jsonl"] == before
    fitted = files(small_run(command="fit", run_dir="fitted") / "memories")
    assert files(small_run(command="fit", run_dir="fitted") / "memories") == fitted


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.memorize.steps", "4"),
        ("model.memorize.learning_rate", "0.02"),
        ("model.memorize.kl_coeff", "0.2"),
        ("model.memorize.num_layers", "2"),
        ("model.methods", "[zero-shot]"),
        ("model.decode.max_new_tokens", "7"),
        ("data.limit", "1"),
        ("data.answer_prefix", "It is"),
        ("data.task", "nq"),
        ("trainer.precision", "bf16-true"),
    ],
)
def test_a_folder_of_other_settings_is_refused(small_run, refused_small, option: str, value: str) -> None:
    small_run("--model.methods", "[zero-shot,fastmem]", "--data.limit", "2")
    line = refused_small("--model.methods", "[zero-shot,fastmem]", "--data.limit", "2", f"--{option}", value)
    assert option in line
    assert "run" in line


def test_a_folder_of_other_data_is_refused(small_run, refused_small, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.json", NQ[:2])
    small_run("--data.path", data)
    write(data, NQ[1:3])
    assert "data" in refused_small("--data.path", data)


def test_a_folder_of_other_weights_is_refused(small_run, refused_small, tmp_path: Path) -> None:
    options = ["--model.backbone", save_model(tmp_path / "model", seed=0)]
    predictions = small_run(*options) / "predictions.jsonl"
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:6]))
    save_model(tmp_path / "model", seed=1)
    assert "model" in refused_small(*options)


def test_a_config_of_the_users_own_is_not_overwritten(small_run, refused_small, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1\n")
    assert "run_dir" in refused_small()


@pytest.mark.parametrize("change", ["model", "context", "more samples"])
def test_memories_that_do_not_fit_are_refused(small_run, refused_small, tmp_path: Path, change: str) -> None:
    options = {
        "model": ["--model.backbone", save_model(tmp_path / "other", seed=1)],
        "context": ["--data.task", "nq"],
        "more samples": ["--data.limit", "5"],
    }[change]
    memories = small_run("--data.limit", "3", command="fit", run_dir="fitted") / "memories"
    line = refused_small("--data.limit", "3", "--model.memories", memories, *options, command="predict")
    assert "memories" in line


def test_fit_makes_a_damaged_memory_again(small_run) -> None:
    memory = min((small_run(command="fit") / "memories").rglob("*.safetensors"))
    whole = memory.read_bytes()
    expected = {name: tensor.clone() for name, tensor in load_file(memory).items()}  # not mapped
    memory.write_bytes(whole[: len(whole) // 2])
    small_run(command="fit")
    # Made again in a batch of its own: equal up to rounding, not to the byte.
    for name, tensor in load_file(memory).items():
        assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm()


def cut_in_a_line(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def cut_in_a_character(content: bytes) -> bytes:
    return content[: next(i for i in range(len(content) // 2, len(content)) if content[i] >= 0xC2) + 1]


def cut_before_the_last_newline(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:7])[:-1]


def cut_between_methods_of_a_sample(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:8])


def cut_to_nothing(_: bytes) -> bytes:
    return b""


def whole_samples(content: bytes) -> list[bytes]:
    """Records of the samples that every method has answered."""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return lines[: len(lines) - len(lines) % len(METHODS)]


@pytest.mark.parametrize(
    "cut",
    [
        cut_in_a_line,
        cut_in_a_character,
        cut_before_the_last_newline,
        cut_between_methods_of_a_sample,
        cut_to_nothing,
    ],
)
def test_a_half_written_file_is_repaired(small_run, base: Path, cut) -> None:
    predictions = small_run() / "predictions.jsonl"
    kept = cut(predictions.read_bytes())
    predictions.write_bytes(kept)
    (predictions.parent / "metrics.json").unlink()
    assert answers(small_run()) == answers(base)
    assert predictions.read_bytes().startswith(b"".join(whole_samples(kept))), "a whole sample was made again"
    assert (predictions.parent / "metrics.json").exists()


def test_a_killed_run_goes_on(small_run, small: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "many.jsonl", NQ * 4)
    options = [
        "--data.path",
        str(data),
        "--model.decode.max_new_tokens",
        "24",
        "--model.memorize.steps",
        "15",
    ]
    command = [FASTMEM, "fit-predict", *small, "--run_dir", "run", *options]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    predictions, deadline = tmp_path / "run" / "predictions.jsonl", time.monotonic() + 60
    while not predictions.exists() or predictions.read_bytes().count(b"\n") < 7:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = predictions.read_bytes()
    assert written.count(b"\n") < 20 * len(METHODS)
    folder = small_run(*options)
    assert set(answers(folder)) == {(i, m) for i in range(20) for m in METHODS}
    assert set(whole_samples(written)) <= set(predictions.read_bytes().splitlines(keepends=True))
    assert answers(folder) == answers(small_run(*options, run_dir="whole"))
