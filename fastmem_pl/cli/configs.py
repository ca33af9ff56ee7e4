"""Configs: packaged names and YAML files become one mapping of settings, for every command."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.base.errors import FastMemError, nearest, say
from fastmem_pl.base.outside import as_text, fit, parse_yaml, read_bytes

# Settings that are groups of settings: a later config changes some of a group and leaves the others.
_SECTIONS = ("model", "data", "trainer", "search")
_GROUPS = ("model.backbone", "model.memorize", "model.decode", "model.chat", "search.optuna")


@dataclass
class Configs:
    """Settings of several configs, later ones on top of earlier ones.

    Attributes:
        settings: nested settings, as one config would hold them.
        name: names of the configs with dashes between.
        files: the file that each setting comes from, by the setting's path (``model.memorize.steps``).
    """

    settings: dict[str, Any]
    name: str
    files: dict[str, str]

    def name_file(self, error: FastMemError, options: Iterable[str] = ()) -> FastMemError:
        """The error with the file in front whose setting it is about, unless an option has replaced it."""
        message = str(error)
        text = message.removeprefix('Parser key "config": ')
        # Without that prefix, an option may be what does not fit.
        given = {option.partition("=")[0].lstrip("-") for option in options} if text == message else set()
        for name in sorted(self.files.keys() - given, key=len, reverse=True):
            if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.])", text):
                return FastMemError(f"{self.files[name]}: {text}")
        return FastMemError(text)


def read_configs(values: Sequence[str]) -> Configs:
    """Read configs given by name or path, several with commas between, in order."""
    settings, files = Namespace(), {}
    paths = config_paths(values)
    for path in paths:
        content = parse_yaml(as_text(read_bytes(path), path), path)
        try:
            for name, value in _settings(fit(content or {}, dict[str, Any], "its settings")):
                settings[name], files[name] = value, path
        except FastMemError as error:
            raise FastMemError(f"{path}: {error}") from error
    return Configs(settings.as_dict(), "-".join(Path(path).stem for path in paths), files)


def _settings(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their paths; ``model: {backbone: NAME}`` is its source, and an empty group is none."""
    for key, value in content.items():
        name = f"{above}{key}"
        if not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", name):
            raise FastMemError(f"{name!r} is no name of a setting")
        if name == "model.backbone" and isinstance(value, str):
            yield f"{name}.source", value
        elif isinstance(value, dict) and (not above or name in _GROUPS):
            yield from _settings(value, f"{name}.")
        elif name not in (*_SECTIONS, *_GROUPS):
            yield name, value
        elif value is not None:
            raise FastMemError(f"{name}: {value!r} does not fit; allowed: settings by their names")


def take_configs(arguments: Sequence[str]) -> tuple[Configs, list[str]]:
    """Read the configs that a command line names; the other arguments come with them.

    ``--model.backbone NAME`` among these becomes ``--model.backbone.source NAME``.
    """
    values, others, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config"):
            given = value if equals else next(rest, None)
            if given is None:
                raise FastMemError("--config: give the name of a packaged config or a file")
            values.append(given)
            continue
        if option == "--model.backbone":
            argument = f"{option}.source{equals}{value}"
        others.append(argument)
    return read_configs(values), others


def as_arguments(configs: Configs, options: Sequence[str]) -> list[str]:
    """Arguments for jsonargparse: all settings of the configs, and the options on top of them."""
    if not configs.name:
        return list(options)
    settings = {"run_dir": f"runs/{configs.name}"} | configs.settings
    return ["--config", json.dumps(settings, ensure_ascii=False), *options]


def config_paths(values: Sequence[str]) -> list[str]:
    """Files of configs given by name or path, several with commas between, in order.

    A packaged config for a task together with a method (``xsum+cd`` for ``xsum`` and ``fastmem+cd``) is added
    right after both, so that configs which follow win over it.
    """
    parts = ([value] if os.path.isfile(value) else value.split(",") for value in values)
    paths = [_config_path(part.strip()) for given in parts for part in given]
    packaged = {name: str(path) for name, path in packaged_configs().items()}
    for name, path in packaged.items():
        task, _, decoder = name.partition("+")
        both = [packaged.get(task), packaged.get(f"fastmem+{decoder}")]
        if path not in paths and all(part in paths for part in both):
            paths.insert(1 + max(paths.index(part) for part in both), path)
            say(f"with {task} and fastmem+{decoder} comes the config {name}")
    return paths


def _config_path(value: str) -> str:
    if os.path.isfile(value):
        return value
    packaged = packaged_configs()
    # "nqswap", "task/nqswap" and "configs/task/nqswap.yaml" name the packaged config from any folder.
    path = Path(value)
    name = path.name.removesuffix(".yaml")
    if name in packaged and set(path.parent.parts) <= {"configs", packaged[name].parent.name}:
        return str(packaged[name])
    if not value:
        raise FastMemError(
            "--config: an empty name; names stand with commas and no spaces between: smollm2,qa"
        )
    names = f"packaged: {', '.join(sorted(packaged))}{nearest(name, packaged)}"
    raise FastMemError(f"--config: no such file or packaged config: {value}; {names}")
