"""Functions as commands: options, flags, lists and words as users write them; help that states the truth."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import pytest

from fastmem_pl import FastMemError
from fastmem_pl.backbone.quantization import KINDS
from fastmem_pl.backbone.settings import WEIGHT_DTYPE
from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.cli import COMMANDS, main
from fastmem_pl.cli.export import export
from fastmem_pl.cli.memorize import memorize
from fastmem_pl.cli.model import ModelOptions
from fastmem_pl.cli.parser import CommandParser
from fastmem_pl.decoding import DECODERS
from fastmem_pl.memory import POLICIES
from fastmem_pl.memory.files import FORMS

CALLS = []


@dataclass(frozen=True)
class More:
    """More."""

    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.top_p > 1:
            raise FastMemError("model.decode.top_p: too much")


def asked(memory: str, question: list[str], *, json: bool = False, more: More = More()):
    """Ask."""
    CALLS.append((memory, question, list(more.stop), json, more.top_p))


def shipped(
    memory: str,
    *,
    max_kl: float | None = None,
    context: list[str] = [],  # noqa: B006
    form: Literal["a", "b"] = "a",
):
    """Ship."""
    CALLS.append((memory, max_kl, context, form))


def call(function, *arguments):
    CALLS.clear()
    assert CommandParser("x", function).run(list(arguments)) == 0
    return CALLS.pop()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m"], ("m", [], [], False, 1.0)),
        (["m", "a b?", "[x, y]", "1e3"], ("m", ["a b?", "[x, y]", "1e3"], [], False, 1.0)),
        (["--json", "m", "--top-p", "0.5", "q"], ("m", ["q"], [], True, 0.5)),
        (["m", "--top_p=.5", "q", "--json=false"], ("m", ["q"], [], False, 0.5)),
        (["m", "--stop", "- ", "q", "--stop=[a, b]", "r"], ("m", ["q", "r"], ["- ", "[a, b]"], False, 1.0)),
        (["m", "--", "--json", "null"], ("m", ["--json", "null"], [], False, 1.0)),
        (["-", "-1"], ("-", ["-1"], [], False, 1.0)),
    ],
)
def test_words_and_options_stand_in_any_order(arguments, expected):
    assert call(asked, *arguments) == expected


def test_a_list_option_is_repeated():
    given = ("--context", "a", "m", "--context=b", "--max-kl", "1e-2")
    assert call(shipped, *given) == ("m", 0.01, ["a", "b"], "a")


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (asked, [], "give a MEMORY; see fastmem x --help"),
        (shipped, ["m", "n"], "unrecognized arguments: n"),
        (shipped, ["m", "--max_kll", "1"], "unrecognized arguments: --max_kll; did you mean --max-kl"),
        (shipped, ["m", "--max-kl"], "--max-kl: give a value"),
        (shipped, ["m", "--max-kl", "--form"], "--max-kl: give a value"),
        (shipped, ["m", "--max-kl", "much"], "max_kl: 'much' does not fit; allowed: float, null"),
        (shipped, ["m", "--form", "c"], "form: 'c' does not fit; allowed: 'a', 'b'"),
        (asked, ["m", "--top-p", "2"], "^top_p: too much"),
    ],
)
def test_mistakes(function, arguments, message):
    with pytest.raises(FastMemError, match=message):
        call(function, *arguments)


WORDS = {
    "ask": list(DECODERS),
    "memorize": [f"\n  {policy} " for policy in POLICIES],
    "report": ["runs/", "--out", "--data", "--title"],
    "compare": ["runs/"],
    "env": ["--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fastmem {command} ")
    assert max(map(len, out.splitlines())) <= 120
    if command in ("fit-predict", "search"):
        others = ("model.methods", "data.task", "run_dir")
        assert out.index("\n  --trainer.devices") > max(out.index(f"\n  --{name}") for name in others)
        # What people set comes within a screen or two, and what Lightning has for all programs is one line.
        assert out[: out.index("\n  --model.methods")].count("\n") < 70
        assert "--trainer.max_epochs" not in out
        assert re.search(rf"\d+ more options .*: fastmem {command} --help\s+lightning\n$", out)
    assert [word for word in WORDS.get(command, ()) if word not in out] == []


def test_help_of_lightning(capsys):
    assert main(["fit-predict", "--help", "lightning"]) == 0
    out = capsys.readouterr().out
    assert "--trainer.max_epochs" in out
    assert "more options are" not in out


def test_help_is_a_command_too(capsys):
    assert main(["help"]) == 0
    overview = capsys.readouterr().out
    assert main(["--help"]) == main([]) == 0
    assert capsys.readouterr().out == 2 * overview
    assert all(f"\n  {command} " in overview for command in COMMANDS)
    assert all(name in overview for name in packaged_configs())


def test_lists_are_the_librarys():
    hints = get_type_hints(ModelOptions)
    assert get_args(get_args(hints["precision"])[0]) == tuple(WEIGHT_DTYPE)
    assert sorted(get_args(get_args(hints["quantization"])[0])) == sorted(KINDS)
    assert get_args(get_args(get_type_hints(export)["form"])[0]) == FORMS
    assert set(get_args(get_type_hints(memorize)["form"])) < set(FORMS)


@pytest.mark.parametrize("command", ["", "report", "compare", "tasks", "env"])
def test_help_waits_for_no_torch(command):
    code = (
        "import sys; from fastmem_pl.cli import main; assert main([*sys.argv[1:], '--help']) == 0; "
        "assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
