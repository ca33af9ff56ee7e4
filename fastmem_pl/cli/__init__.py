"""The ``fastmem`` command: Lightning's subcommands over samples, and commands on memories and results."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.base.errors import (
    FailedElsewhereError,
    FastMemError,
    LostProcessError,
    TerminatedError,
    nearest,
    unknown,
)

# Heavy imports (torch, lightning, transformers) wait until a subcommand is known, so that
# `fastmem --help` answers at once.

OVERVIEW = """\
fastmem: make a language model read its context before it answers (FastMem, arXiv 2406.16069)

usage: fastmem <command> [--config NAME_OR_FILE[,NAME_OR_FILE ...]] [options]

commands:
  fit-predict   memorize each context, answer about it, compare methods
  fit           memorize each context and save the memories
  predict       answer with saved memories; without any, zero-shot
  search        try a grid of settings on every fifth sample, and rank them
  memorize      memorize one text and keep it as a file
  ask           ask such a memory, on the command line or in a loop
  export        ship it: a LoRA adapter, a merged checkpoint, a smaller file
  report        one HTML page from the results of runs, with all samples
  compare       the same tables in the terminal
  tasks [NAME]  show the tasks with their prompts
  env           versions and devices, for bug reports

first run:
  fastmem fit-predict --config demo
one text:
  fastmem memorize notes.txt && fastmem ask notes.fastmem "Who wrote the notes?"
your own data (JSON or JSONL with context, question and, if known, answers):
  fastmem fit-predict --config smollm2,qa --data.path my.jsonl
your own model (Hub id, folder or .gguf file):
  fastmem fit-predict --config base,qa --data.path my.jsonl --model.backbone Qwen/Qwen2.5-7B-Instruct
a row of the paper (model, task, method):
  fastmem fit-predict --config base,llama3-8b,nqswap,fastmem+cd --data.path nqswap.json

what came out, and where the time went:
  fastmem report runs/demo && fastmem fit-predict --config demo --profile --run_dir runs/profiled
good settings for your model and data (the default grid is the paper's 4 x 3 x 5, for models of 4B and more):
  fastmem search --config smollm2,nqswap,search --data.path nqswap.json \
    --search.grid '{{learning_rate: [3e-5, 1e-4, 3e-4], steps: [10, 20], kl_coeff: [0.1, 1]}}'

options used most (all of them: fastmem <command> --help):
  --run_dir DIR              results; the same command goes on there after a stop
  --data.limit N             the first N records only
  --data.batch_size N        samples at once; left out, as many as free memory holds
  --model.methods '[zero-shot, one-shot, cad, dola, fastmem, fastmem+cd, fastmem+cad, fastmem+dola]'
  --model.memorize.steps N --model.memorize.learning_rate X --model.memorize.kl_coeff X
  --trainer.precision 32-true|bf16-mixed|bf16-true   --trainer.accelerator cpu|gpu
  --print_config             show the resolved settings and stop

packaged configs, later ones on top of earlier ones:
{configs}
"""
USAGE = "fastmem {command} --config NAME_OR_FILE [--data.path FILE] [--run_dir DIR] [options]"
COMMANDS = ("fit-predict", "fit", "predict", "search")
PROFILED_COMMANDS = ("fit-predict", "fit", "predict")
MEMORY_COMMANDS = ("memorize", "ask", "export")
FILE_COMMANDS = ("report", "compare", "env")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit status: 2 for a mistake, 75 for a run that ended early by no fault of its settings (a full
        disk, a process that died), 130 for an interrupt, 141 when what it prints is no longer read, 143 after
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        status = _command(arguments)
        sys.stdout.flush()
        return status
    except FastMemError as error:
        if not _said_by_another(error):
            kind = "" if isinstance(error, TerminatedError) else "error: "
            print(f"fastmem: {kind}{error}", file=sys.stderr)
        if isinstance(error, LostProcessError):
            sys.modules["fastmem_pl.run.processes"].leave()
        return error.exit_status
    except KeyboardInterrupt:
        if arguments[0] in (*MEMORY_COMMANDS, *FILE_COMMANDS):
            print("fastmem: stopped", file=sys.stderr)
            return 130
        return _interrupted()
    except BrokenPipeError:
        # Whoever reads has enough; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _said_by_another(error: FastMemError) -> bool:
    """Whether another process of the run prints this mistake, or one like it."""
    if isinstance(error, FailedElsewhereError):
        return True
    if isinstance(error, LostProcessError):
        return error.said_by_another
    processes = sys.modules.get("fastmem_pl.run.processes")
    # What all processes see, until they have met; and the end that all come to.
    same = isinstance(error, TerminatedError) or processes is None or not processes.has_joined()
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return same and any(int(os.environ.get(name) or 0) for name in names)


def _command(arguments: list[str]) -> int:
    """Run one command."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(configs=_config_overview()))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fastmem-pl {version('fastmem-pl')}")
        return 0
    if arguments[0] in (*COMMANDS, *MEMORY_COMMANDS, *FILE_COMMANDS, "tasks"):
        arguments = _resolve_profile(arguments)
    if arguments[0] == "tasks":
        return _show_tasks(arguments[1:])
    if arguments[0] in (*MEMORY_COMMANDS, *FILE_COMMANDS):
        return _run_own_command(arguments[0], arguments[1:])
    if arguments[0] not in COMMANDS:
        known = (*COMMANDS, *MEMORY_COMMANDS, *FILE_COMMANDS, "tasks")
        hint = nearest(arguments[0], known)
        raise FastMemError(f"{arguments[0]!r} is no command; allowed: {', '.join(known)}{hint}")
    if len(arguments) == 1:
        # Defaults are the paper's, for models of 4B and more: not what anybody wants of the packaged one.
        raise FastMemError(
            f"{arguments[0]}: say what to work on: --config NAME_OR_FILE, such as --config demo or --config "
            "smollm2,qa --data.path FILE (fastmem --help lists the packaged ones)"
        )
    return _run(_resolve_configs(arguments))


def _run_own_command(name: str, arguments: list[str]) -> int:
    if not {"-h", "--help"} & set(arguments):
        _quiet_libraries()
    command = importlib.import_module(f"fastmem_pl.cli.{name}")
    try:
        return command.run(arguments)
    except SystemExit as stop:
        # argparse ends the program after its help.
        return int(stop.code or 0)
    except (RuntimeError, MemoryError) as error:
        from fastmem_pl.base.phases import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        if name in FILE_COMMANDS:
            raise FastMemError("out of memory; report fewer runs at once") from error
        raise FastMemError(
            "out of memory; try --precision bf16-true, --windows sequential with a smaller --window, or "
            "--device cpu"
        ) from error


def _config_overview() -> str:
    kinds: dict[str, list[str]] = {}
    for name, path in packaged_configs().items():
        kinds.setdefault(path.parent.name if path.parent.name != "configs" else "", []).append(name)
    return "\n".join(f"  {kind + ':' if kind else '':<9}{', '.join(names)}" for kind, names in kinds.items())


def _show_tasks(names: list[str]) -> int:
    """Print the tasks, or all about those that are named."""
    from fastmem_pl.data import TASKS

    if "-h" in names or "--help" in names:
        print("usage: fastmem tasks [NAME ...]\n\nshow the tasks, or all prompts of those that are named")
        return 0
    for name in names:
        if name not in TASKS:
            raise unknown("tasks", name, TASKS)
    for task in [TASKS[name] for name in names] or TASKS.values():
        print(f"{task.name}: {task.description}")
        print(f"  scores: {', '.join(task.scores)}")
        forms = {"prompt": task.prompt}
        if names:
            forms |= {"one-shot": task.one_shot, "without context (cad)": task.without_context}
            if task.context != "{context}":
                forms = {"memorized text, {context} of the prompts": task.context, **forms}
        for label, text in forms.items():
            print(f"  {label}:\n" + "\n".join(f"    {line}" for line in text.splitlines()))
        print()
    if not names:
        print("all prompts of one task: fastmem tasks NAME; a data file: --data.task NAME --data.path FILE")
    return 0


def _resolve_profile(arguments: list[str]) -> list[str]:
    """Write ``--profile`` and ``--profile=trace,memory`` as the setting of the trainer they stand for."""
    options = {a for a in arguments if a.partition("=")[0] == "--profile"}
    if not options:
        return arguments
    command = arguments[0]
    if command not in PROFILED_COMMANDS:
        raise FastMemError(f"--profile: not with {command}; allowed with {', '.join(PROFILED_COMMANDS)}")
    from fastmem_pl.run.profile import check_kinds

    resolved, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument not in options:
            resolved.append(argument)
            continue
        # These commands take options only, so a word after it is its value.
        spaced = "=" not in argument and rest and not rest[0].startswith("-")
        names = rest.pop(0) if spaced else argument.partition("=")[2] if "=" in argument else "phases"
        kinds = check_kinds(names, "--profile")
        resolved += ["--trainer.profile", f"[{', '.join(kinds)}]"]
    return resolved


def _resolve_configs(arguments: list[str]) -> list[str]:
    """Let ``--config`` take names of packaged configs as well as files, several with commas between.

    Configs come first in the result, so that options win over them wherever they stand.
    """
    values: list[str] = []
    options: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--config"):
            value = next(rest, None)
            if value is None:
                raise FastMemError("--config: give the name of a packaged config or a file")
        elif argument.startswith("--config="):
            value = argument.split("=", 1)[1]
        else:
            options.append(argument)
            continue
        values.append(value)
    return [arguments[0], *(part for path in config_paths(values) for part in ("--config", path)), *options]


def config_paths(values: Sequence[str]) -> list[str]:
    """Files of configs given by name or path, several with commas between, in order.

    Raises:
        FastMemError: for one that there is not.
    """
    names = [
        part
        for value in values
        for part in ([value] if os.path.isfile(value) else [part.strip() for part in value.split(",")])
    ]
    return _with_combinations([_config_path(name) for name in names])


def _with_combinations(paths: list[str]) -> list[str]:
    """Add packaged configs for a task together with a method: ``xsum+cd`` for ``xsum`` and ``fastmem+cd``.

    They come right after both, so that configs which follow win over them.
    """
    packaged = {name: str(path) for name, path in packaged_configs().items()}
    for name, path in packaged.items():
        task, _, decoder = name.partition("+")
        both = [packaged.get(task), packaged.get(f"fastmem+{decoder}")]
        if path not in paths and all(part in paths for part in both):
            paths.insert(1 + max(paths.index(part) for part in both), path)
            print(f"fastmem: with {task} and fastmem+{decoder} comes the config {name}", file=sys.stderr)
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
    names = sorted(packaged)
    if not value:
        raise FastMemError(
            "--config: an empty name; names stand with commas and no spaces between: smollm2,qa"
        )
    raise FastMemError(
        f"--config: no such file or packaged config: {value}; "
        f"packaged: {', '.join(names)}{nearest(name, names)}"
    )


def _run(arguments: list[str]) -> int:
    _quiet_libraries()
    from fastmem_pl.cli.lightning import run_command

    try:
        return run_command(arguments)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into exit status 1 after its own shutdown.
        if stop.code == 1:
            return _interrupted()
        return int(stop.code or 0)


def _interrupted() -> int:
    stopped = TerminatedError("stopped; what was answered is kept, and the same command goes on from there")
    if not _said_by_another(stopped):
        print(f"fastmem: {stopped}", file=sys.stderr)
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
