"""``fastmem report`` and ``fastmem compare``: results of runs as a page, and as tables in the terminal."""

from pathlib import Path

from fastmem_pl.base.errors import FastMemError, say
from fastmem_pl.base.files import write_atomic


def report(
    runs: list[str],
    *,
    data: str | None = None,
    out: str | None = None,
    title: str | None = None,
    force: bool = False,
) -> None:
    """Make one self-contained HTML page from the results of runs, and its tables as Markdown beside it.

      fastmem report runs/demo                                     writes runs/demo/report.html and report.md
      fastmem report runs/nqswap runs/xsum --out paper.html        methods x data sets, in one page
      fastmem report runs/lr1 runs/lr3 runs/zero-shot              the same data under several settings

    The page opens without a network: tables with standard errors and paired tests against zero-shot, the
    paper's values where settings are the paper's, charts, and a browser of all samples with their contexts
    and answers. Runs over the same data are compared sample by sample; a run that was stopped is shown as far
    as it went. `fastmem compare` prints the tables.

    Args:
        runs: run folder.
        data: the data file, where it is not where the run found it; contexts and prompts are read from it.
        out: page to write, FILE.html (default: report.html in the run folder, or here for several runs).
        title: heading of the page.
        force: replace files at --out that fastmem report did not write.
    """
    if not runs:
        raise FastMemError("report: give a run folder, such as runs/demo")
    page = Path(out or (Path(runs[0], "report.html") if len(runs) == 1 else "report.html"))
    if out is not None and page.suffix.lower() not in (".html", ".htm"):
        raise FastMemError(f"--out: {page} is no name of a page; give one that ends in .html")
    if out is not None and not page.parent.is_dir():
        raise FastMemError(f"--out: there is no folder {page.parent}")
    tables = page.with_suffix(".md")

    from fastmem_pl.report.collect import collect
    from fastmem_pl.report.document import html, is_ours, markdown, notices

    for file in (page, tables):
        if file.is_dir():
            raise FastMemError(f"--out: {file} is a folder; give a file, such as {file / 'report.html'}")
        if file.exists() and not force and not is_ours(file):
            raise FastMemError(f"--out: {file} exists and is not from fastmem report; give --force")
    comparison = collect(runs, data)
    heading = title or "FastMem: " + ", ".join(run.label for run in comparison.runs)
    for path, text in ((page, html(comparison, heading)), (tables, markdown(comparison, heading))):
        try:
            write_atomic(path, text)
        except OSError as error:
            raise FastMemError(f"report: cannot write {path}: {error.strerror}") from error
    for notice in notices(comparison):
        say(notice)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)\n{tables}")


def compare(runs: list[str]) -> None:
    """Print the results of runs side by side: method x data set, with standard errors and paired tests.

      fastmem compare runs/demo
      fastmem compare runs/lr1 runs/lr3 runs/zero-shot

    Runs over the same data are compared sample by sample. `fastmem report` makes a page of the same tables.

    Args:
        runs: run folder.
    """
    if not runs:
        raise FastMemError("compare: give a run folder, such as runs/demo")

    from fastmem_pl.report.collect import collect
    from fastmem_pl.report.document import notices, result_tables
    from fastmem_pl.report.terminal import make_console, print_comparison

    comparison = collect(runs, contexts=False)
    print_comparison(result_tables(comparison), notices(comparison), make_console(160))
