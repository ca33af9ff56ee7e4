"""Models whose weights are packed: what is made plain again, and what is kept from changing.

See :mod:`.quantization` for how they come to be packed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmem_pl.backbone.families import find_anatomy, is_quantized
from fastmem_pl.backbone.quantization import plain_modules
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import is_out_of_memory


@torch.no_grad()
def make_plain(model: nn.Module, dtype: torch.dtype, num_layers: int) -> None:
    """Give a quantized model plain weights where memories act, right after it was loaded.

    Args:
        model: from a checkpoint of bitsandbytes or torchao, or quantized while it was loaded.
        dtype: compute type; what is not quantized gets it, which a checkpoint of bitsandbytes has in its own.
        num_layers: feed-forward networks from the top whose weights are made plain, with the head's.

    Raises:
        FastMemError: for a checkpoint in 4 bits that bitsandbytes would read wrongly on a CPU.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise FastMemError(
                f"model.backbone: {name} has rows of {state.shape[-1]} weights, which bitsandbytes reads "
                f"wrongly in blocks of {state.blocksize} on a CPU; allowed: a GPU, or the plain model with "
                "model.quantization"
            )
    without_gradients = any(type(weight).__name__.startswith("Int4") for weight in model.parameters())
    for name, module in plain_modules(model, find_anatomy(model), num_layers, without_gradients):
        if is_quantized(module.weight):
            model.set_submodule(name, _plain_linear(module, dtype))
    for parameter in model.parameters():
        if not is_quantized(parameter) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def hold_still(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep bitsandbytes from writing to the weights, from choosing a compute type, and from talking.

    Args:
        model: quantized by it or not.
        dtype: compute type.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # It would repack weights in place, in the first forward pass on a CPU.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
    # It warns in every product that inputs are rounded to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@contextmanager
def must_run(name: str, method: str | None) -> Iterator[None]:
    """Say in one line that quantized weights do not run on this machine.

    Args:
        name: of the model.
        method: that it is quantized with; without one, errors are as they were.

    Raises:
        FastMemError: instead of any error but running out of memory.
    """
    try:
        yield
    except Exception as error:
        if not method or isinstance(error, FastMemError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FastMemError(
            f"model.backbone: the weights of {name!r}, quantized with {method}, do not run here: {reason}; "
            "allowed: the plain model with model.quantization"
        ) from error


def waits_for_device(model: nn.Module) -> bool:
    """Whether the host waits in a forward pass, so that no CUDA graph can hold it.

    LLM.int8() looks for outliers among the activations of every product.
    """
    return any(getattr(getattr(m, "state", None), "threshold", 0.0) > 0 for m in model.modules())


def stored_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a parameter: itself, or the parts of a tensor of torchao."""
    if type(parameter).__module__.startswith("torchao."):
        for name in parameter.__tensor_flatten__()[0]:
            yield getattr(parameter, name)
    else:
        yield parameter.detach().as_subclass(Tensor)


def _plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain copy of a quantized linear map."""
    weight = _dequantized(module).to(dtype)
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain


def _dequantized(module: nn.Module) -> Tensor:
    """The weight that a quantized linear map stands for, ``(out, in)``."""
    weight = module.weight
    if type(weight).__module__.startswith("torchao."):
        if hasattr(weight, "dequantize"):
            return weight.dequantize()
        # Tensors packed for a kernel are only read by it.
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return nn.functional.linear(unit, weight).t().contiguous()
    from bitsandbytes import functional

    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = weight.SCB if weight.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scale)
