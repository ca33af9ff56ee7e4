"""A mistake is one line that names the setting, the value, what is allowed and the nearest match."""

import io
import os
import re
import subprocess
import sys

import pytest
import transformers
from conftest import make_tokenizer, save_model
from runs import FASTMEM, NQ, RECORDS, files, shown, write

from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


# options after those of a small run, and what the line says; ranges of settings stand with the settings' tests
BAD = """
--data.task nqswp | data.task | 'nqswp' | hotpotqa | memotrap | qa | did you mean 'nqswap'
--model.methods [zero-shto] | model.methods | 'zero-shto' | fastmem+cd | did you mean 'zero-shot'
--model.methods [oneshot] | 'oneshot' | fastmem+cad | did you mean 'one-shot'
--model.methods [] | model.methods | zero-shot | fastmem
--model.stesp 3 | --model.stesp | --model.memorize.steps
--model.steps 3 | --model.steps | did you mean --model.memorize.steps
--modle.steps 3 | --modle.steps | --model.memorize.steps
--rundir x | --rundir | --run_dir
--trainer.acceleratr cpu | --trainer.acceleratr | --trainer.accelerator
--trainer.precision bf16-tru | trainer.precision | bf16-tru | 32-true | did you mean 'bf16-true'
--trainer.accelerator cpuu | trainer.accelerator | cpuu | cpu
--trainer.strategy ddpp | trainer.strategy | ddpp
--model.memorize.steps abc | model.memorize.steps | abc | int
--model.memorize.steps -1 | model.memorize.steps | -1 | at least 0
--model.memorize.learning_rate .nan | model.memorize.learning_rate | nan
--model.memorize.num_layers 9 | model.memorize.num_layers | 9 | 3
--model.decode.max_new_tokens 0 | model.decode.max_new_tokens | 0 | at least 1
--model.decode.temperature warm | model.decode.temperature | 'warm' | float
--model.decode.top_k 2.5 | model.decode.top_k | 2.5 | int
--model.decode.dola_layers hihg | model.decode.dola_layers | 'hihg' | auto | low | did you mean 'high'
--model.decode.dola_layers [1,3] --model.methods [dola] | model.decode.dola_layers | 3 is no layer | 0 to 2
--model.decode.dola_layers [-1] --model.methods [dola] | model.decode.dola_layers | -1 | 0 to 2
--model.decode.dola_layers [] --model.methods [dola] | model.decode.dola_layers | empty | auto
--model.decode.stop [''] | model.decode.stop | '' | none empty
--model.decode.stop word | model.decode.stop | 'word'
--model.published_quirks [round-weight] | model.published_quirks | dola-unlimited | did you mean 'round-weights'
--data.batch_size 0 | data.batch_size | 0 | at least 1
--data.batch_size auto | data.batch_size | 'auto' | int
--data.max_batch_tokens 0 | data.max_batch_tokens | 0 | at least 1
--data.max_batch_tokens 2.5 | data.max_batch_tokens | 2.5 | int
--data.max_batch_tokns 5 | data.max_batch_tokens
--model.memorize.optimizer_state flaot32 | model.memorize.optimizer_state | 'flaot32' | auto | did you mean 'float32'
--model.memorize.optimizer_state 32 | model.memorize.optimizer_state | 32 | auto | float32
--model.optimiser_state auto | model.memorize.optimizer_state
--model.auto_batch maybe | model.auto_batch | 'maybe' | bool
--data.limit -1 | data.limit | -1 | at least 1
--data.path nope.json | data.path | nope.json
--model.backbone nope.gguf | model.backbone | nope.gguf
--model.backbone ./nope | model.backbone | nope
--model.memorize.max_context_tokens 8 --model.strict true | max_context_tokens | 25 | 8
--config dmeo | --config | no such file or packaged config: dmeo | smollm2 | did you mean 'demo'
--config base,lama3-8b,xsum | --config | lama3-8b | did you mean 'llama3-8b'
--data.task qa --data.fields {contxt:input} | data.fields | contxt | context
--data.fields {context:input} | data.fields | qa
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_a_bad_option_is_refused_in_one_line(refused_small, case):
    options, *parts = case.split(" | ")
    line = refused_small(*(option.replace(":", ": ") for option in options.split()))
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("command", "options", "parts"),
    [
        ("fit-predcit", [], ("fit-predcit", "did you mean 'fit-predict'")),
        (
            "fit",
            ["--model.memorize.optimizer_state", "flaot32"],
            ("model.memorize.optimizer_state", "'flaot32'"),
        ),
        ("predict", ["--data.max_batch_tokens", "0"], ("data.max_batch_tokens", "at least 1")),
    ],
)
def test_a_bad_command_and_options_of_others_are_refused(refused_small, command, options, parts):
    line = refused_small(*options, command=command)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("mamba", {}),
        ("bert", {"is_decoder": True}),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(refused_small, tmp_path, family, own):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(family, vocab_size=259, **sizes, **own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    line = refused_small("--model.backbone", tmp_path / "model")
    assert "model.backbone" in line
    assert family in line.lower()


def test_a_model_with_damaged_weights_is_refused(refused_small, tmp_path):
    (save_model(tmp_path / "model", seed=0) / "model.safetensors").write_bytes(b"junk")
    assert "model.backbone" in refused_small("--model.backbone", "model")


def test_the_installed_command_says_one_line_too(small, tmp_path):
    command = [FASTMEM, "fit-predict", *small, "--model.memorize.num_layers", "9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"fastmem: error: .*\n", done.stderr)
    assert files(tmp_path) == {}


def test_tasks_lists_all_and_refuses_unknown_names(refused, capsys):
    line = refused("tasks", "xsm")
    assert [part for part in ("'xsm'", "wikihow", "did you mean 'xsum'") if part not in line] == []
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    for task in RECORDS:
        assert re.search(rf"^{task}: ", listed, re.MULTILINE)
        assert {"prompt", "one-shot", "without context (cad)"} <= set(shown(task))
        assert "{context}" not in shown(task)["without context (cad)"]


HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b]52;c;aGk=\x07\u202e"


def test_escapes_in_data_do_not_reach_the_terminal(small_run, tmp_path, capsys):
    facts = [{**record, "input": f"{record['input']}{HOSTILE}", "sub_answer": f"x{HOSTILE}"} for record in NQ]
    small_run("--data.path", write(tmp_path / "hostile.json", facts))
    shown = capsys.readouterr().out
    assert "samples where the methods differ" in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_escapes_in_a_key_do_not_reach_the_terminal(refused_small, tmp_path):
    line = refused_small("--data.path", write(tmp_path / "hostile.json", [{HOSTILE: 1}]))
    assert line.strip().isprintable()


def test_any_other_error_is_one_line_with_its_traceback_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(names: list[str]) -> None:
        raise LookupError("never\nseen")

    monkeypatch.setattr("fastmem_pl.cli.tasks.tasks", fail)
    assert main(["tasks"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (kept,) = tmp_path.glob("fastmem-*.txt")
    assert line.startswith("fastmem: error: LookupError: never seen; ")
    assert str(kept) in line
    assert "in fail\n" in kept.read_text()
    assert main(["tasks", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_shows_its_traceback_when_asked(capsys):
    assert main(["tasks", "xsm", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_refused(refused):
    assert r"'caf\udce9' is not UTF-8 text" in refused("ask", "m.fastmem", "caf\udce9")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [
        (">/dev/full", 75, "cannot write to standard output: No space left on device"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing(redirection, status, words):
    command = f"{sys.executable} -m fastmem_pl tasks {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == bool(words)


def test_an_ascii_terminal_gets_the_rest_as_escapes(monkeypatch, capsys):
    def tell(names: list[str]) -> None:
        print("Zoë")

    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("fastmem_pl.cli.tasks.tasks", tell)
    assert main(["tasks"]) == 0
    screen.flush()
    assert screen.buffer.getvalue() == b"Zo\\xeb\n"
