"""Parsers of the commands: jsonargparse with one-line errors, and functions as commands."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from fastmem_pl.base.errors import FastMemError, nearest

# What may be wrong with a class that was named, or with its arguments, amid what else a setting could be.
_CLASS_MISTAKE = re.compile(
    r"the following arguments are required: [\w, ]*\w(?= - )|Option '\w+' is not accepted"
    r"|module '[\w.]+' has no attribute '\w+'"
)
_WRONG_TYPE = (
    r'Parser key "([^"]+)": Expected an? (.+?)\.? (?:Got|Given) value: (.+)',
    r'Parser key "([^"]+)": Does not validate against any of the Union subtypes Subtypes: \[(.+?)\] '
    r"Errors: .* Given value: (.+)",
)
# Faults of the published code, which configs name under published_quirks.
_QUIRKS = {"norm_every_layer", "round_weights", "dola_unlimited"}
_UNKNOWN = r"(?i)unrecognized arguments: (\S+)|key '([^']+)' is not expected|not accept option '([^']+)'"


class OneLineParser(ArgumentParser):
    """Reports mistakes in one line, with the nearest name of a setting.

    Attributes:
        allowed: by setting, what a message about a class that does not fit says to be allowed.
    """

    allowed: ClassVar[dict[str, str]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`FastMemError` with the parser's message on one line.

        Raises:
            FastMemError: always.
        """
        line = re.sub(r"\s+", " ", message).strip()
        wrong_type = next(filter(None, (re.search(pattern, line) for pattern in _WRONG_TYPE)), None)
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
        parsers = [
            self,
            *(self._subcommands_action._name_parser_map.values() if self._subcommands_action else ()),
        ]
        known = sorted({action.dest for parser in parsers for action in parser._actions})
        section, _, tail = name.rpartition(".")

        def likeness(candidate: str) -> float:
            same_section = candidate.split(".")[0] == section.split(".")[0]
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
    if it is a list. Others are options with a dash or an underscore between words; one of type ``bool`` is a
    flag. A list option is repeated or, where no list stands without a name, takes several values. Fields of
    a dataclass are options as well.

    Args:
        command: name of the command.
        function: what it runs.
    """

    def __init__(self, command: str, function: Callable[..., Any]) -> None:
        self._function, self._hints = function, get_type_hints(function)
        parameters = inspect.signature(function).parameters
        self._positional = [name for name, p in parameters.items() if p.default is p.empty]
        self._classes = {name: kind for name, kind in self._hints.items() if is_dataclass(kind)}
        shown = (f"[{n} ...]" if self._is_list(k) else n for k, n in map(self._shown, self._positional))
        super().__init__(
            prog=f"fastmem {command}",
            usage=" ".join([f"fastmem {command}", *shown, "[options]"]),
            description=(inspect.getdoc(function) or "").partition("\nArgs:")[0],
            formatter_class=_Formatter,
        )
        self.add_function_arguments(function, as_positional=True, skip=set(self._classes))
        self._action_groups[-1].title = "arguments"
        for kind in self._classes.values():
            names = {field.name for field in fields(kind)}
            self.add_class_arguments(kind, skip=_QUIRKS & names)
            self._hints |= get_type_hints(kind)
        for action in self._actions:
            if action.dest in self._positional:
                action.metavar = self._shown(action.dest)[1]
            elif action.dest != "help":
                action.option_strings = [f"--{action.dest.replace('_', '-')}"]
                self._option_string_actions[action.option_strings[0]] = action
                if self._hints[action.dest] is bool:
                    action.metavar = ""

    def run(self, arguments: list[str]) -> int:
        """Run the function with arguments of the command line; returns the exit status.

        Raises:
            FastMemError: for a mistake in the arguments.
        """
        written = self._written_out(arguments)
        given = self._given(written)
        for defaults in [value.defaults for value in given.values() if hasattr(value, "defaults")]:
            known = {action.dest for action in self._actions}
            self.set_defaults({name: defaults[name] for name in defaults.keys() & known})
            given = self._given(written)
        return self._function(**given) or 0

    def _given(self, written: list[str]) -> dict[str, Any]:
        """Arguments of the function."""
        config = self.parse_args(written)
        parameters = inspect.signature(self._function).parameters
        given = {name: config[name] for name in parameters if name not in self._classes}
        try:
            for name, kind in self._classes.items():
                given[name] = kind(**{f.name: config[f.name] for f in fields(kind) if f.name in config})
        except FastMemError as error:
            # Options have no prefix here.
            raise FastMemError(re.sub(r"^model\.(\w+\.)?", "", str(error))) from error
        return given

    def _written_out(self, arguments: list[str]) -> list[str]:
        """Arguments as jsonargparse wants them: options first, each with a value, lists as JSON."""
        words: list[str] = []
        options: list[str] = []
        lists: dict[str, list[str]] = {}
        takes_list = any(map(self._is_list, self._positional))
        rest = deque(arguments)
        while rest:
            argument = rest.popleft()
            if argument in ("-h", "--help"):
                return ["--help"]
            if argument == "--":
                words += rest
                break
            if not argument.startswith("--"):
                words.append(argument)
                continue
            option, equals, value = argument.partition("=")
            option = option.replace("_", "-")
            if option not in self._option_string_actions:
                known = [name for action in self._actions for name in action.option_strings]
                raise FastMemError(f"unknown option {option}{nearest(option, known)}; see {self.prog} --help")
            name = self._option_string_actions[option].dest
            if self._hints[name] is bool:
                options.append(f"--{name}={value if equals else 'true'}")
                continue
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise FastMemError(f"{option}: give a value; see {self.prog} --help")
                value = rest.popleft()
            if not self._is_list(name):
                options.append(f"--{name}={value}")
                continue
            lists.setdefault(name, []).append(value)
            while not takes_list and rest and not rest[0].startswith("--"):
                lists[name].append(rest.popleft())
        options += [f"--{name}={json.dumps(values)}" for name, values in lists.items()]
        for name in self._positional:
            if not self._is_list(name) and not words:
                raise FastMemError(f"give a {self._shown(name)[1]}; see {self.prog} --help")
            options.append(json.dumps(words) if self._is_list(name) else words.pop(0))
        if words and not takes_list:
            raise FastMemError(f"unexpected argument {words[0]!r}; see {self.prog} --help")
        return options

    def _is_list(self, name: str) -> bool:
        return get_origin(self._hints[name]) in (list, tuple)

    def _shown(self, name: str) -> tuple[str, str]:
        """A positional parameter and what help calls it."""
        return name, re.sub("S$", "", name.upper())
