"""Reports made from the files of a run folder."""

from fastmem_pl.report.terminal import comparison_lines, differing_samples, method_table, print_run

__all__ = ["comparison_lines", "differing_samples", "method_table", "print_run"]
