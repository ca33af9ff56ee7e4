"""Which samples go through the model together: of like length, and as many as there is room for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


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
        bounds = [self.samples]
        if self.tokens is not None:
            bounds.append(self.tokens // max(1, longest))
        if self.fitting is not None:
            bounds.append(self.fitting(longest))
        return max(1, min(bounds))


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
