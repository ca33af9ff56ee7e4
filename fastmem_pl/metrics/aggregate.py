"""torchmetrics over samples: means with standard errors, and the paired test between methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of one number per sample, with its standard error.

    >>> mean = SampleMean()
    >>> mean.update([1.0, 0.0, 1.0, 1.0])
    >>> mean.compute().item(), round(mean.standard_error().item(), 4)
    (0.75, 0.25)
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Sequence[float] | Tensor) -> None:
        """Add values, one a sample."""
        values = torch.as_tensor(values, dtype=torch.float64, device=self.total.device)
        self.total += values.sum()
        self.squares += values.square().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Return the mean, NaN without samples."""
        return self.total / self.count

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean, ``s / sqrt(n)``; NaN below two samples."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0) * self.count / (self.count - 1)
        return (variance / self.count).sqrt() if self.count > 1 else torch.full_like(mean, float("nan"))


class McNemar(Metric):
    """Exact McNemar test of two methods on the same samples (McNemar, 1947; binomial form).

    >>> test = McNemar()
    >>> test.update([0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1])
    >>> test.compute().item()
    0.03125
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
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
