"""Experts of a mixture as one FFN that is as wide as all that a sample's memory holds.

While a context is memorized, the router and its input stay what they are, so each position's experts do, too.
A memory holds changes of the experts that its context uses most. Computed side by side they are a single wide
FFN with weights of its own for every sample: what a position's router gives to an expert scales that expert's
part of the hidden units, with zero where it goes elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastmem_pl.backbone.ffn import BaseActivations, Delta, DeltaProduct

# Hidden units of the experts that a memory holds, where their number is left open: about as many as the FFN
# of a dense model of 8 billion weights has.
_HIDDEN_UNITS = 16384


@dataclass(frozen=True)
class Routing:
    """Where a router sends positions: experts and their weights, ``(B, T, k)``.

    ``output`` is what the base model's experts give, ``(B, T, D)``; ``chosen`` are the experts of each
    sample's memory, ``(B, K)``, with -1 where it has fewer.
    """

    index: Tensor
    weights: Tensor
    output: Tensor
    chosen: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Change all that is by position; which experts were chosen is not."""
        return replace(
            self, index=change(self.index), weights=change(self.weights), output=change(self.output)
        )

    def shares(self) -> Tensor:
        """Weights of the chosen experts at each position, ``(B, T, K)`` float32."""
        same = self.index[..., None] == self.chosen[:, None, None, :]
        return (same * self.weights[..., None].float()).sum(2)


class RoutedFFN:
    """Experts with frozen weights; deltas are ``up`` ``(B, K * R, D)`` and ``down`` ``(B, D, K * F)``.

    ``R`` rows of an expert's first matrix (gate and up together, in the order of the model) make ``F`` hidden
    units. Products run in ``dtype``; everything between them is float32.
    """

    def __init__(self, experts: nn.Module, dtype: torch.dtype, count: int | None = None) -> None:
        self.dtype, self._experts = dtype, experts
        first, last = ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"
        self._names = first, last
        self._up, self._down = (getattr(experts, name).detach() for name in self._names)
        if experts.is_transposed:
            self._up, self._down = self._up.transpose(1, 2), self._down.transpose(1, 2)
        self._up_bias = getattr(experts, f"{first}_bias", None) if experts.has_bias else None
        total, self._hidden_size, width = self._down.shape
        self.count = min(total, count or max(_HIDDEN_UNITS // width, 1))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """``(out, in)`` by projection, for ``count`` experts."""
        width = self.count * self._down.shape[2]
        return {
            "up": torch.Size((self.count * self._up.shape[1], self._hidden_size)),
            "down": torch.Size((self._hidden_size, width)),
        }

    def base_weights(self, chosen: Tensor) -> dict[str, Tensor]:
        """Weights of the chosen experts, of the shapes of deltas."""
        index = chosen.clamp(min=0)
        up = self._up[index].flatten(1, 2)
        return {"up": up, "down": self._down[index].transpose(1, 2).flatten(2)}

    def choose(self, passes: Sequence[tuple[Routing, Tensor]]) -> Tensor:
        """The experts most used in all passes where a mask ``(B, T)`` holds, ``(B, K)``, most used first."""
        counts = torch.zeros(len(passes[0][1]), len(self._up) + 2, device=self._up.device)
        for routing, mask in passes:
            # Some routers say by a number too high that a position goes nowhere.
            used = (routing.index + 1) * mask[..., None]
            counts.scatter_add_(1, used.flatten(1), torch.ones_like(used, dtype=counts.dtype).flatten(1))
        most, chosen = counts[:, 1 : len(self._up) + 1].topk(self.count, dim=1)
        return chosen.masked_fill(most == 0, -1)

    def base(self, ffn_input: Tensor, routing: Routing) -> BaseActivations:
        """Apply the base weights to ``(B, T, D)``; of the chosen experts, what a change starts from."""
        output = routing.output.float()
        if routing.chosen is None:
            return BaseActivations({}, None, output)
        weights = {name: w.to(self.dtype) for name, w in self.base_weights(routing.chosen).items()}
        up = torch.bmm(ffn_input.to(self.dtype), weights["up"].transpose(1, 2))
        if self._up_bias is not None:
            up = up.float() + self._up_bias[routing.chosen.clamp(min=0)].float().flatten(1)[:, None]
        shares = routing.shares()
        return BaseActivations(
            {"up": up}, self._combine(up.float(), shares), output, of_rows=(weights, shares)
        )

    def memorized(self, ffn_input: Tensor, delta: Delta, base: BaseActivations) -> Tensor:
        """Apply base weights plus ``delta`` to ``(B, T, D)``, given its :meth:`base`; float32."""
        weights, shares = base.of_rows
        change = DeltaProduct.apply(ffn_input.to(self.dtype), delta["up"])
        hidden = self._combine(base.projections["up"].float() + change.float(), shares)
        moved = torch.bmm((hidden - base.hidden).to(self.dtype), weights["down"].transpose(1, 2))
        return base.output + moved.float() + DeltaProduct.apply(hidden.to(self.dtype), delta["down"]).float()

    def merged(self, delta: Delta, dtype: torch.dtype) -> dict[str, Tensor]:
        """All experts' matrices by their names in the model, with one sample's delta ``(out, in)`` added."""
        chosen = delta["experts"].squeeze(-1).to(self._up.device)
        up = delta["up"].unflatten(0, (len(chosen), -1))
        down = delta["down"].unflatten(1, (len(chosen), -1)).transpose(0, 1)
        found = {}
        for name, base, change in zip(self._names, (self._up, self._down), (up, down), strict=True):
            whole = base.to(dtype, copy=True)
            for expert, rows in zip(chosen.tolist(), change.to(base.device, torch.float32), strict=True):
                if expert >= 0:
                    whole[expert] = (base[expert].float() + rows).to(dtype)
            found[name] = whole.transpose(1, 2).contiguous() if self._experts.is_transposed else whole
        return found

    def has_kernel(self) -> bool:
        """Whether the elementwise part runs in one kernel."""
        return False

    def _combine(self, up: Tensor, shares: Tensor) -> Tensor:
        """Hidden units ``(B, T, K * F)``, each expert's scaled by its share."""
        units = up.unflatten(-1, (-1, self._up.shape[1]))
        units = self._experts._apply_gate(units) if self._experts.has_gate else self._experts.act_fn(units)
        return (units * shares[..., None]).flatten(-2)


def cast(delta: Mapping[str, Tensor], dtype: torch.dtype | None, device: Any = None) -> dict[str, Tensor]:
    """A delta in another type or place; numbers of experts stay whole."""
    return {n: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for n, t in delta.items()}
