"""The ``fastmem`` command: a LightningCLI with the subcommands fit-predict, fit and predict."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmem_pl.errors import FastMemError, nearest

# Heavy imports (torch, lightning, transformers) wait until a subcommand is known, so that
# `fastmem --help` answers at once.

OVERVIEW = """\
fastmem: make a language model read its context before it answers (FastMem, arXiv 2406.16069)

usage: fastmem <command> --config NAME_OR_FILE [options]

commands:
  fit-predict   memorize each context, answer about it, compare methods
  fit           memorize each context and save the memories
  predict       answer with saved memories; without any, zero-shot

first run:
  fastmem fit-predict --config demo
your own data (JSON or JSONL with context, question and, if known, answers):
  fastmem fit-predict --config qa_smollm2 --data.path my.jsonl
your own model (Hub id, folder or .gguf file):
  fastmem fit-predict --config qa_smollm2 --data.path my.jsonl \\
      --model.backbone Qwen/Qwen2.5-7B-Instruct --model.learning_rate 1e-5

options used most (all of them: fastmem <command> --help):
  --run_dir DIR              results; the same command goes on there after a stop
  --data.limit N             the first N records only
  --data.batch_size N        samples at once
  --model.methods '[zero-shot, fastmem, fastmem+cd]'
  --model.steps N --model.learning_rate X --model.kl_coeff X
  --trainer.precision 32-true|bf16-mixed|bf16-true   --trainer.accelerator cpu|gpu
  --print_config             show the resolved settings and stop

packaged configs: {configs}
"""
USAGE = "fastmem {command} --config NAME_OR_FILE [--data.path FILE] [--run_dir DIR] [options]"
COMMANDS = ("fit-predict", "fit", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a mistake, 130 for an interrupt)."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW.format(configs=", ".join(sorted(packaged_configs()))))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fastmem-pl {version('fastmem-pl')}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            hint = nearest(arguments[0], COMMANDS)
            raise FastMemError(f"{arguments[0]!r} is no command; allowed: {', '.join(COMMANDS)}{hint}")
        return _run(_resolve_configs(arguments))
    except FastMemError as error:
        print(f"fastmem: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()


def packaged_configs() -> dict[str, Path]:
    """Configs that ship with the package, by name."""
    package = Path(__file__).parent
    # In a checkout they lie beside the package; in a wheel inside it.
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    return {path.stem: path for path in folder.glob("*.yaml")} if folder else {}


def _resolve_configs(arguments: list[str]) -> list[str]:
    """Let ``--config`` take the name of a packaged config as well as a file."""
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        if argument in ("-c", "--config") and i + 1 < len(arguments):
            resolved[i + 1] = _config_path(arguments[i + 1])
        elif argument.startswith("--config="):
            resolved[i] = "--config=" + _config_path(argument.split("=", 1)[1])
    return resolved


def _config_path(value: str) -> str:
    if os.path.isfile(value):
        return value
    packaged = packaged_configs()
    # "configs/demo.yaml" names the packaged config from any folder.
    path = Path(value)
    if path.stem in packaged and (str(path) in (path.stem, path.name) or path.parent.name == "configs"):
        return str(packaged[path.stem])
    names = sorted(packaged)
    raise FastMemError(
        f"--config: no such file or packaged config: {value}; "
        f"packaged: {', '.join(names)}{nearest(path.stem, names)}"
    )


def _run(arguments: list[str]) -> int:
    _quiet_libraries()
    from fastmem_pl.lightning_cli import run_command

    try:
        return run_command(arguments)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into exit status 1 after its own shutdown.
        if stop.code == 1:
            return _interrupted()
        return int(stop.code or 0)


def _interrupted() -> int:
    print(
        "fastmem: stopped; what was answered is kept, and the same command goes on from there",
        file=sys.stderr,
    )
    return 130


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
