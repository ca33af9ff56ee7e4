"""``fastmem report``: one HTML page and a Markdown table from run folders."""

from __future__ import annotations

import sys
from pathlib import Path

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli.options import CommandParser

DESCRIPTION = """\
Make one self-contained HTML page from the results of runs, and its tables as Markdown beside it.

  fastmem report runs/demo                                     writes runs/demo/report.html and report.md
  fastmem report runs/nqswap runs/xsum --out paper.html        methods x data sets, in one page
  fastmem report runs/lr1 runs/lr3 runs/zero-shot              the same data under several settings

The page opens without a network: tables with standard errors and paired tests against zero-shot, the paper's
values where settings are the paper's, charts, and a browser of all samples with their contexts and answers.
Runs over the same data are compared sample by sample; a run that was stopped is shown as far as it went.
`fastmem compare` prints the tables.
"""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for a mistake.
    """
    options = parser().parse(arguments)
    if not options.runs:
        raise FastMemError("report: give a run folder, such as runs/demo")
    page = _target(options.out, options.runs, options.force)

    from fastmem_pl.base.files import write_atomic
    from fastmem_pl.report.collect import collect
    from fastmem_pl.report.document import html, markdown

    comparison = collect(options.runs, options.data)
    title = options.title or "FastMem: " + ", ".join(run.label for run in comparison.runs)
    if sys.stderr.isatty():
        samples = sum(len({record["index"] for record in run.records}) for run in comparison.runs)
        print(f"{samples:,} samples: drawing charts ...", file=sys.stderr)
    texts = {page: html(comparison, title), page.with_suffix(".md"): markdown(comparison, title)}
    for path, text in texts.items():
        try:
            write_atomic(path, text)
        except OSError as error:
            raise FastMemError(f"report: cannot write {path}: {error.strerror}") from error
    for run in comparison.runs:
        for notice in run.notices:
            print(f"fastmem: {notice}", file=sys.stderr)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)\n{page.with_suffix('.md')}")
    return 0


def _target(out: str | None, runs: list[str], force: bool) -> Path:
    """The page's path; checked before the work.

    Raises:
        FastMemError: when it cannot be written there, or would replace a file that is not from a report.
    """
    path = Path(out or (Path(runs[0], "report.html") if len(runs) == 1 else "report.html"))
    if path.is_dir():
        raise FastMemError(f"--out: {path} is a folder; give a file, such as {path / 'report.html'}")
    if out is not None and path.suffix.lower() not in (".html", ".htm"):
        raise FastMemError(f"--out: {path} is no name of a page; give one that ends in .html")
    if out is not None and not path.parent.is_dir():
        raise FastMemError(f"--out: there is no folder {path.parent}")
    if path.with_suffix(".md").is_dir():
        raise FastMemError(f"--out: the tables go to {path.with_suffix('.md')}, which is a folder")
    from fastmem_pl.report.document import is_ours

    for file in (path, path.with_suffix(".md")):
        if file.exists() and not force and not is_ours(file):
            raise FastMemError(
                f"--out: {file} exists and is not from fastmem report; give --force to replace it, or "
                "another --out"
            )
    return path


def parser() -> CommandParser:
    """The command's options."""
    made = CommandParser(prog="fastmem report", description=DESCRIPTION)
    made.add_argument("runs", nargs="*", metavar="RUN", help="run folder")
    made.add_argument(
        "--data",
        metavar="FILE",
        help="the data file, where it is not where the run found it; contexts and prompts are read from it",
    )
    made.add_argument(
        "--out", metavar="FILE.html", help="default: report.html in the run folder, or here for several runs"
    )
    made.add_argument("--title", metavar="TEXT", help="heading of the page")
    made.add_argument(
        "--force", action="store_true", help="replace files at --out that fastmem report did not write"
    )
    return made
