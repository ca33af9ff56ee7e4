"""Reference page of the command line, from the parsers that the commands use."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterable
from typing import Any

from jsonargparse._actions import _ActionConfigLoad
from reference_files import table
from reference_python import markdown, parameters

_SECTIONS = (
    ("run", "The run", "Where results go, and what settings there are."),
    (
        "model",
        "model: the language model, memorizing, methods, decoding",
        "`--model.backbone NAME` is short for `--model.backbone.source NAME`.",
    ),
    ("data", "data: the samples", None),
    ("trainer", "trainer: devices, precision, loggers", None),
    ("search", "search: only of fastmem search", None),
)
_NOT_SHOWN = {"help", "trainer", "model", "data", "search"}


def page() -> str:
    """The whole page."""
    lightning = lightning_parsers()
    commands = memory_parsers()
    parts = [
        # An option is looked for more often than a page that mentions it.
        "---\nsearch: {boost: 3}\n---",
        "# Commands and options",
        "Made from the commands' own parsers. `fastmem COMMAND --help` prints the same.",
        f"```text\n{_overview()}\n```",
        "## fit-predict, fit, predict, search { #lightning-commands }",
        "These four take the same options (`search` further ones). All may stand in a config as well: "
        "`--model.memorize.steps 20` is `model: {memorize: {steps: 20}}`. Lists and mappings are quoted in "
        "the shell (`'[zero-shot, fastmem]'`); an option of a list with `+` at its end adds to the list.",
        table(
            ["command", "what it does"],
            [[f"`fastmem {name}`", _purpose(name)] for name in lightning],
        ),
    ]
    parts += _lightning_sections(lightning)
    for name, parser in commands.items():
        parts += _argparse_section(name, parser)
    return "\n\n".join(parts) + "\n"


class _CapturedError(Exception):
    """Carries the parsers out of the CLI."""


def lightning_parsers() -> dict[str, Any]:
    """The parsers of the Lightning commands, by command, without running any."""
    from fastmem_pl.cli import SAMPLE_COMMANDS, lightning

    class Capture(lightning.FastMemCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _CapturedError(self._subcommand_parsers)

    found = {}
    original, lightning.FastMemCLI = lightning.FastMemCLI, Capture
    try:
        for command in SAMPLE_COMMANDS:
            try:
                lightning.run([command, "--help"])
            except _CapturedError as captured:
                found |= captured.args[0]
    finally:
        lightning.FastMemCLI = original
    return found


def memory_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the other commands, by command."""
    from fastmem_pl.cli import COMMANDS, SAMPLE_COMMANDS
    from fastmem_pl.cli.parser import CommandParser

    found = {}
    for command in COMMANDS.keys() - SAMPLE_COMMANDS.keys():
        module, _, function = COMMANDS[command].partition(":")
        module = importlib.import_module(f"fastmem_pl.cli.{module}")
        found[command] = CommandParser(command, getattr(module, function))
    return dict(sorted(found.items()))


def shown(parser: Any) -> list[Any]:
    """The actions that the page shows: no help, no loading of a group from a file."""
    return [
        action
        for action in parser._actions
        if action.option_strings
        and action.dest not in _NOT_SHOWN
        and not action.dest.endswith(".help")
        and not isinstance(action, _ActionConfigLoad)
    ]


def _overview() -> str:
    # A process of its own: the overview must answer without the heavy imports that happened here.
    done = subprocess.run(
        [sys.executable, "-m", "fastmem_pl", "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout.rstrip()


def _purpose(command: str) -> str:
    from fastmem_pl.search import SearchTrainer

    name = {"fit-predict": "fit_predict", "search": "search_settings"}.get(command, command)
    return (inspect.getdoc(getattr(SearchTrainer, name)) or "").splitlines()[0]


def _lightning_sections(parsers: dict[str, Any]) -> list[str]:
    actions: dict[str, Any] = {}
    for parser in parsers.values():
        for action in shown(parser):
            actions.setdefault(action.dest, action)
    from fastmem_pl.cli.lightning import own_trainer_options

    own = own_trainer_options()
    parts = []
    for prefix, title, text in _SECTIONS:
        # A dest without a dot belongs to the run.
        chosen = [
            a for dest, a in actions.items() if (dest.partition(".")[0] if "." in dest else "run") == prefix
        ]
        mine = [a for a in chosen if prefix != "trainer" or a.dest in own]
        parts.append(f"### {title} {{ #options-{prefix} }}")
        if text:
            parts.append(text)
        for action in mine:
            parts.append(_option(action))
            parts += _nested(action)
        inherited = [a for a in chosen if a not in mine]
        if inherited:
            parts.append(_inherited(inherited))
    return parts


def _option(action: Any, anchor: str | None = None) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings if not name.endswith("+"))
    facts = " · ".join(_facts(action))
    text = _one_line(action.help)
    head = f"##### {names} {{ #{anchor or action.dest} .option }}"
    return "\n\n".join(part for part in (head, f"{facts}\n{{ .facts }}" if facts else "", text) if part)


def _facts(action: Any) -> Iterable[str]:
    """Type, choices and default of an option."""
    kind = getattr(action, "_typehint", None) or action.type
    if action.choices:
        yield " or ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0:
        yield "switch"
    elif kind is not None:
        yield f"`{readable_type(kind)}`"
    elif action.metavar:
        # jsonargparse glues a metavar to its option with a control character.
        yield f"`{''.join(c for c in action.metavar if c.isprintable())}`"
    if getattr(action, "required", False):
        yield "required"
    elif (
        "default:" not in (action.help or "")
        and action.default not in (None, argparse.SUPPRESS)
        and action.nargs != 0
    ):
        yield f"default `{readable_value(action.default)}`"


def readable_type(kind: Any) -> str:
    """A type as the help of the commands writes it: ``str | null``, ``32-true | bf16-true``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if kind is type(None):
        return "null"
    if origin is not None and str(origin) not in (
        "typing.Union",
        "<class 'types.UnionType'>",
        "<class 'typing.Union'>",
    ):
        # A config has lists only.
        name = "list" if origin is tuple else getattr(origin, "__name__", origin)
        inner = ", ".join(readable_type(a) for a in arguments if a is not ...)
        return f"{name}[{inner}]"
    if arguments:
        return " | ".join(readable_type(argument) for argument in arguments)
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def readable_value(value: Any) -> str:
    """A default as a config would hold it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {readable_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(readable_value(v) for v in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _nested(action: Any) -> list[str]:
    """Settings of an option that takes a block of them, such as search.optuna."""
    kinds = [getattr(action, "_typehint", None), *typing.get_args(getattr(action, "_typehint", None))]
    block = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if block is None:
        return []
    texts = parameters(block)
    hints = typing.get_type_hints(block)
    parts = []
    for field in dataclasses.fields(block):
        known = field.default_factory() if field.default is dataclasses.MISSING else field.default
        parts.append(
            f"##### `--{action.dest}.{field.name}` {{ #{action.dest}.{field.name} .option }}\n\n"
            f"`{readable_type(hints[field.name])}` · default `{readable_value(known)}`\n{{ .facts }}\n\n"
            f"{texts.get(field.name, '')}"
        )
    return parts


def _inherited(actions: list[Any]) -> str:
    """Lightning's own trainer options, folded away."""
    rows = []
    for action in actions:
        facts = ", ".join(_facts(action))
        text = re.sub(r"\s*Default: .*$", "", _one_line(action.help)).replace("|", "\\|")
        rows.append([f"`--{action.dest}`", facts, text])
    body = table(["option", "type and default", "what it is"], rows).replace("\n", "\n    ")
    return (
        f'??? note "The other {len(actions)} options are Lightning\'s own"\n\n'
        f"    As in `lightning.Trainer`. Most concern training loops with epochs, which there are none of "
        f"here.\n\n    {body}"
    )


def _argparse_section(name: str, parser: argparse.ArgumentParser) -> list[str]:
    usage = re.sub(r"^usage: ", "", " ".join(parser.format_usage().split()))
    head, _, rest = (parser.description or "").partition("\n")
    parts = [f"## fastmem {name} {{ #{name} }}", markdown(head)]
    parts.append(f"```text\n{usage}\n```")
    if rest.strip():
        parts.append(_description(rest))
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help" and a.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = {"positional arguments": "Arguments", "options": "Options"}.get(group.title, group.title)
        parts.append(
            f"### {title.capitalize()} {{ #{name}-{re.sub('[^a-z]+', '-', title.lower()).strip('-')} }}"
        )
        for action in actions:
            parts.append(
                _option(action, f"{name}.{action.dest}") if action.option_strings else _argument(name, action)
            )
    return parts


def _argument(command: str, action: argparse.Action) -> str:
    shown_as = action.metavar or action.dest
    count = {"+": "one or more", "*": "any number", "?": "optional"}.get(action.nargs, "")
    facts = f"{count}\n{{ .facts }}\n\n" if count else ""
    return f"##### `{shown_as}` {{ #{command}.{action.dest} .option }}\n\n{facts}{_one_line(action.help)}"


def _description(text: str) -> str:
    """Indented lines of a description are commands."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        f"```console\n{re.sub('^  ', '$ ', block, flags=re.M)}\n```"
        if block.startswith("  ")
        else markdown(" ".join(block.split()))
        for block in blocks
    )


def _one_line(text: str | None) -> str:
    line = " ".join((text or "").replace("%%", "%").split())
    return markdown(line[:1].upper() + line[1:])
