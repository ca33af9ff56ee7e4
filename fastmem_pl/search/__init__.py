"""Searching for good settings: many points on one pass of the trunk, one fit and one prompt."""

from fastmem_pl.search.grid import OptunaSettings, SearchSettings
from fastmem_pl.search.grid_search import SearchResult, run_search
from fastmem_pl.search.ranking import RankedPoint, Ranking, rank

__all__ = [
    "OptunaSettings",
    "RankedPoint",
    "Ranking",
    "SearchResult",
    "SearchSettings",
    "rank",
    "run_search",
]
