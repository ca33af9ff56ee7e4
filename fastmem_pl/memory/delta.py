"""The trained part of a memory, and the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class FFNDelta(nn.Module):
    """Weight changes of one FFN for ``B`` samples: ``gate``, ``up`` ``(B, F, D)``, ``down`` ``(B, D, F)``.

    They stay float32 whatever precision plugin converts the surrounding module: in bfloat16 the
    optimizer's second moment (decay 0.999) would not move.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], num_samples: int, device: torch.device) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(num_samples, *shape, device=device, dtype=torch.float32))
                for name, shape in shapes.items()
            }
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FFNDelta:
        super()._apply(fn, recurse)
        for parameter in self.weights.values():
            parameter.data = parameter.data.float()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The deltas by projection name."""
        return dict(self.weights.items())


class DeltaAdamW(torch.optim.AdamW):
    """AdamW on deltas that decays the weights they belong to.

    Training ``W + delta`` with decoupled decay ``c = lr * weight_decay`` maps ``delta`` to
    ``(1 - c) * delta - c * W - update``: plain AdamW on the delta would leave out ``c * W``.

    Args:
        pairs: ``(delta (B, out, in), base weight (out, in))``.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        round_weights: keep ``W + delta`` at what float32 weights can hold, as editing them does. Updates of
            one size then round alike (at 1e-5, by +0.14% wherever the weight is between 0.25 and 1).
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: float,
        weight_decay: float,
        round_weights: bool = False,
    ) -> None:
        self._pairs = list(pairs)
        self._round_weights = round_weights
        deltas = [delta for delta, _ in self._pairs]
        fused = all(delta.device.type in ("cpu", "cuda") for delta in deltas)
        super().__init__(deltas, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=fused or None)
        self._weight_decay = weight_decay

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; a given ``closure`` is evaluated before anything changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decay = self.param_groups[0]["lr"] * self._weight_decay
        with torch.no_grad():
            for delta, base in self._pairs:
                if self._round_weights:
                    delta.copy_((base.float() + delta).mul_(1 - decay) - base)
                else:
                    delta.mul_(1 - decay).add_(base, alpha=-decay)
            super().step()
            for delta, base in self._pairs if self._round_weights else ():
                delta.copy_((base.float() + delta) - base)
        return loss
