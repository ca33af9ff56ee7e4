"""One sample at many points: what is shared, what is split, and what an error costs."""

import pytest
import torch
from conftest import make_module

from fastmem_pl import FastMemDataModule
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.memory import Memorizer
from fastmem_pl.search import SearchSettings
from fastmem_pl.search import evaluate as evaluate_module
from fastmem_pl.search.evaluate import SampleSearch

GRID = {"learning_rate": [1e-4, 1e-3, 3e-3], "steps": [2, 4], "kl_coeff": [0.1, 1.0]}


@pytest.fixture
def model(tiny):
    module = make_module(methods=["zero-shot", "fastmem"], max_new_tokens=6)
    module.load_backbone("32-true", tiny.device, tiny)
    return module


@pytest.fixture
def sample():
    data = FastMemDataModule(limit=1)
    data.setup()
    return data.samples[0]


@pytest.fixture
def search(model, sample):
    """Searches with one sample, by default at all points; gives records by point."""

    def go(points=None):
        points = points or SearchSettings(grid=GRID).points(model)
        found = SampleSearch(model, sample, SearchSettings().chosen_method()).run(points)
        return {tuple(record["point"].values()): record for record in found}

    return go


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record["token_ids"] == expected[key]["token_ids"]
        assert record["curve"]["cross_entropy"] == pytest.approx(expected[key]["curve"]["cross_entropy"])


def test_chunks_of_rows_change_nothing_and_read_the_context_once(search, model, monkeypatch):
    together = search()
    assert len(together) == 12
    chunks, answer = [], SampleSearch._answer_rows
    contexts, read = [], type(model.memorizer).read

    def answering(self, rows):
        chunks.append(len(rows))
        return answer(self, rows)

    def reading(self, encoded):
        contexts.append(len(encoded))
        return read(self, encoded)

    monkeypatch.setattr(evaluate_module, "_MOST_ROWS", 4)
    monkeypatch.setattr(SampleSearch, "_answer_rows", answering)
    monkeypatch.setattr(type(model.memorizer), "read", reading)
    assert_same(search(), together)
    assert (chunks, contexts) == ([4, 2], [1])


def test_out_of_memory_halves_the_rows_and_loses_nothing(search, monkeypatch, caplog):
    expected, original = search(), Memorizer.snapshots

    def tight(self, read, rows, stops):
        for steps, memory in original(self, read, rows, stops):
            # After the first snapshot has been answered.
            if len(rows) > 2 and steps == stops[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield steps, memory

    monkeypatch.setattr(Memorizer, "snapshots", tight)
    assert_same(search(), expected)
    assert "out of memory with 6 samples at once; trying 3" in caplog.text


def test_out_of_memory_with_one_row_is_one_line(search, monkeypatch):
    def none_fits(self, read, rows, stops):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(Memorizer, "snapshots", none_fits)
    with pytest.raises(FastMemError, match="out of memory with 1 sample"):
        search()


def test_points_of_unlike_steps_need_not_fill_the_grid(search):
    """As when a search goes on with some points done, or trials differ in their steps."""
    whole = search()
    keys = [(1e-4, 2, 0.1), (3e-3, 4, 0.1), (1e-3, 2, 1.0), (1e-3, 4, 1.0)]
    assert_same(
        search([dict(zip(GRID, key, strict=True)) for key in keys]), {key: whole[key] for key in keys}
    )
