"""Where each model family keeps its last feed-forward networks, final norm and head.

A family is recognized by the attribute names of its blocks, never by the model's name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastmem_pl.base.errors import FastMemError


@dataclass(frozen=True)
class Family:
    """Attribute names of one FFN layout, relative to the FFN module ``block.mlp``."""

    name: str
    up: str
    down: str
    activation: str
    gate: str | None = None

    def fits(self, ffn: nn.Module) -> bool:
        """Whether an FFN module has these attributes."""
        parts = [self.up, self.down, self.activation] + ([self.gate] if self.gate else [])
        return all(hasattr(ffn, part) for part in parts)


FAMILIES = (
    # Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, OLMo 2
    Family("gated", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    # Phi-3: gate and up in one matrix, gate rows first
    Family(
        "fused gated", gate="gate_up_proj", up="gate_up_proj", down="down_proj", activation="activation_fn"
    ),
    Family("GPT-NeoX", up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
    Family("GPT-2", up="c_fc", down="c_proj", activation="act"),
)
_LAYERS = ("layers", "h")
_FINAL_NORM = ("norm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class Projection:
    """One linear map of an FFN: ``weight`` is ``(out, in)``, ``bias`` ``(out,)`` or ``None``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model that FastMem works on."""

    family: Family
    body: nn.Module  # embeddings, blocks, final norm
    layers_name: str
    norm_name: str
    head: nn.Module
    softcap: float | None  # bound of the logits

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, lowest first."""
        return getattr(self.body, self.layers_name)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return getattr(self.body, self.norm_name)

    def activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The nonlinearity of a block's FFN."""
        return getattr(self.blocks[layer].mlp, self.family.activation)

    def ffn_modules(self, layer: int) -> list[tuple[tuple[str, ...], nn.Module]]:
        """The linear modules of a block's FFN, each with the projections that its rows are, in order."""
        parts: dict[str, list[str]] = {}
        for part in ("gate", "up", "down"):
            if (name := getattr(self.family, part)) is not None:
                parts.setdefault(name, []).append(part)
        ffn = self.blocks[layer].mlp
        return [(tuple(found), getattr(ffn, name)) for name, found in parts.items()]

    def projections(self, layer: int) -> dict[str, Projection]:
        """Views of the FFN's base weights under the names ``gate`` (if gated), ``up`` and ``down``."""
        found: dict[str, Projection] = {}
        for parts, module in self.ffn_modules(layer):
            check_plain("a feed-forward network", module)
            # GPT-2's Conv1D stores its weight as (in, out).
            weight = (module.weight.t() if isinstance(module, Conv1D) else module.weight).detach()
            bias = None if module.bias is None else module.bias.detach()
            size = weight.shape[0] // len(parts)
            biases = (None,) * len(parts) if bias is None else bias.split(size)
            for part, rows, own_bias in zip(parts, weight.split(size), biases, strict=True):
                found[part] = Projection(rows, own_bias)
        return found


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a weight is stored in fewer bits, as bitsandbytes, torchao or others keep it."""
    packed = type(weight).__module__.split(".")[0] in ("bitsandbytes", "torchao")
    return packed or weight is None or not weight.is_floating_point()


def check_plain(what: str, module: nn.Module) -> None:
    """Refuse a module that memories act on when its weight is quantized."""
    # Layers of some quantizers have no attribute of this name.
    if is_quantized(getattr(module, "weight", None)):
        raise FastMemError(
            f"model.backbone.quantization: {what} is quantized ({type(module).__name__}) where memories "
            "act; load the model with Backbone.load, and with num_layers as in the settings"
        )


def find_anatomy(model: Any) -> Anatomy:
    """Recognize the parts of a Hugging Face causal language model, or refuse it and name what was found."""
    name = type(model).__name__
    # A multimodal model keeps its language model one level down.
    body = getattr(model.base_model, "language_model", model.base_model)
    layers_name = next((n for n in _LAYERS if isinstance(getattr(body, n, None), nn.ModuleList)), None)
    norm_name = next((n for n in _FINAL_NORM if isinstance(getattr(body, n, None), nn.Module)), None)
    head = model.get_output_embeddings()
    if layers_name is None or norm_name is None or head is None:
        children = ", ".join(child for child, _ in body.named_children())
        raise FastMemError(
            f"model.backbone: {name} has no decoder blocks, final norm and LM head under known names; "
            f"its parts: {children}; allowed: decoder-only models (docs/families.md)"
        )
    block = getattr(body, layers_name)[-1]
    ffn = getattr(block, "mlp", block)
    family = next((f for f in FAMILIES if ffn is not block and f.fits(ffn)), None)
    if family is None:
        found = "no attribute 'mlp'" if ffn is block else type(ffn).__name__
        children = ", ".join(child for child, _ in ffn.named_children())
        raise FastMemError(
            f"model.backbone: {name} has no recognizable feed-forward network in its last block "
            f"({found} with {children}); allowed layouts: {', '.join(f.name for f in FAMILIES)}"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Anatomy(family, body, layers_name, norm_name, head, softcap)
