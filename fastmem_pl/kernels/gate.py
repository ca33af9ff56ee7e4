"""The elementwise part of a SiLU-gated FFN with a memory, forward and backward, each in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class GatedChange(torch.autograd.Function):
    """``hidden = silu(gate + gate_change) * (up + up_change)`` and what the changes alone add to it.

    All tensors have one shape and type; arithmetic is float32. ``gate`` and ``up`` are constants.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gate_change: Tensor, up_change: Tensor):
        """Return ``hidden`` and ``hidden - silu(gate) * up``."""
        hidden, change = torch.empty_like(gate), torch.empty_like(gate)
        size = gate.numel()
        _forward[(triton.cdiv(size, _BLOCK),)](
            gate, up, gate_change, up_change, hidden, change, size, BLOCK=_BLOCK
        )
        ctx.save_for_backward(gate, up, gate_change, up_change)
        return hidden, change

    @staticmethod
    def backward(ctx, hidden_grad: Tensor, change_grad: Tensor):
        """Gradients of the two changes."""
        gate = ctx.saved_tensors[0]
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(gate)
        size, grads = gate.numel(), (hidden_grad.contiguous(), change_grad.contiguous())
        _backward[(triton.cdiv(size, _BLOCK),)](
            *ctx.saved_tensors, *grads, gate_grad, up_grad, size, BLOCK=_BLOCK
        )
        return None, None, gate_grad, up_grad


@triton.jit
def _forward(
    gate_ptr, up_ptr, gate_change_ptr, up_change_ptr, hidden_ptr, change_ptr, size, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    gate = tl.load(gate_ptr + i, mask).to(tl.float32)
    up = tl.load(up_ptr + i, mask).to(tl.float32)
    new_gate = gate + tl.load(gate_change_ptr + i, mask).to(tl.float32)
    new_up = up + tl.load(up_change_ptr + i, mask).to(tl.float32)
    hidden = new_gate * tl.sigmoid(new_gate) * new_up
    change = hidden - gate * tl.sigmoid(gate) * up
    tl.store(hidden_ptr + i, hidden.to(hidden_ptr.dtype.element_ty), mask)
    tl.store(change_ptr + i, change.to(change_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(
    gate_ptr,
    up_ptr,
    gate_change_ptr,
    up_change_ptr,
    hidden_grad_ptr,
    change_grad_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    gate = tl.load(gate_ptr + i, mask).to(tl.float32) + tl.load(gate_change_ptr + i, mask).to(tl.float32)
    up = tl.load(up_ptr + i, mask).to(tl.float32) + tl.load(up_change_ptr + i, mask).to(tl.float32)
    grad = tl.load(hidden_grad_ptr + i, mask).to(tl.float32)
    grad += tl.load(change_grad_ptr + i, mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_grad = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    up_grad = grad * gate * sigmoid
    tl.store(gate_grad_ptr + i, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask)
    tl.store(up_grad_ptr + i, up_grad.to(up_grad_ptr.dtype.element_ty), mask)
