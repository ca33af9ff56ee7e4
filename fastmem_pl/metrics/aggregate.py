"""torchmetrics over samples: means with standard errors, and the paired test between methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of one number per sample, with its standard error.

    Both are the same to the last bit in whatever order, batches and processes the values come.

    Args:
        kwargs: as :class:`torchmetrics.Metric`.

    >>> mean = SampleMean()
    >>> mean.update([1.0, 0.0, 1.0, 1.0])
    >>> mean.compute().item(), round(mean.standard_error().item(), 4)
    (0.75, 0.25)
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Sequence[float] | Tensor) -> None:
        """Add values, one a sample."""
        self.values.append(torch.as_tensor(values, dtype=torch.float64, device=self.device))

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(part.numel() for part in self._parts())

    def compute(self) -> Tensor:
        """Return the mean, NaN without samples."""
        return self._sorted().mean()

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean, ``s / sqrt(n)``; NaN below two samples."""
        values = self._sorted()
        return values.std() / values.numel() ** 0.5 if len(values) > 1 else values.new_tensor(float("nan"))

    def _sorted(self) -> Tensor:
        # Rounding depends on the order in which numbers are added.
        parts = self._parts()
        return torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.float64)

    def _parts(self) -> list[Tensor]:
        # After a synchronization torchmetrics leaves one tensor.
        return [self.values] if isinstance(self.values, Tensor) else self.values


class McNemar(Metric):
    """Exact McNemar test of two methods on the same samples (McNemar, 1947; binomial form).

    Args:
        kwargs: as :class:`torchmetrics.Metric`.

    >>> test = McNemar()
    >>> test.update([0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1])
    >>> test.compute().item()
    0.03125
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("gained", "lost"):
            self.add_state(name, torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, baseline: Sequence[float], method: Sequence[float]) -> None:
        """Add pairs of 0/1 outcomes of the same samples."""
        before, after = torch.as_tensor(baseline).bool(), torch.as_tensor(method).bool()
        self.gained += (~before & after).sum().to(self.gained.device)
        self.lost += (before & ~after).sum().to(self.lost.device)

    def compute(self) -> Tensor:
        """Return the two-sided p-value of "gains and losses are equally likely"."""
        gained, lost = int(self.gained), int(self.lost)
        p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        return torch.tensor(p_value, dtype=torch.float64)
