"""Trunks in 4 or 8 bits, by bitsandbytes and torchao.

The trained feed-forward networks and the head stay in the compute type; all below them only has to be run.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone.anatomy import Anatomy, find_anatomy
from fastmem_pl.backbone.layout import is_quantized
from fastmem_pl.base.errors import FastMemError, one_line, unknown

_GROUP = 128  # weights that share a scale in torchao-int4
_BLOCK = 64  # the same in bnb-4bit, whose kernels for CPUs read rows of most other widths wrongly


@dataclass(frozen=True)
class Kind:
    """One way to quantize; ``config`` takes the compute type and the names of the modules that stay plain."""

    package: str
    config: Callable[[torch.dtype, list[str]], Any]
    modules: tuple[type[nn.Module], ...] = (nn.Linear,)
    only: tuple[str, str] | None = None  # device type and precision
    group: int = 1  # weights that share a scale: the width of a row must be a multiple
    has_gradients: bool = True  # blocks above a trained network need them


def _bnb_4bit(dtype: torch.dtype, plain: list[str]) -> BitsAndBytesConfig:
    options = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": dtype}
    options = {f"bnb_4bit_{name}": value for name, value in options.items()}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=plain, **options)


def _torchao_int8(dtype: torch.dtype, plain: list[str]) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    # Its settings for the compiler would change how float32 products round everywhere.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=plain)


def _torchao_int4(dtype: torch.dtype, plain: list[str]) -> TorchAoConfig:
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    # The other formats need kernels of further packages.
    packing = Int4PackingFormat.TILE_PACKED_TO_4D
    kind = Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format=packing, set_inductor_config=False)
    return TorchAoConfig(kind, modules_to_not_convert=plain)


KINDS: Mapping[str, Kind] = {
    "bnb-4bit": Kind("bitsandbytes", _bnb_4bit, (nn.Linear, Conv1D), group=_BLOCK),
    "bnb-8bit": Kind(
        "bitsandbytes",
        lambda _, plain: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain),
        (nn.Linear, Conv1D),
    ),
    "torchao-int8": Kind("torchao", _torchao_int8),
    "torchao-int4": Kind(
        "torchao", _torchao_int4, only=("cuda", "bf16-true"), group=_GROUP, has_gradients=False
    ),
}
# Packages whose weights can be made plain, as transformers calls them, with our extras that install them.
_EXTRAS = {"bitsandbytes": "bnb", "torchao": "torchao"}


def check_quantization(quantization: str, precision: str, device: str | torch.device) -> None:
    """Refuse what cannot be quantized so, before anything is loaded."""
    if quantization not in KINDS:
        raise unknown("model.backbone.quantization", quantization, KINDS)
    kind = KINDS[quantization]
    check_precision(quantization, precision)
    _check_package(kind.package, f"model.backbone.quantization: {quantization}")
    if kind.only and (torch.device(device).type, precision) != kind.only:
        raise FastMemError(
            f"model.backbone.quantization: {quantization} needs a {kind.only[0].upper()} GPU and precision "
            f"{kind.only[1]}, not {device} and {precision}"
        )


def check_precision(method: str | None, precision: str) -> None:
    """Refuse, for a quantized model, a precision that casts float32 weights."""
    if method and precision == "bf16-mixed":
        raise FastMemError(
            f"trainer.precision: {precision} casts float32 weights in every product, and those of the trunk "
            f"are quantized ({method}); allowed: 32-true, bf16-true"
        )


def quantized_method(config: Any) -> str | None:
    """The method that a checkpoint is quantized with already, as transformers calls it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    # Old checkpoints of bitsandbytes do not name it.
    return str(getattr(method, "value", method) or "bitsandbytes")


def check_method(source: str, method: str) -> None:
    """Refuse a quantized checkpoint whose last weights cannot be made plain."""
    if method not in _EXTRAS:
        raise FastMemError(
            f"model.backbone: {source!r} is quantized with {method}, so its last feed-forward network cannot "
            f"be made plain; allowed: checkpoints of {' and '.join(_EXTRAS)}, or a plain model"
        )
    _check_package(method, f"model.backbone: {source!r}")


def loading_options(quantization: str, model: Any, dtype: torch.dtype, num_layers: int) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize all but the last ``num_layers`` FFNs and the head.

    ``model`` is one without weights.
    """
    kind = KINDS[quantization]
    anatomy, modules = find_anatomy(model), dict(model.named_modules())
    plain = [name for name, _ in plain_modules(model, anatomy, num_layers, not kind.has_gradients)]
    linear = {n: m for n, m in modules.items() if isinstance(m, kind.modules) and n not in plain}
    widths = {n: m.weight.shape[0 if isinstance(m, Conv1D) else 1] for n, m in linear.items()}
    plain += [name for name, width in widths.items() if width % kind.group]
    if set(linear) <= set(plain):
        others = ", ".join(name for name in KINDS if name != quantization)
        raise FastMemError(
            f"model.backbone.quantization: {type(model).__name__} has no linear layers for {quantization} "
            f"(width a multiple of {kind.group}); allowed: {others}, or none"
        )
    return {"quantization_config": kind.config(dtype, plain)}


def plain_modules(
    model: nn.Module, anatomy: Anatomy, num_layers: int, whole_blocks: bool = False
) -> list[tuple[str, nn.Module]]:
    """Names and modules of the last FFNs and the head; with ``whole_blocks`` of all above the lowest FFN."""
    names = {module: name for name, module in model.named_modules()}
    total = len(anatomy.blocks)
    first = max(total - num_layers, 0)
    modules = [module for layer in range(first, total) for module in anatomy.site_modules(layer)]
    if whole_blocks:
        above = anatomy.blocks[first + 1 :].modules()
        modules += [module for module in above if isinstance(module, nn.Linear)]
    return [(names[module], module) for module in dict.fromkeys((*modules, anatomy.head))]


def stored_size(quantized: str | None, config: Any) -> float | None:
    """Bytes of a weight that is quantized so, with its share of the scales; ``None`` for plain ones."""
    if quantized is None:
        return None
    described = f"{quantized} {getattr(config, 'quantization_config', '')}".lower().replace(" ", "")
    return 0.55 if any(sign in described for sign in ("-4bit", "load_in_4bit':true", "int4")) else 1.05


@torch.no_grad()
def make_plain(model: nn.Module, dtype: torch.dtype, num_layers: int) -> None:
    """Give a model that was loaded quantized plain weights where memories act; others become ``dtype``."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise FastMemError(
                f"model.backbone: {name} has rows of {state.shape[-1]} weights, which bitsandbytes reads "
                f"wrongly in blocks of {state.blocksize} on a CPU; allowed: a GPU, or a plain model"
            )
    without_gradients = any(type(weight).__name__.startswith("Int4") for weight in model.parameters())
    for name, module in plain_modules(model, find_anatomy(model), num_layers, without_gradients):
        if hasattr(module, "weight") and is_quantized(module.weight):
            weight = _dequantized(module).detach()
            plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            plain.weight, plain.bias = nn.Parameter(weight), module.bias
            model.set_submodule(name, plain.requires_grad_(False))
    for parameter in model.parameters():
        if not is_quantized(parameter) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def hold_still(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep bitsandbytes from writing to weights and from choosing a compute type."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # It would repack weights in place, in the first forward pass on a CPU.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True


def waits_for_device(model: nn.Module) -> bool:
    """Whether the host waits in a forward pass, as LLM.int8() does for outliers: no CUDA graph holds it."""
    return any(getattr(getattr(m, "state", None), "threshold", 0.0) > 0 for m in model.modules())


def stored_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a parameter: itself, or the parts of a tensor of torchao."""
    if type(parameter).__module__.startswith("torchao."):
        for name in parameter.__tensor_flatten__()[0]:
            yield getattr(parameter, name)
    else:
        yield parameter.detach().as_subclass(Tensor)


def _dequantized(module: nn.Module) -> Tensor:
    weight = module.weight
    if type(weight).__module__.startswith("torchao."):
        if hasattr(weight, "dequantize"):
            return weight.dequantize()
        # Tensors packed for a kernel are only read by it.
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return nn.functional.linear(unit, weight).t().contiguous()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, getattr(module, "state", None))


def _check_package(package: str, what: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:
        # Compiled code of another version of torch or of the driver fails in many ways.
        install = f"run: pip install 'fastmem-pl[{_EXTRAS[package]}]'"
        raise FastMemError(f"{what} needs {package}: {one_line(error)}; {install}") from error
