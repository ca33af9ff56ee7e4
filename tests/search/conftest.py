"""Searches that several test files look at, and a score that stands for one by a model."""

from collections.abc import Callable

import pytest
from search_runs import searches  # noqa: F401 (a fixture)


@pytest.fixture
def score(monkeypatch) -> Callable[[str], float]:
    """A score of an answer, in the place of one by a model."""

    def count(answer: str) -> float:
        return len(set(answer)) / 100

    load = "fastmem_pl.run.scoring.load_metric_model"
    monkeypatch.setattr(load, lambda *args: lambda answers, contexts: list(map(count, answers)))
    return count
