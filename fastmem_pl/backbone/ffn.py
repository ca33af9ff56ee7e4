"""One frozen feed-forward network that can be applied with per-sample weight deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem_pl.backbone.families import Projection

Delta = Mapping[str, Tensor]
"""Weight changes by projection name: ``gate``, ``up`` ``(B, F, D)`` and ``down`` ``(B, D, F)``."""


@dataclass(frozen=True)
class BaseActivations:
    """What the base weights make of one FFN input; constant over all memorization steps.

    Attributes:
        projections: ``gate`` (if gated) and ``up`` pre-activations, ``(B, T, F)`` float32.
        hidden: input of the down projection, ``(B, T, F)`` float32.
        output: ``(B, T, D)`` float32.
    """

    projections: dict[str, Tensor]
    hidden: Tensor
    output: Tensor


class FFN:
    """A gated or plain FFN with frozen weights, shared by all samples of a batch.

    Products run in ``dtype``; everything between them is float32. The memorized output is computed as
    the base output plus a correction whose factors are small numbers of their own scale::

        y = y_base + (a - a_base) @ W_down^T + a @ down_delta^T

    which equals ``a @ (W_down + down_delta)^T`` in exact arithmetic, and in bfloat16 keeps changes
    that rounding the sum ``W + delta`` would lose.
    """

    def __init__(
        self,
        projections: Mapping[str, Projection],
        activation: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.activation = activation
        self.base_weights = {name: p.weight for name, p in projections.items()}
        self._weights = {name: p.weight.to(dtype) for name, p in projections.items()}
        self._biases = {name: p.bias for name, p in projections.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape ``(out, in)`` of each projection."""
        return {name: weight.shape for name, weight in self.base_weights.items()}

    def base(self, ffn_input: Tensor) -> BaseActivations:
        """Apply the base weights to ``ffn_input`` ``(B, T, D)``."""
        inner = [name for name in self._weights if name != "down"]
        projections = {name: self._with_bias(name, self._product(ffn_input, name)) for name in inner}
        hidden = self._combine(projections)
        output = self._with_bias("down", self._product(hidden, "down"))
        return BaseActivations(projections, hidden, output)

    def memorized(self, ffn_input: Tensor, delta: Delta, base: BaseActivations) -> Tensor:
        """Apply base weights plus ``delta`` (one row a sample) and return ``(B, T, D)`` float32.

        Args:
            ffn_input: ``(B, T, D)``.
            delta: weight changes with leading dimension ``B``.
            base: :meth:`base` of the same input.
        """
        projections = {
            name: value + self._delta_product(ffn_input, delta[name])
            for name, value in base.projections.items()
        }
        hidden = self._combine(projections)
        change = self._product(hidden - base.hidden, "down")
        return base.output + change + self._delta_product(hidden, delta["down"])

    def _combine(self, projections: Mapping[str, Tensor]) -> Tensor:
        if "gate" in projections:
            return self.activation(projections["gate"]) * projections["up"]
        return self.activation(projections["up"])

    def _product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.to(self.dtype), self._weights[name]).float()

    def _delta_product(self, x: Tensor, delta: Tensor) -> Tensor:
        return torch.bmm(x.to(self.dtype), delta.to(self.dtype).transpose(1, 2)).float()

    def _with_bias(self, name: str, value: Tensor) -> Tensor:
        bias = self._biases[name]
        return value if bias is None else value + bias.float()
