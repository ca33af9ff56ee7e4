"""One frozen feed-forward network that can be applied with per-sample weight deltas."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem_pl import kernels
from fastmem_pl.backbone.anatomy import Form, Projection

Delta = Mapping[str, Tensor]
"""Weight changes by projection name: ``gate``, ``up`` ``(B, F, D)`` and ``down`` ``(B, D, F)``."""


@dataclass
class GradientFactors:
    """A weight gradient of ``B`` samples as a product ``outer^T @ inner``.

    A parameter with an attribute ``factors`` gets these from the backward pass instead of a gradient: that
    of the product's output, ``(B, T, out)``, and the product's input, ``(B, T, in)``.
    """

    outer: Tensor
    inner: Tensor


@dataclass(frozen=True)
class BaseActivations:
    """What the base weights make of one FFN input; constant over all memorization steps.

    ``merged``: add deltas to the down projection's weight before the product with it. Saves one product of
    two, and rounds as editing float32 weights does.
    """

    projections: dict[str, Tensor]  # gate (if gated) and up before the activation, (B, T, F)
    hidden: Tensor | None  # (B, T, F) float32; formed anew from the projections each time if None
    output: Tensor  # (B, T, D) float32
    merged: bool = False
    # Of experts chosen by sample: their weights by projection, and their shares at each position.
    of_rows: tuple[dict[str, Tensor], Tensor] | None = None


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
        form: Form,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.form = form
        self.base_weights = {name: p.weight for name, p in projections.items()}
        self._weights = {name: p.weight.to(dtype) for name, p in projections.items()}
        self._biases = {name: p.bias for name, p in projections.items()}
        plain = all(bias is None for name, bias in self._biases.items() if name != "down")
        probe = torch.linspace(-8, 8, 33, device=self._weights["down"].device)
        silu = form.activation is not None and torch.equal(form.activation(probe), F.silu(probe))
        self._kernel_fits = plain and silu and "gate" in self._weights

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """``(out, in)`` by projection."""
        return {name: weight.shape for name, weight in self.base_weights.items()}

    def base(self, ffn_input: Tensor) -> BaseActivations:
        """Apply the base weights to ``ffn_input`` ``(B, T, D)``."""
        inner = [name for name in self._weights if name != "down"]
        projections = {name: self._with_bias(name, self._product(ffn_input, name)) for name in inner}
        hidden = self.form.combine({name: value.float() for name, value in projections.items()})
        output = self._with_bias("down", self._product(hidden, "down")).float()
        # The kernel takes the base's activations for constants; above a trained block they are not.
        fused = not ffn_input.requires_grad and self.has_kernel()
        return BaseActivations(projections, None if fused else hidden, output)

    def memorized(self, ffn_input: Tensor, delta: Delta, base: BaseActivations) -> Tensor:
        """Apply base weights plus ``delta`` to ``(B, T, D)``, given its :meth:`base`; float32."""
        ffn_input = ffn_input.to(self.dtype)
        changes = {name: DeltaProduct.apply(ffn_input, delta[name]) for name in base.projections}
        if base.hidden is None:
            from fastmem_pl.kernels.gate import GatedChange

            gate, up = base.projections["gate"], base.projections["up"]
            hidden, hidden_change = GatedChange.apply(gate, up, changes["gate"], changes["up"])
        else:
            hidden = self.form.combine(
                {n: v.float() + changes[n].float() for n, v in base.projections.items()}
            )
            if base.merged:
                weight = self._weights["down"] + delta["down"]
                return self._with_bias("down", DeltaProduct.apply(hidden, weight))
            hidden_change = hidden - base.hidden
        change = self._product(hidden_change, "down").float()
        return base.output + change + DeltaProduct.apply(hidden.to(self.dtype), delta["down"]).float()

    def has_kernel(self) -> bool:
        """Whether the elementwise part runs in one kernel."""
        return self._kernel_fits and kernels.usable(self._weights["down"].device, self.dtype)

    def _product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.to(self.dtype), self._weights[name])

    def _with_bias(self, name: str, value: Tensor) -> Tensor:
        bias = self._biases[name]
        return value if bias is None else value.float() + bias.float()


class DeltaProduct(torch.autograd.Function):
    """``x @ delta^T`` of every sample: ``x (B, T, in)``, ``delta (B, out, in)`` to ``(B, T, out)``."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor) -> Tensor:
        """Multiply in the type of ``x``."""
        ctx.delta = delta
        ctx.save_for_backward(x)
        return torch.bmm(x, delta.to(x.dtype).transpose(1, 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradient of ``x``, and of ``delta`` or the factors it is made of."""
        (x,) = ctx.saved_tensors
        delta = ctx.delta
        x_grad = torch.bmm(grad, delta.detach().to(x.dtype)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None
        if hasattr(delta, "factors"):
            if delta.factors is not None:
                raise RuntimeError("gradients of this delta are left in factors, which do not accumulate")
            delta.factors = GradientFactors(grad.contiguous(), x.detach().contiguous())
            return x_grad, None
        return x_grad, torch.bmm(grad.transpose(1, 2), x).to(delta.dtype)
