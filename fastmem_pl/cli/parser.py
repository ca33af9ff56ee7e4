"""Parsers of the commands: jsonargparse with one-line errors, and functions as commands."""

import argparse
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from fastmem_pl.base.errors import FastMemError, nearest

# What may be wrong with a class that was named, or with its arguments, amid what else a setting could be.
_CLASS_MISTAKE = re.compile(
    r"the following arguments are required: [\w, ]*\w(?= - )|Option '\w+' is not accepted"
    r"|module '[\w.]+' has no attribute '\w+'"
)
_WRONG_TYPE = re.compile(
    r'Parser key "([^"]+)": (?:Expected an?|Does not validate against any of the Union subtypes Subtypes:)'
    r" \[?(.+?)(?:\] Errors: .*|\.?) (?:Got|Given) value: (.+)"
)
_UNKNOWN = r"(?i)unrecognized arguments: (\S+)|key '([^']+)' is not expected|not accept option '([^']+)'"


class OneLineParser(ArgumentParser):
    """Reports mistakes in one line, with the nearest name of a setting.

    Attributes:
        allowed: by setting, what a message about a class that does not fit says to be allowed.
    """

    allowed: ClassVar[dict[str, str]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`FastMemError` with the parser's message on one line."""
        line = re.sub(r"\s+", " ", message).strip()
        wrong_type = _WRONG_TYPE.search(line)
        wrong_class = wrong_type and _CLASS_MISTAKE.search(line)
        if wrong_class:
            name = re.search(r"class_path'?[:=] ?'(?:\w+\.)*(\w+)'", line[wrong_class.end() :])
            allowed = self.allowed.get(
                wrong_type[1], "a class is given by class_path and init_args in a config"
            )
            line = f"{wrong_type[1]}: {f'{name[1]}: ' if name else ''}{wrong_class[0]}; {allowed}"
        elif wrong_type:
            setting, kind, value = wrong_type.groups()
            line = f"{setting}: {value!r} does not fit; allowed: {_readable(kind)}"
            if "list" in kind and not value.startswith("["):
                line += f"; quote it in the shell: --{setting} '[{value}]'"
            line += nearest(value, re.findall(r"'([^']+)'", kind))
        raise FastMemError(line + self._suggestion(line)) from ex

    def _suggestion(self, message: str) -> str:
        unknown = re.search(_UNKNOWN, message)
        if not unknown:
            return ""
        name = next(group for group in unknown.groups() if group).split("=")[0].lstrip("-")
        subcommands = self._subcommands_action._name_parser_map.values() if self._subcommands_action else ()
        actions = [action for parser in (self, *subcommands) for action in parser._actions]
        known = sorted({a.option_strings[-1].lstrip("-") for a in actions if a.option_strings})
        *sections, tail = name.split(".")

        def likeness(candidate: str) -> float:
            same_section = candidate.split(".")[0] in sections[:1]
            return SequenceMatcher(None, tail, candidate.rpartition(".")[2]).ratio() + 0.1 * same_section

        best = max(known, key=likeness)
        return f"; did you mean --{best}?" if likeness(best) > 0.7 else f"; see {self.prog} --help"


def _readable(kind: str) -> str:
    """Turn ``<class 'int'>`` and ``typing.Literal['a', 'b']`` into words."""
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.(?:Literal\[(.*?)\])?", lambda m: m.group(1) or "", kind)


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of a description as they are."""


class CommandParser(OneLineParser):
    """Command line of a function with typed arguments: its docstring is the help.

    Parameters without a default stand without a name on the command line, the last one as often as wanted
    if it is a list. Others are options with a dash or an underscore between words, as are the fields of
    dataclasses; one of type ``bool`` is a flag, and one of a list is repeated.
    """

    def __init__(self, command: str, function: Callable[..., Any]) -> None:
        hints = get_type_hints(function)
        self._function = function
        self._groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        parameters = inspect.signature(function).parameters.values()
        words = {p.name: p.name.upper().removesuffix("S") for p in parameters if p.default is p.empty}
        shown = (f"[{word} ...]" if _is_list(hints[name]) else word for name, word in words.items())
        super().__init__(
            prog=f"fastmem {command}",
            usage=" ".join([f"fastmem {command}", *shown, "[options]"]),
            description=(inspect.getdoc(function) or "").partition("\nArgs:")[0],
            formatter_class=_Formatter,
        )
        self.add_function_arguments(function, as_positional=True, skip=set(self._groups))
        self._action_groups[-1].title = "arguments"
        for name, kind in self._groups.items():
            self.add_class_arguments(kind, name)
        # Options go by their own names, without those of the groups.
        for action in self._actions:
            if action.dest in words:
                action.metavar = words[action.dest]
            elif action.dest in self._groups:
                action.help = argparse.SUPPRESS
            elif action.dest != "help":
                action.option_strings = [f"--{action.dest.rpartition('.')[2].replace('_', '-')}"]
                self._option_string_actions[action.option_strings[0]] = action
                if _kind(action) is bool:
                    action.metavar = ""

    def run(self, arguments: list[str]) -> int:
        """Run the function with arguments of the command line; returns the exit status."""
        written = self._written_out(arguments)
        given = self._given(written)
        for defaults in [value.defaults for value in given.values() if hasattr(value, "defaults")]:
            known = {action.dest for action in self._actions}
            self.set_defaults({name: defaults[name] for name in defaults.keys() & known})
            given = self._given(written)
        try:
            return self._function(**given) or 0
        except (RuntimeError, MemoryError) as error:
            from fastmem_pl.base.phases import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            advice = "--precision bf16-true, --windows sequential with a smaller --window, or --device cpu"
            raise FastMemError(f"out of memory; try {advice}") from error

    def _given(self, written: list[str]) -> dict[str, Any]:
        try:
            return self.instantiate(self.parse_args(written)).as_dict()
        except FastMemError as error:
            prefix = "|".join([r"model\.\w+", *self._groups])
            raise FastMemError(re.sub(rf"^({prefix})\.", "", str(error))) from error

    def _written_out(self, arguments: list[str]) -> list[str]:
        """Arguments as jsonargparse wants them: options first, each with a value, lists as JSON."""
        options: list[str] = []
        words: list[str] = []
        rest = iter(arguments)
        lists: dict[str, list[str]] = {}
        for argument in rest:
            option, equals, value = argument.partition("=")
            action = self._option_string_actions.get(option.replace("_", "-"))
            if argument == "--":
                words += rest
            elif argument in ("-h", "--help"):
                return ["--help"]
            elif not argument.startswith("--"):
                words.append(argument)
            elif action is None:
                self.error(f"unrecognized arguments: {argument}")
            else:
                option = action.option_strings[0]
                if not equals:
                    value = "true" if _kind(action) is bool else next(rest, "--")
                if value.startswith("--"):
                    raise FastMemError(f"{option}: give a value; see {self.prog} --help")
                if _is_list(_kind(action)):
                    lists.setdefault(option, []).append(value)
                else:
                    options.append(f"{option}={value}")
        options += [f"{option}={json.dumps(values)}" for option, values in lists.items()]
        for action in self._actions:
            if not action.option_strings and _is_list(_kind(action)):
                options.append(json.dumps(words))
                words = []
            elif not action.option_strings:
                if not words:
                    raise FastMemError(f"give a {action.metavar}; see {self.prog} --help")
                options.append(words.pop(0))
        return options + words


def _kind(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", None)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)
