"""The LightningCLI of the commands that go over samples: fit-predict, fit, predict and search."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import shlex
from typing import ClassVar

from jsonargparse._actions import _ActionConfigLoad
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli.configs import as_arguments, take_configs
from fastmem_pl.cli.parser import OneLineParser
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.report import print_run
from fastmem_pl.report.table import profile_table
from fastmem_pl.report.terminal import make_console
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.session import RunResult
from fastmem_pl.run.trainer import FastMemTrainer
from fastmem_pl.search import SearchResult, SearchTrainer
from fastmem_pl.search.summary import print_search

_USAGE = (
    "fastmem {command} --config NAME_OR_FILE[,NAME_OR_FILE ...] [--data.path FILE] [--run_dir DIR]\n"
    "       [--model.backbone NAME] [--model.memorize.OPTION VALUE] [--model.decode.OPTION VALUE] [options]"
)
_CONFIG_HELP = (
    "packaged configs (fastmem --help lists them) and YAML files, later ones on top of earlier ones, with "
    "commas and no spaces between: smollm2,qa or mine.yaml"
)


# Groups of options in the order of the help, by what their names begin with: what people set comes first.
_GROUPS = ("run_dir", "data", "model", "search", "trainer")
# What the help says of options that take a whole group from a file, of which one takes a name as well.
_NAMED = {"model.backbone": ("NAME", "a Hub id, a folder, a .gguf file, or demo for the packaged model")}


def own_trainer_options() -> set[str]:
    """Options of the trainer that FastMemTrainer documents itself; Lightning has the others."""
    names = set(inspect.signature(FastMemTrainer.__init__).parameters) - {"self", "kwargs"}
    return {f"trainer.{name}" for name in names} | {"trainer.accelerator", "trainer.num_nodes"}


# Of those, what nobody needs to see on the way to a first run.
_RARE = {
    f"trainer.{name}"
    for name in ("inference_mode", "enable_checkpointing", "enable_model_summary", "callbacks")
}


class LightningParser(OneLineParser, LightningArgumentParser):
    """Lightning's parser with one-line errors, and a help that opens with what people set.

    Attributes:
        show_all: whether the help has all options of the trainer, or a line on those that are rarely set.
    """

    show_all: ClassVar[bool] = False

    allowed: ClassVar[dict[str, str]] = {
        "trainer.logger": "allowed: csv, tensorboard, wandb, mlflow, false, or one of Lightning's loggers "
        "with its arguments (class_path and init_args in a config)"
    }

    def format_help(self) -> str:
        """Help in the order of what people set, with a line at the end on what they hardly do."""

        def place(group: argparse._ArgumentGroup) -> int:
            names = {action.dest.partition(".")[0] for action in group._group_actions}
            return next((number for number, name in enumerate(_GROUPS, 1) if name in names), 0)

        self._action_groups.sort(key=place)
        own, hidden = own_trainer_options() - _RARE, 0
        for action in self._actions:
            rare = action.dest.startswith("trainer.") and action.dest not in own
            if action.dest == "config":
                action.help = _CONFIG_HELP
            elif action.dest in _NAMED and isinstance(action, _ActionConfigLoad):
                action.metavar, action.help = _NAMED[action.dest]
            elif not self.show_all and (
                rare or isinstance(action, _ActionConfigLoad) or action.dest.endswith(".help")
            ):
                hidden += rare and not action.dest.endswith(".help")
                action.help = argparse.SUPPRESS
        command = self.prog.replace(" [options]", "")
        more = f"{hidden} more options are those of Lightning's trainer: {command} --help lightning"
        self.epilog = more if hidden else None
        return super().format_help()


class FastMemCLI(LightningCLI):
    """The methods of :class:`SearchTrainer` as commands."""

    def subcommands(self) -> dict[str, set[str]]:
        """The method of the trainer that was asked for; parsers of the others cost half a second each."""
        return {name: {"model", "datamodule"} for name in self.parser_kwargs if name != "prog"}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse the settings of all configs and the options on top of them."""
        configs, options = take_configs(args[1:])
        try:
            super().parse_arguments(parser, [args[0], *as_arguments(configs, options)])
        except FastMemError as error:
            raise configs.name_file(error, options) from error

    def instantiate_classes(self) -> None:
        """Make what the settings name; a class of the user's choice may refuse, or lack a package."""
        try:
            super().instantiate_classes()
        except FastMemError:
            raise
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            message = " ".join(str(error).split())
            named_class = re.search(
                r"Problem with given class_path '([^']+)': (.+?)(?: - Expected an? |$)", message
            )
            if named_class:
                raise FastMemError(f"{named_class[1]}: {named_class[2]}") from error
            if not hasattr(self, "model"):
                raise
            # The trainer's own settings, then.
            names = self._get(self.config, "trainer").as_dict()
            named = [name for name in names if re.search(rf"\b{name}\b", message)]
            raise FastMemError(f"{'.'.join(['trainer', *named[:1]])}: {message}") from error
        parser = self._parser(self.subcommand)
        self.trainer.config_text = parser.dump(self.config[self.subcommand], skip_none=False)


def run(arguments: list[str]) -> int:
    """Run a command with its options and print the results; returns the exit status."""
    if len(arguments) == 1:
        # Defaults are the paper's, for models of 4B and more: nobody wants them for the packaged one.
        raise FastMemError(
            f"{arguments[0]}: say what to work on: --config NAME_OR_FILE, such as --config demo or --config "
            "smollm2,qa --data.path FILE (fastmem --help lists the packaged ones)"
        )
    # Lightning sets its own log level and handler when it is imported, so this comes after.
    logging.getLogger("lightning").propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    LightningParser.show_all = arguments[1:] == ["--help", "lightning"]
    if LightningParser.show_all:
        arguments = arguments[:2]
    cli = FastMemCLI(
        model_class=FastMemModule,
        datamodule_class=FastMemDataModule,
        trainer_class=SearchTrainer,
        seed_everything_default=42,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_class=LightningParser,
        parser_kwargs={
            "prog": "fastmem",
            arguments[0]: {"usage": _USAGE.format(command=arguments[0])},
        },
        args=arguments,
    )
    if cli.trainer.global_rank == 0:
        _print_result(cli.trainer.result, bool(cli.trainer.profile), arguments[1:])
    return 0


def _print_result(result: RunResult | SearchResult, profiled: bool, options: list[str]) -> None:
    if isinstance(result, SearchResult):
        if not result.num_new:
            print("this search was complete already; nothing was left to do")
        print_search(result.ranking, make_console())
        print(f"\nrun folder: {result.path} ({', '.join(result.files)})")
        best = shlex.quote(str(result.path / "best.yaml"))
        print(f"answer with the best: fastmem fit-predict --config {best}")
        return
    if result.mode == "fit":
        print(f"{result.num_samples} memories in {result.path / 'memories'}")
        if result.num_failed:
            print(f"{result.num_failed} of them failed (loss not finite) and hold the base model")
        print(f"answer with them: fastmem predict {shlex.join(options)}")
    else:
        if result.added_scores:
            print(f"scores added: {', '.join(result.added_scores)}")
        elif not result.num_new:
            print("this run was complete already; nothing was left to do")
        print_run(result.path)
    if result.profile:
        print()
        make_console().print(profile_table(result.profile))
        print(f"profile: {result.path / 'profile'}")
    elif profiled and result.added_scores:
        print(f"profile: only scores were added; {result.path / 'profile'} stays as it was")
    elif profiled and not result.num_new:
        print("profile: nothing was measured, as nothing was left to do; give another --run_dir")
