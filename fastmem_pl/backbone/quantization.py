"""Trunks in 4 or 8 bits, by bitsandbytes and torchao.

Memorizing trains the last feed-forward network and needs the head's exact gradients, so these stay in the
compute type; everything below them only has to be run. Weights are quantized one by one while they are
read, on the device that they stay on. Checkpoints that are quantized already keep their trunk, and get
plain weights where memories act.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone.families import Anatomy, find_anatomy
from fastmem_pl.base.errors import FastMemError, unknown

_GROUP = 128  # weights that share a scale in torchao-int4
_BLOCK = 64  # the same in bnb-4bit, whose kernels for CPUs read rows of most other widths wrongly


@dataclass(frozen=True)
class Kind:
    """One way to quantize.

    Attributes:
        package: that does it.
        extra: of fastmem-pl that installs the package.
        config: makes the configuration of transformers from the compute type and the names of the modules
            that stay plain.
        modules: types of modules that it quantizes.
        only: device type and precision that it is bound to, if it is.
        group: weights of a row that share a scale; the width of a row must be a multiple of it.
        has_gradients: whether its products have gradients, which blocks above a trained network need.
    """

    package: str
    extra: str
    config: Callable[[torch.dtype, list[str]], Any]
    modules: tuple[type[nn.Module], ...] = (nn.Linear,)
    only: tuple[str, str] | None = None
    group: int = 1
    has_gradients: bool = True

    def takes(self, module: nn.Module) -> bool:
        """Whether a module is of a type and a width that it quantizes."""
        return isinstance(module, self.modules) and _width(module) % self.group == 0


def _bnb_4bit(dtype: torch.dtype, plain: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=plain,
    )


def _bnb_8bit(dtype: torch.dtype, plain: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)


def _torchao_int8(dtype: torch.dtype, plain: list[str]) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Its settings for the compiler would change how float32 products round everywhere.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=plain)


def _torchao_int4(dtype: torch.dtype, plain: list[str]) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat
    from transformers import TorchAoConfig

    kind = Int4WeightOnlyConfig(
        group_size=_GROUP,
        # The other formats need kernels of further packages.
        int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
        set_inductor_config=False,
    )
    return TorchAoConfig(kind, modules_to_not_convert=plain)


KINDS: Mapping[str, Kind] = {
    "bnb-4bit": Kind("bitsandbytes", "bnb", _bnb_4bit, (nn.Linear, Conv1D), group=_BLOCK),
    "bnb-8bit": Kind("bitsandbytes", "bnb", _bnb_8bit, (nn.Linear, Conv1D)),
    "torchao-int8": Kind("torchao", "torchao", _torchao_int8),
    "torchao-int4": Kind(
        *("torchao", "torchao", _torchao_int4),
        only=("cuda", "bf16-true"),
        group=_GROUP,
        has_gradients=False,
    ),
}
# Checkpoints whose weights can be made plain, by the name of their method in transformers.
_METHODS = {"bitsandbytes": "bnb", "torchao": "torchao"}
# They warn of kernels that another machine would have, when they are imported.
_CHATTER = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def check_quantization(quantization: str, precision: str, device: str | torch.device) -> None:
    """Refuse what cannot be quantized so, before anything is loaded.

    Raises:
        FastMemError: for an unknown name, a package that is missing, or a precision or device that does
            not do.
    """
    if quantization not in KINDS:
        raise unknown("model.quantization", quantization, KINDS)
    kind = KINDS[quantization]
    check_precision(quantization, precision)
    _check_package(kind.package, kind.extra, f"model.quantization: {quantization}")
    found = (torch.device(device).type, precision)
    if kind.only and found != kind.only:
        raise FastMemError(
            f"model.quantization: {quantization} needs a {kind.only[0].upper()} GPU and precision "
            f"{kind.only[1]}, not {found[0]} and {found[1]}; allowed here: "
            f"{', '.join(name for name, other in KINDS.items() if not other.only)}"
        )


def check_precision(method: str | None, precision: str) -> None:
    """Refuse a precision whose weights are float32 where they are quantized.

    Raises:
        FastMemError: for ``bf16-mixed`` with any method.
    """
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
    # Old checkpoints of bitsandbytes do not say it.
    return str(getattr(method, "value", method) or "bitsandbytes")


def check_method(source: str, method: str) -> None:
    """Refuse a quantized checkpoint whose last weights cannot be made plain.

    Raises:
        FastMemError: for another method than those of bitsandbytes and torchao, or a missing package.
    """
    if method not in _METHODS:
        raise FastMemError(
            f"model.backbone: {source!r} is quantized with {method}, so its last feed-forward network cannot "
            f"be made plain; allowed: checkpoints of {' and '.join(_METHODS)}, or the plain model with "
            "model.quantization"
        )
    _check_package(method, _METHODS[method], f"model.backbone: {source!r}")


def loading_options(
    quantization: str, config: Any, dtype: torch.dtype, num_layers: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the trunk of a model.

    Args:
        quantization: which of :data:`KINDS`.
        config: the model's.
        dtype: compute type.
        num_layers: feed-forward networks from the top that stay plain.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        FastMemError: when the model has nothing below them that can be quantized so.
    """
    from transformers import AutoModelForCausalLM

    kind = KINDS[quantization]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    plain = [
        name for name, _ in plain_modules(model, find_anatomy(model), num_layers, not kind.has_gradients)
    ]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, kind.modules) and n not in plain}
    plain += [name for name, module in linear.items() if not kind.takes(module)]
    if set(linear) <= set(plain):
        width = f" whose width is a multiple of {kind.group}" if kind.group > 1 else ""
        raise FastMemError(
            f"model.quantization: {type(model).__name__} has no linear layers{width} for {quantization}; "
            f"allowed here: {', '.join(_others(model, num_layers)) or 'none'}"
        )
    return {"quantization_config": kind.config(dtype, plain)}


def plain_modules(
    model: nn.Module, anatomy: Anatomy, num_layers: int, whole_blocks: bool = False
) -> list[tuple[str, nn.Module]]:
    """Names and modules of what must not be quantized.

    Args:
        model: the model.
        anatomy: its parts.
        num_layers: feed-forward networks from the top; the head is added.
        whole_blocks: add all that gradients run through, which is the blocks above the lowest of them.
    """
    names = {module: name for name, module in model.named_modules()}
    total = len(anatomy.blocks)
    first = max(total - num_layers, 0)
    modules = [module for layer in range(first, total) for _, module in anatomy.ffn_modules(layer)]
    if whole_blocks:
        above = [module for block in list(anatomy.blocks)[first + 1 :] for module in block.modules()]
        modules += [module for module in above if isinstance(module, nn.Linear)]
    return [(names[module], module) for module in dict.fromkeys((*modules, anatomy.head))]


def _check_package(package: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise FastMemError(f"{what} needs {package}; run: pip install 'fastmem-pl[{extra}]'")
    try:
        with _quiet(*_CHATTER):
            importlib.import_module(package)
    except Exception as error:
        # Compiled code of another version of torch or of the driver fails in many ways.
        reason = " ".join(str(error).split())[:200]
        raise FastMemError(
            f"{what}: {package} cannot be imported: {reason}; install another version"
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hold back warnings of some loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _others(model: nn.Module, num_layers: int) -> list[str]:
    """Ways to quantize that this model's trunk has layers for."""
    top = {name for name, _ in plain_modules(model, find_anatomy(model), num_layers)}
    modules = [module for name, module in model.named_modules() if name not in top]
    return [name for name, kind in KINDS.items() if any(map(kind.takes, modules))]


def _width(module: nn.Module) -> int:
    # GPT-2's Conv1D stores its weight as (in, out).
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]
