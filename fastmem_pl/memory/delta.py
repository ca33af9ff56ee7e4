"""The trained part of a memory, and the optimizer that trains it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fastmem_pl.backbone import GradientFactors
from fastmem_pl.base.errors import FastMemError

# Products of bfloat16 with a float32 result came with torch 2.8.
_WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class FFNDelta(nn.ParameterDict):
    """Weight changes of one FFN for ``B`` samples: ``gate``, ``up`` ``(B, F, D)``, ``down`` ``(B, D, F)``.

    They keep their type whatever precision plugin converts the module around them. With ``factored``, their
    gradients are left as factors (GradientFactors) for the kernel. They are zero, or copies of ``start``.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        num_samples: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        factored: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._dtype = dtype
        for name, shape in shapes.items():
            self[name] = nn.Parameter(torch.zeros(num_samples, *shape, device=device, dtype=dtype))
            if start:
                self[name].data.copy_(start[name])
            if factored:
                self[name].factors = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for parameter in self.values():
            parameter.data = parameter.data.to(self._dtype)
        return self


class DeltaAdamW(torch.optim.AdamW):
    """AdamW on deltas that decays the weights they belong to.

    Training ``W + delta`` with decoupled decay ``c = lr * weight_decay`` maps ``delta`` to
    ``(1 - c) * delta - c * W - update``: plain AdamW on the delta would leave out ``c * W``. Deltas whose
    gradient is left in factors are updated by :mod:`fastmem_pl.kernels.adamw`, the others by PyTorch.

    Takes pairs of a delta ``(B, out, in)`` and its base weight ``(out, in)``, and a constant ``lr`` for each
    sample. Moments of the ``last_step`` need not be kept; deltas ``from_zero`` need not be read in the first.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: Sequence[float],
        weight_decay: float,
        last_step: int | None = None,
        from_zero: bool = False,
    ) -> None:
        self._last_step, self._from_zero, self._steps = last_step, from_zero, 0
        self._pairs = list(pairs)
        deltas = [delta for delta, _ in self._pairs]
        fused = all(delta.device.type in ("cpu", "cuda") for delta in deltas) or None
        self._mixed = len(set(lr)) > 1
        groups = [{"params": deltas}]
        if self._mixed:
            # PyTorch takes one rate for a tensor.
            groups = [
                {"params": [delta.detach()[row] for delta in deltas], "lr": rate}
                for row, rate in enumerate(lr)
            ]
        super().__init__(groups, lr[0], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=fused)
        exact = torch.tensor(lr, dtype=torch.float64, device=deltas[0].device)
        self._lr = exact.float()
        # Share of weight and delta that a step takes away, and what it leaves, by sample.
        self._taken = (exact * weight_decay).float()[:, None, None]
        self._left = (1 - exact * weight_decay).float()[:, None, None]
        self._weight_decay = weight_decay
        self._scale: Tensor | None = None

    def clip(self, max_norm: float) -> Tensor:
        """Clip each sample's gradient over all its deltas to ``max_norm``; returns the norms ``(B,)``.

        As :func:`torch.nn.utils.clip_grad_norm_`, row by row. Factored gradients are scaled by the step.
        """
        deltas = [delta for delta, _ in self._pairs]
        grads = [delta.grad for delta in deltas if delta.grad is not None]
        squares = [squared_norm(delta.factors) for delta in deltas if delta.grad is None]
        squares += [torch.linalg.vector_norm(grad.flatten(1), dim=1).square() for grad in grads]
        norms = torch.stack(squares).sum(0).sqrt()
        self._scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(self._scale[:, None, None])
        return norms

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; a given ``closure`` is evaluated before anything changes."""
        loss = closure() if closure else None
        if self._steps == self._last_step:
            raise FastMemError(
                f"memorizing ends after its {self._last_step} steps; set model.memorize.steps higher"
            )
        self._steps += 1
        with torch.no_grad():
            for delta, base in self._pairs:
                factored = getattr(delta, "factors", None) is not None
                (self._factored_step if factored else self.decay)(delta, base)
            for row, group in enumerate(self.param_groups) if self._mixed else ():
                for view, (delta, _) in zip(group["params"], self._pairs, strict=True):
                    view.grad = None if delta.grad is None else delta.grad[row]
            super().step()
        self._scale = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, factored ones too."""
        super().zero_grad(set_to_none)
        for delta, _ in self._pairs:
            delta.grad = None
            if hasattr(delta, "factors"):
                delta.factors = None

    def decay(self, delta: Tensor, base: Tensor) -> None:
        """Decay the weights that a delta belongs to."""
        delta.mul_(self._left).addcmul_(base, self._taken, value=-1)

    def _factored_step(self, delta: Tensor, base: Tensor) -> None:
        from fastmem_pl.kernels.adamw import factored_adamw_

        state, factors = self.state[delta], delta.factors
        if not state:
            # The first moment takes the delta's type: it survives bfloat16, as the second, with its
            # decay of 0.999, would not. A first step from zero fills both and reads neither.
            new = torch.empty_like if self._from_zero else torch.zeros_like
            state["exp_avg"], state["exp_avg_sq"] = new(delta), new(delta, dtype=torch.float32)
        sides = base, factors.outer, factors.inner
        scale = delta.new_ones(len(delta), dtype=torch.float32) if self._scale is None else self._scale
        constants = self._lr, self.defaults["betas"], self.defaults["eps"], self._weight_decay
        order = {"first_step": self._from_zero and self._steps == 1, "last": self._steps == self._last_step}
        moments = state["exp_avg"], state["exp_avg_sq"]
        factored_adamw_(delta.detach(), *moments, *sides, scale, self._steps, *constants, **order)


def squared_norm(factors: GradientFactors) -> Tensor:
    """Squared norm of ``outer^T @ inner`` of each sample, ``(B,)``, without forming the product.

    ``||X^T Y||^2 = sum((X X^T) * (Y Y^T))``, two ``(T, T)`` Gram matrices a sample.
    """
    grams = [_gram(side) for side in (factors.outer, factors.inner)]
    # Rounding may leave a tiny negative sum where the gradient is zero.
    return (grams[0] * grams[1]).sum((1, 2)).clamp(min=0.0)


def _gram(x: Tensor) -> Tensor:
    if _WIDE_PRODUCTS and x.device.type == "cuda" and x.dtype is not torch.float32:
        return torch.bmm(x, x.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(x.float(), x.float().transpose(1, 2))
