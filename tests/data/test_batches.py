"""Batches of like length, within their bounds."""

import pytest

from fastmem_pl import FastMemDataModule
from fastmem_pl.data import BatchLimits
from fastmem_pl.data.batches import plan
from fastmem_pl.data.datamodule import ShareSampler

LENGTHS = [5, 100, 7, 90, 3000, 1, 6]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (BatchLimits(3), [[4, 1, 3], [2, 6, 0], [5]]),
        (BatchLimits(3, tokens=200), [[4], [1, 3], [2, 6, 0], [5]]),
        (BatchLimits(99, tokens=1), [[4], [1], [3], [2], [6], [0], [5]]),
        (BatchLimits(4, fitting=lambda longest: 2 if longest > 50 else 9), [[4, 1], [3, 2], [6, 0, 5]]),
        (BatchLimits(4, fitting=lambda longest: -3), [[4], [1], [3], [2], [6], [0], [5]]),
    ],
)
def test_plan(limits, expected):
    assert plan(LENGTHS, limits) == expected


def test_planned_batches_are_what_the_loader_gives():
    data = FastMemDataModule()
    data.setup()
    data.skip({0, 1})
    lengths = [len(sample.context) for sample in data.remaining]
    data.use_plan(data.plan(lengths, BatchLimits(8, tokens=8 * 150)))
    batches = list(data.predict_dataloader())
    assert sorted(sample.index for batch in batches for sample in batch) == list(range(2, 60))
    for batch in batches:
        assert len(batch) * max(len(sample.context) for sample in batch) <= 8 * 150 or len(batch) == 1
    longest = [max(len(sample.context) for sample in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert len({len(batch) for batch in batches}) > 1


@pytest.mark.parametrize(("batches", "processes"), [(7, 3), (2, 3), (0, 2), (6, 2), (1, 1)])
def test_processes_share_batches_out_and_some_may_have_none(batches, processes):
    shares = [ShareSampler(range(batches), processes, rank) for rank in range(processes)]
    places = [place for share in shares for place in share]
    assert sorted(places) == list(range(batches))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_plan_of_other_samples_is_an_error():
    data = FastMemDataModule(limit=4)
    data.setup()
    with pytest.raises(ValueError, match="3 lengths for 4 samples"):
        data.plan([1, 2, 3], BatchLimits(8))


def test_without_a_plan_there_are_batches_all_the_same():
    data = FastMemDataModule(limit=10)
    data.setup()
    assert [len(batch) for batch in data.predict_dataloader()] == [8, 2]
    data.skip(range(9))
    assert [len(batch) for batch in data.predict_dataloader()] == [1]
