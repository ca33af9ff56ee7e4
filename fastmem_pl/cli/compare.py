"""``fastmem compare``: the tables of a report in the terminal."""

from __future__ import annotations

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli.options import CommandParser

DESCRIPTION = """\
Print the results of runs side by side: method x data set, with standard errors and paired tests.

  fastmem compare runs/demo
  fastmem compare runs/lr1 runs/lr3 runs/zero-shot

Runs over the same data are compared sample by sample. `fastmem report` makes a page of the same tables.
"""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for a mistake.
    """
    options = parser().parse(arguments)
    if not options.runs:
        raise FastMemError("compare: give a run folder, such as runs/demo")

    from fastmem_pl.report.collect import collect
    from fastmem_pl.report.document import notices, result_tables
    from fastmem_pl.report.terminal import make_console, print_comparison

    comparison = collect(options.runs, contexts=False)
    print_comparison(result_tables(comparison), notices(comparison), make_console(160))
    return 0


def parser() -> CommandParser:
    """The command's options."""
    made = CommandParser(prog="fastmem compare", description=DESCRIPTION)
    made.add_argument("runs", nargs="*", metavar="RUN", help="run folder")
    return made
