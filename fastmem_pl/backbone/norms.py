"""RMS norms in one kernel instead of six, where a model's own code spells them out.

In bfloat16 the one kernel rounds once, the spelled-out form twice.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem_pl.backbone.modules import shallow_copy


class FusedRMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dimension, computed in the type of ``weight`` if it is wider."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(..., D)``."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def with_fused_norms(module: nn.Module) -> nn.Module:
    """A copy of a block that shares its parameters, with fused RMS norms; on a CPU, the block itself."""
    if not any(parameter.is_cuda for parameter in module.parameters()):
        return module
    replaced = {}
    for name, child in module.named_children():
        twin = fused(child) or with_fused_norms(child)
        if twin is not child:
            replaced[name] = twin
    return shallow_copy(module, **replaced) if replaced else module


@torch.no_grad()
def fused(norm: nn.Module) -> FusedRMSNorm | None:
    """The fused form of an RMS norm, whose weight may count from one; ``None`` for anything else."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    alone = len(list(norm.parameters())) == 1 and not list(norm.children())
    if not (alone and isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(eps, float)):
        return None
    exact = copy.deepcopy(norm).float()
    # Not the default type, which is bfloat16 inside a bf16-true trainer.
    probe = torch.linspace(-2, 3, weight.numel(), device=weight.device, dtype=torch.float32)
    # A small row too, in which eps counts.
    probe = torch.stack([probe, 1e-3 * probe])
    # Weights that count from one (Gemma) are kept in float32: the sum would lose them in bfloat16.
    for scale in (weight.detach(), weight.detach().float() + 1):
        found = F.rms_norm(probe, scale.shape, scale.float(), eps)
        if torch.allclose(found, exact(probe), rtol=1e-4, atol=1e-6):
            return FusedRMSNorm(scale, eps)
    return None
