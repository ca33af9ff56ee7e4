"""The LightningCLI behind the ``fastmem`` command."""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastmem_pl.base.errors import FastMemError, nearest
from fastmem_pl.cli import COMMANDS, USAGE
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.report import print_run
from fastmem_pl.report.table import profile_table
from fastmem_pl.report.terminal import make_console
from fastmem_pl.run.loggers import NAMES as LOGGERS
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.session import RunResult
from fastmem_pl.run.trainer import FastMemTrainer
from fastmem_pl.search import SearchResult
from fastmem_pl.search.summary import print_search

_CLASS = "a class is given by class_path and init_args in a config"
_CLASSES = {
    "trainer.logger": f"allowed: {', '.join(LOGGERS)}, false, or one of Lightning's loggers with its "
    "arguments (class_path and init_args in a config)"
}
# What may be wrong with a class that was named, or with its arguments, amid what else a setting could be.
_CLASS_MISTAKE = re.compile(
    r"the following arguments are required: [\w, ]*\w(?= - )|Option '\w+' is not accepted"
    r"|module '[\w.]+' has no attribute '\w+'"
)


class FastMemArgumentParser(LightningArgumentParser):
    """Reports mistakes in one line, with the nearest name of a setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`FastMemError` with the parser's message on one line.

        Raises:
            FastMemError: always.
        """
        line = re.sub(r"\s+", " ", message).strip()
        wrong_type = re.search(r'Parser key "([^"]+)": Expected an? (.+?)\.? (?:Got|Given) value: (.+)', line)
        wrong_type = wrong_type or re.search(
            r'Parser key "([^"]+)": Does not validate against any of the Union subtypes Subtypes: \[(.+?)\] '
            r"Errors: .* Given value: (.+)",
            line,
        )
        wrong_class = wrong_type and _CLASS_MISTAKE.search(line)
        if wrong_class:
            field = wrong_type[1]
            name = re.search(r"class_path'?[:=] ?'(?:\w+\.)*(\w+)'", line[wrong_class.end() :])
            line = f"{field}: {f'{name[1]}: ' if name else ''}{wrong_class[0]}; {_CLASSES.get(field, _CLASS)}"
        elif wrong_type:
            field, kind, value = wrong_type.groups()
            line = f"{field}: {value!r} does not fit; allowed: {_readable(kind)}"
            if "list" in kind and not value.startswith("["):
                line += f"; quote it in the shell: --{field} '[{value}]'"
            line += nearest(value, re.findall(r"'([^']+)'", kind))
        raise FastMemError(line + self._suggestion(line)) from ex

    def _suggestion(self, message: str) -> str:
        unknown = re.search(
            r"unrecognized arguments: (\S+)|key '([^']+)' is not expected|not accept option '([^']+)'",
            message,
            re.IGNORECASE,
        )
        if not unknown:
            return ""
        name = next(group for group in unknown.groups() if group).split("=")[0].lstrip("-")
        known = sorted({action.dest for action in _all_actions(self) if action.dest})
        same_tail = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        match = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or same_tail[:1]
        return f"; did you mean --{match[0]}?" if match else "; see fastmem <command> --help"


def _readable(kind: str) -> str:
    """Turn ``<class 'int'>`` and ``typing.Literal['a', 'b']`` into words."""
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.(?:Literal\[(.*?)\])?", lambda m: m.group(1) or "", kind)


def _all_actions(parser: LightningArgumentParser) -> list[Any]:
    """Actions of the parser and of its subcommands."""
    actions = list(parser._actions)
    for action in parser._actions:
        for subparser in (getattr(action, "_name_parser_map", None) or {}).values():
            actions += subparser._actions
    return actions


class FastMemCLI(LightningCLI):
    """Subcommands fit-predict, fit and predict over :class:`FastMemTrainer`."""

    result: RunResult | SearchResult

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = list(kwargs["args"])
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Say what ``--config`` takes, which is resolved before this parser sees it."""
        parser = super().init_parser(**kwargs)
        for action in parser._actions:
            if action.dest == "config":
                action.help = (
                    "packaged configs (fastmem --help lists them) and YAML files, later ones on top of "
                    "earlier ones, with commas and no spaces between: smollm2,qa or mine.yaml"
                )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods and those of their arguments that the CLI fills in itself."""
        return {command: {"model", "datamodule"} for command in COMMANDS}

    def before_instantiate_classes(self) -> None:
        """Name the run folder after the configs."""
        config = self.config[self.subcommand]
        if config.get("run_dir") is None:
            files = [Path(str(f)) for f in config.get("config") or []]
            name = "-".join(file.stem for file in files) if files else config.data.task
            config["run_dir"] = str(Path("runs") / name)

    def instantiate_classes(self) -> None:
        """Make what the configuration names; classes of a user's choice may lack a package."""
        try:
            super().instantiate_classes()
        except FastMemError:
            raise
        except ValueError as error:
            line = " ".join(str(error).split())
            found = re.search(r"Problem with given class_path '([^']+)': (.+?)(?: - Expected an? |$)", line)
            if not found:
                raise
            raise FastMemError(f"{found[1]}: {found[2]}") from error

    def instantiate_trainer(self, **kwargs: Any) -> FastMemTrainer:
        """Make the trainer and hand it the resolved configuration."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except FastMemError:
            raise
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            message = " ".join(str(error).split())
            settings = self._get(self.config, "trainer").as_dict()
            named = [name for name in settings if re.search(rf"\b{name}\b", message)]
            raise FastMemError(f"{'.'.join(['trainer', *named[:1]])}: {message}") from error
        parser = self._parser(self.subcommand)
        trainer.config_text = parser.dump(self.config[self.subcommand], skip_none=False)
        trainer.command = [sys.executable, "-m", "fastmem_pl", *self.arguments]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        # Lightning looks for hooks named before_fit-predict, which no method can be called.
        self.result = getattr(self.trainer, subcommand)(**self._prepare_subcommand_kwargs(subcommand))


def run_command(arguments: list[str]) -> int:
    """Parse, run, and print what came out.

    Raises:
        FastMemError: for a mistake of the user's.
    """
    # Lightning sets its own log level and handler when it is imported, so this comes after.
    logging.getLogger("lightning").propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    description = "FastMem: memorize the context, then answer (arXiv 2406.16069)."
    cli = FastMemCLI(
        model_class=FastMemModule,
        datamodule_class=FastMemDataModule,
        trainer_class=FastMemTrainer,
        seed_everything_default=42,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_class=FastMemArgumentParser,
        parser_kwargs={
            "prog": "fastmem",
            "description": description,
            **{c: {"usage": USAGE.format(command=c), "description": description} for c in COMMANDS},
        },
        args=arguments,
    )
    result = cli.result
    if cli.trainer.processes.rank > 0:
        # The first process has printed it.
        return 0
    if isinstance(result, SearchResult):
        _print_search(result)
    elif result.mode == "fit":
        print(f"{result.num_samples} memories in {result.path / 'memories'}")
        if result.num_failed:
            print(f"{result.num_failed} of them failed (loss not finite) and hold the base model")
        print(f"answer with them: fastmem predict {shlex.join(arguments[1:])}")
    else:
        if result.added_scores:
            print(f"scores added: {', '.join(result.added_scores)}")
        elif not result.num_new:
            print("this run was complete already; nothing was left to do")
        print_run(result.path)
    _print_profile(result, bool(cli.trainer.profile))
    return 0


def _print_profile(result: RunResult | SearchResult, asked: bool) -> None:
    """Print the table of a profile, where one was made."""
    profile = getattr(result, "profile", None)
    if profile:
        print()
        make_console().print(profile_table(profile))
        print(f"profile: {result.path / 'profile'}")
    elif asked and getattr(result, "added_scores", None):
        print(f"profile: only scores were added; {result.path / 'profile'} stays as it was")
    elif asked and not result.num_new:
        print("profile: nothing was measured, as nothing was left to do; give another --run_dir")


def _print_search(result: SearchResult) -> None:
    if not result.num_new:
        print("this search was complete already; nothing was left to do")
    print_search(result.ranking, make_console())
    print(f"\nrun folder: {result.path} ({', '.join(result.files)})")
    print(f"answer with the best: fastmem fit-predict --config {shlex.quote(str(result.path / 'best.yaml'))}")
