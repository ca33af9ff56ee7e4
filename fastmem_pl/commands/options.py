"""What the commands on single memories share: their parser, the model, its settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastmem_pl.errors import FastMemError, nearest

if TYPE_CHECKING:
    from fastmem_pl.backbone import Backbone

DEMO = "demo"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which model, where, and with what settings."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="demo (default), a Hub id, a folder or a .gguf file",
    )
    group.add_argument(
        "--config",
        metavar="NAMES",
        help="packaged configs or files whose model settings apply, later ones on top (default: demo for the "
        "demo model, base for others)",
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="default: 32-true on a CPU, bf16-true on a GPU",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint"
    )


def model_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The ``model`` settings of the configs that apply, with what the command line says on top.

    Raises:
        FastMemError: when a config cannot be read.
    """
    import yaml

    from fastmem_pl.cli import config_paths

    given: dict[str, Any] = {}
    names = options.config or (DEMO if options.model in (None, DEMO) else "base")
    for path in config_paths([names]):
        try:
            content = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FastMemError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
        section = content.get("model") if isinstance(content, Mapping) else None
        if isinstance(section, Mapping):
            given |= section
    if options.model is not None:
        given["backbone"] = options.model
    given.setdefault("backbone", DEMO)
    return given | {name: value for name, value in vars(options).items() if value is not None}


def pick(kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """One of the settings classes from those of the settings that are its own."""
    own = {f.name: settings[f.name] for f in fields(kind) if settings.get(f.name) is not None}
    try:
        return kind(**own)
    except FastMemError as error:
        # There is one model here: options have no prefix.
        raise FastMemError(str(error).removeprefix("model.")) from None


def load_backbone(settings: Mapping[str, Any]) -> Backbone:
    """The model on the chosen device.

    Raises:
        FastMemError: when there is no such device or model.
    """
    import torch

    from fastmem_pl.backbone import Backbone

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
    return Backbone.load(settings["backbone"], precision, device, settings.get("trust_remote_code", False))


def read_text(path: str) -> str:
    """A text file, or standard input for ``-``.

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
        raise FastMemError(f"{name} is empty; give a text to memorize")
    return text
