"""Which samples go through the model together: of like length, and as many as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class BatchLimits:
    """What bounds a batch.

    Attributes:
        tokens: most padded tokens, samples times the longest; ``None`` for no bound.
        fitting: how many samples fit in memory, given the tokens of the longest; ``None`` for no bound.
        shortest: least length of a sample as a share of the longest; what is shorter starts a batch of its
            own.
    """

    samples: int
    tokens: int | None = None
    fitting: Callable[[int], int] | None = None
    shortest: float = 0.0

    def most(self, longest: int) -> int:
        """Samples of a batch whose longest has ``longest`` tokens; at least one."""
        most = self.samples
        if self.tokens is not None:
            most = min(most, self.tokens // max(1, longest))
        if self.fitting is not None:
            most = min(most, self.fitting(longest))
        return max(1, most)


class ShareSampler(DistributedSampler):
    """The batches of one process: its share of all, none of them twice, and none at all if they are few.

    Lightning would put in a sampler of its own, which refuses an empty share, for anything that is no
    :class:`DistributedSampler`.
    """

    def __init__(self, batches: Sequence[Any], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(batches, num_replicas, rank, shuffle=False)
        # The first ranks get the longest of every round.
        self._places = range(rank, len(batches), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def plan(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Divide items of these lengths into batches of their numbers, the longest first.

    >>> plan([5, 100, 7, 90], BatchLimits(samples=3, shortest=0.5))
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    room, longest = 0, 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room == 0 or lengths[item] < limits.shortest * longest:
            batches.append([])
            longest = lengths[item]
            room = limits.most(longest)
        batches[-1].append(item)
        room -= 1
    return batches
