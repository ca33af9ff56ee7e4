"""Searching for good settings: many points on one pass of the trunk, one fit and one prompt."""

from fastmem_pl.search.grid import OptunaSettings, SearchSettings
from fastmem_pl.search.job import SearchResult
from fastmem_pl.search.ranking import RankedPoint, Ranking, rank
from fastmem_pl.search.trainer import SearchTrainer

__all__ = [
    "OptunaSettings",
    "RankedPoint",
    "Ranking",
    "SearchResult",
    "SearchSettings",
    "SearchTrainer",
    "rank",
]
