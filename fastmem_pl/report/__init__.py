"""Reports made from the files of a run folder."""

from fastmem_pl.report.terminal import print_run

__all__ = ["print_run"]
