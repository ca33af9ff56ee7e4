"""Searches that several test files look at."""

from search_runs import searches  # noqa: F401 (a fixture)
