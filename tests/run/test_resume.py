"""A run folder goes on where it was left, whatever was cut off, and takes no other run's results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import save_model
from runs import METHODS, NQ, answers, files, run_until_killed, write

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_command_does_nothing_twice(small_run) -> None:
    before = files(small_run())["predictions.jsonl"]
    assert files(small_run())["predictions.jsonl"] == before
    fitted = files(small_run(command="fit", run_dir="fitted") / "memories")
    assert files(small_run(command="fit", run_dir="fitted") / "memories") == fitted


def test_a_folder_of_other_settings_is_refused(small_run, refused_small) -> None:
    small = ["--model.methods", "[zero-shot,fastmem]", "--data.limit", 2]
    small_run(*small)
    for option, value in (
        ("model.memorize.steps", 4),
        ("model.memorize.learning_rate", 0.02),
        ("model.memorize.kl_coeff", 0.2),
        ("model.memorize.num_layers", 2),
        ("model.memorize.optimizer_state", "float32"),
        ("model.methods", "[zero-shot]"),
        ("model.decode.max_new_tokens", 7),
        ("data.limit", 1),
        ("data.answer_prefix", "It is"),
        ("data.task", "nq"),
        ("trainer.precision", "bf16-true"),
    ):
        line = refused_small(*small, f"--{option}", value)
        assert "run_dir: run holds results of other settings" in line
        assert f"{option}: there " in line


def test_a_folder_of_other_data_is_refused(small_run, refused_small, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.json", NQ[:2])
    small_run("--data.path", data)
    write(data, NQ[1:3])
    assert "data.path: another file, or its content has changed" in refused_small("--data.path", data)


def test_a_folder_of_other_weights_is_refused(small_run, refused_small, tmp_path: Path) -> None:
    options = ["--model.backbone", save_model(tmp_path / "model", seed=0)]
    predictions = small_run(*options) / "predictions.jsonl"
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:6]))
    save_model(tmp_path / "model", seed=1)
    assert "model.fingerprint: there " in refused_small(*options)


def test_memories_that_do_not_fit_are_refused(small_run, refused_small, tmp_path: Path) -> None:
    memories = small_run("--data.limit", 3, command="fit", run_dir="fitted") / "memories"
    for options, message in (
        (["--model.backbone", save_model(tmp_path / "other", seed=1)], "memories"),
        (["--data.task", "nq"], "is of another context than sample 0's"),
        (["--data.limit", 5], f"no memory of sample 3 in {memories}; run fastmem fit on this data first"),
        (
            ["--model.memorize.learning_rate", 0.5],
            f"model.memorize.learning_rate: 0.5, but the memories in {memories} were made with 0.01; give "
            "--model.memorize.learning_rate 0.01",
        ),
        (["--model.memories", tmp_path], f"model.memories: no memories in {tmp_path}"),
    ):
        given = ["--data.limit", 3, "--model.memories", memories, *options]
        assert message in refused_small(*given, command="predict")


LETTER = re.compile(b"[\xc2-\xff]")  # the first byte of one that is not ASCII
CUTS = {
    "in a line": lambda content: content[: len(content) * 2 // 3],
    "in a character": lambda content: content[: LETTER.search(content, len(content) // 2).end()],
    "before the last newline": lambda content: b"".join(content.splitlines(keepends=True)[:7])[:-1],
    "between methods of a sample": lambda content: b"".join(content.splitlines(keepends=True)[:8]),
    "to nothing": lambda content: b"",
}


def whole_samples(content: bytes) -> list[bytes]:
    """Records of the samples that every method has answered."""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return lines[: len(lines) - len(lines) % len(METHODS)]


@pytest.mark.parametrize("cut", CUTS)
def test_a_half_written_file_is_repaired(small_run, base: Path, cut: str) -> None:
    predictions = small_run() / "predictions.jsonl"
    kept = CUTS[cut](predictions.read_bytes())
    predictions.write_bytes(kept)
    (predictions.parent / "metrics.json").unlink()
    assert answers(small_run()) == answers(base)
    assert predictions.read_bytes().startswith(b"".join(whole_samples(kept))), "a whole sample was made again"
    assert (predictions.parent / "metrics.json").exists()


def test_a_killed_run_goes_on(small_run, small: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "many.jsonl", NQ * 4)
    options = ["--data.path", str(data)]
    options += ["--model.decode.max_new_tokens", "24", "--model.memorize.steps", "15"]
    run_until_killed(2, ["fit-predict", *small, "--run_dir", "run", *options])
    predictions = tmp_path / "run" / "predictions.jsonl"
    written = predictions.read_bytes()
    assert 0 < written.count(b"\n") < 20 * len(METHODS)
    folder = small_run(*options)
    assert set(answers(folder)) == {(i, m) for i in range(20) for m in METHODS}
    assert set(whole_samples(written)) <= set(predictions.read_bytes().splitlines(keepends=True))
    assert answers(folder) == answers(small_run(*options, run_dir="whole"))
