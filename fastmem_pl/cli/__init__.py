"""The ``fastmem`` command: Lightning's subcommands over samples, and commands on memories and results."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastmem_pl import __version__
from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.base.errors import (
    FailedElsewhereError,
    FastMemError,
    OutOfMemoryError,
    TerminatedError,
    nearest,
)

# Heavy imports (torch, lightning, transformers) wait until a subcommand is known, so that
# `fastmem --help` answers at once.

_OVERVIEW = Path(__file__).with_name("overview.txt")
SAMPLE_COMMANDS = dict.fromkeys(("fit-predict", "fit", "predict", "search"), "lightning:run")
COMMANDS = {
    **SAMPLE_COMMANDS,
    "memorize": "memorize:memorize",
    "ask": "ask:ask",
    "export": "export:export",
    "report": "report:report",
    "compare": "report:compare",
    "tasks": "tasks:tasks",
    "env": "env:env",
}
"""Module of this package and function by command: of samples a LightningCLI, others with typed arguments."""

_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit status: 2 for a mistake, 75 for a run that ended early by no fault of its settings (a full
        disk, a process that died), 130 for an interrupt, 141 when what it prints is no longer read, 143 after
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        status = _command(arguments)()
        sys.stdout.flush()
        return status
    except FastMemError as error:
        if not _is_silent(error):
            kind = "" if isinstance(error, TerminatedError) else "error: "
            print(f"fastmem: {kind}{error}", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, SystemExit) as stop:
        # Parsers end the program after their help; Lightning turns Ctrl-C into exit status 1.
        if isinstance(stop, SystemExit) and stop.code != 1:
            return int(stop.code or 0)
        if not _is_silent(TerminatedError()):
            kept = "; what was answered is kept, and the same command goes on from there"
            print(f"fastmem: stopped{kept if arguments[0] in SAMPLE_COMMANDS else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads has enough; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _command(arguments: list[str]) -> Callable[[], int]:
    """What runs the command with its options, and returns the exit status."""
    command, *options = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        return partial(_print, _OVERVIEW.read_text(encoding="utf-8").replace("CONFIGS", _config_overview()))
    if command == "--version":
        return partial(_print, f"fastmem-pl {__version__}")
    if command not in COMMANDS:
        raise FastMemError(
            f"{command!r} is no command; allowed: {', '.join(COMMANDS)}{nearest(command, COMMANDS)}"
        )
    _quiet_libraries()
    options = _resolve_profile(command, options)
    module, _, name = COMMANDS[command].partition(":")
    function = getattr(importlib.import_module(f"fastmem_pl.cli.{module}"), name)
    if command in SAMPLE_COMMANDS:
        return partial(function, [command, *options])

    from fastmem_pl.cli.parser import CommandParser

    return partial(CommandParser(command, function).run, options)


def _print(text: str) -> int:
    print(text)
    return 0


def _resolve_profile(command: str, options: list[str]) -> list[str]:
    """Write ``--profile`` and ``--profile=trace,memory`` as the setting of the trainer they stand for."""
    place = next((i for i, option in enumerate(options) if option.partition("=")[0] == "--profile"), None)
    if place is None:
        return options
    if command not in ("fit-predict", "fit", "predict"):
        raise FastMemError(f"--profile: not with {command}; allowed with fit-predict, fit, predict")
    from fastmem_pl.run.profile import check_kinds

    before, (option, *after) = options[:place], options[place:]
    _, equals, names = option.partition("=")
    # These commands take options only, so a word after it is its value.
    if not equals:
        names = after.pop(0) if after and not after[0].startswith("-") else "phases"
    return [*before, f"--trainer.profile=[{', '.join(check_kinds(names, '--profile'))}]", *after]


def _config_overview() -> str:
    kinds: dict[str, list[str]] = {}
    for name, path in packaged_configs().items():
        kinds.setdefault(path.parent.name if path.parent.name != "configs" else "", []).append(name)
    return "\n".join(f"  {kind + ':' if kind else '':<9}{', '.join(names)}" for kind, names in kinds.items())


def _is_silent(error: FastMemError) -> bool:
    """Whether another process of the run prints this mistake, or one like it."""
    if isinstance(error, FailedElsewhereError):
        return True
    # All processes see the same until they have met, but for the room on their devices; and all come to the
    # same end.
    ranks = sys.modules.get("fastmem_pl.run.ranks")
    met = ranks is not None and ranks.have_met()
    same = not (met or isinstance(error, OutOfMemoryError)) or isinstance(error, TerminatedError)
    return same and any(int(os.environ.get(name) or 0) for name in _RANKS)


def _quiet_libraries() -> None:
    """Keep hints of libraries out of the output; warnings that matter stay."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="fastmem: %(message)s")
    for message in (
        ".*does not have many workers.*",
        ".*args parameter is intended to run from within Python.*",
        ".*LeafSpec.*is deprecated.*",
        ".*have overridden `transfer_batch_to_device`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
