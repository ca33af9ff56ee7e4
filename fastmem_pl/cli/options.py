"""What the commands on single memories share: their parser, the model, its settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastmem_pl.base.errors import FastMemError, nearest

if TYPE_CHECKING:
    from fastmem_pl.backbone import Backbone

DEMO = "demo"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
QUANTIZATIONS = ("bnb-4bit", "bnb-8bit", "torchao-int4", "torchao-int8")


class CommandParser(argparse.ArgumentParser):
    """Reports mistakes in one line, with the nearest option; takes ``_`` for ``-`` in names of options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse a command's arguments.

        Raises:
            FastMemError: for a mistake.
        """
        end = arguments.index("--") if "--" in arguments else len(arguments)
        dashed = [re.sub(r"^--[^=]*", lambda m: m.group().replace("_", "-"), a) for a in arguments[:end]]
        options, unknown = self.parse_known_intermixed_args([*dashed, *arguments[end:]])
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = next((a for a in unknown if a.startswith("-")), unknown[0]).split("=")[0]
            raise FastMemError(f"unknown option {name}{nearest(name, known)}; see {self.prog} --help")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise :class:`FastMemError`.

        Raises:
            FastMemError: always.
        """
        message = re.sub(r"^argument ([^:]+):", r"\1:", message)
        raise FastMemError(f"{message}; see {self.prog} --help")


def add_model_options(parser: argparse.ArgumentParser, config: bool = True) -> None:
    """Options that say which model, where, and (with ``config``) with what settings."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="demo (default), a Hub id, a folder or a .gguf file",
    )
    if config:
        group.add_argument(
            "--config",
            metavar="NAMES",
            help="packaged configs or files whose model settings apply, later ones on top (default: those of "
            "memorizing in demo for the demo model, in base for others)",
        )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="default: 32-true on a CPU, bf16-true on a GPU",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="keep the trunk in fewer bits (extras bnb and torchao); a memory is asked as it was memorized",
    )
    group.add_argument(
        "--device-map", metavar="POLICY", help="lay the model out over all GPUs: auto, balanced or sequential"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint"
    )


def model_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The ``model`` settings of the configs that apply, with what the command line says on top.

    Of the configs that apply by default, only the settings of memorizing count: how answers are decoded is
    :class:`~fastmem_pl.DecodingSettings`' to say unless a config is asked for by name.

    Raises:
        FastMemError: when a config cannot be read, or holds what is no setting.
    """
    from fastmem_pl.cli import config_paths
    from fastmem_pl.memory import MemorizationSettings

    named = getattr(options, "config", None)
    given: dict[str, Any] = {}
    for path in config_paths([named or (DEMO if options.model in (None, DEMO) else "base")]):
        given |= _read_config(path)
    if not named:
        given = {name: given[name] for name in {f.name for f in fields(MemorizationSettings)} & given.keys()}
    given["backbone"] = options.model or given.get("backbone") or DEMO
    return given | {name: value for name, value in vars(options).items() if value is not None}


def _read_config(path: str) -> dict[str, Any]:
    """The ``model`` section of a config."""
    import inspect

    import yaml

    from fastmem_pl.run.predict import FastMemModule

    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FastMemError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
    section = (content.get("model") if isinstance(content, Mapping) else None) or {}
    known = list(inspect.signature(FastMemModule).parameters)
    for name in section:
        if name not in known:
            raise FastMemError(f"--config: {path}: model.{name} is unknown{nearest(str(name), known)}")
    return dict(section)


def pick(kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """One of the settings classes from those of the settings that are its own.

    Raises:
        FastMemError: when a value is of another type, or out of its range.
    """
    own = {}
    for field in fields(kind):
        value = settings.get(field.name)
        if value is not None:
            # YAML takes 1e-4 for a text.
            own[field.name] = _number(field.name, value, str(field.type))
    try:
        return kind(**own)
    except FastMemError as error:
        # There is one model here: options have no prefix.
        raise FastMemError(re.sub(r"^model\.(\w+\.)?", "", str(error))) from None


def _number(name: str, value: Any, kind: str) -> Any:
    wanted = next((one for one in (int, float) if kind.startswith(one.__name__)), None)
    if wanted is None:
        return tuple(value) if isinstance(value, list) else value
    try:
        number = float(value)
        if isinstance(value, bool) or wanted(number) != number:
            raise ValueError
    except (TypeError, ValueError):
        allowed = "whole numbers" if wanted is int else "numbers"
        raise FastMemError(f"{name}: {value!r} does not fit; allowed: {allowed}") from None
    return wanted(number)


def load_backbone(settings: Mapping[str, Any], num_layers: int) -> Backbone:
    """The model on the chosen device.

    Args:
        settings: ``model`` settings and options.
        num_layers: trained layers, which stay together and unquantized.

    Raises:
        FastMemError: when there is no such device or model.
    """
    import torch

    from fastmem_pl.backbone import Backbone, ChatSettings

    device = settings["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise FastMemError(f"--device: {device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device != "cpu":
        count = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= count:
            raise FastMemError(f"--device: there is no {device} here ({count} GPUs); give --device cpu")
    precision = settings.get("precision") or ("32-true" if device == "cpu" else "bf16-true")
    backbone = Backbone.load(
        settings["backbone"],
        precision,
        device,
        settings["trust_remote_code"],
        quantization=settings.get("quantization"),
        device_map=settings.get("device_map"),
        num_layers=num_layers,
    )
    chat = pick(ChatSettings, settings)
    return backbone if chat == ChatSettings() else backbone.with_chat(chat)


def check_exists(memory: str) -> None:
    """Refuse a memory that there is not, before anything heavy is imported.

    Raises:
        FastMemError: naming it.
    """
    try:
        if Path(memory).is_file():
            return
    except OSError:
        pass
    raise FastMemError(f"no such memory: {memory:.200}")


def read_text(path: str, what: str = "a text to memorize") -> str:
    """A text file, or standard input for ``-``.

    Args:
        path: of the file.
        what: the file should hold.

    Raises:
        FastMemError: when there is no such file, or it is no UTF-8 text, or empty.
    """
    import sys

    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise FastMemError(f"cannot read {name}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastMemError(
            f"cannot read {name}: it is no UTF-8 text (byte {error.start}); convert it to plain text first"
        ) from error
    if not text.strip():
        raise FastMemError(f"{name} is empty; give {what}")
    return text
