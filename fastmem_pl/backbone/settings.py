"""The settings of the backbone: which model, how it is loaded, and the three precisions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from fastmem_pl.base.errors import unknown

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class BackboneSettings:
    """Which model is used, and how it is loaded.

    Args:
        source: "demo" (SmolLM2-135M-Instruct), a Hub id, a model folder, or a .gguf file.
        quantization: keep the trunk in fewer bits: bnb-4bit, bnb-8bit (extra bnb), torchao-int8, torchao-int4
            (extra torchao). The trained networks and the head stay as they are.
        device_map: lay the trunk out over the devices of this process: auto, balanced, sequential, or a
            mapping from module names to devices.
        tp_plan: "auto" shards every matrix of the trunk over the processes of torchrun or trainer.devices,
            which then work on the same batch.
        trust_remote_code: run model code that comes with a checkpoint. Off unless you trust its source.
        revision: branch, tag or commit of a Hub repository, for its model, config and tokenizer; the newest
            of its main branch by default. A commit makes a run repeatable.
        subfolder: folder of a repository, or of a local folder, that holds model, config and tokenizer.
        attn_implementation: how transformers computes attention: eager, sdpa, flash_attention_2 and others;
            by default its own choice for the model.
    """

    source: str = "demo"
    quantization: str | None = None
    device_map: str | dict[str, str | int] | None = None
    tp_plan: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    subfolder: str | None = None
    attn_implementation: str | None = None

    @classmethod
    def of(cls, given: Self | str | Mapping[str, Any]) -> Self:
        """Settings as given, or those of a model that is named only."""
        if isinstance(given, cls):
            return given
        return cls(given) if isinstance(given, str) else cls(**given)


Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
WEIGHT_DTYPE = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
# Of the matrix products of the tail.
COMPUTE_DTYPE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


def normalize_precision(precision: str | int) -> Precision:
    """Map Lightning's spellings, such as 32 or bf16, to one of the three supported precisions."""
    name = {"32": "32-true", "bf16": "bf16-mixed"}.get(str(precision), str(precision))
    if name not in WEIGHT_DTYPE:
        raise unknown("trainer.precision", precision, WEIGHT_DTYPE)
    return name


def fabric_settings(fabric: "Fabric") -> tuple[str, torch.device]:
    """Precision and device of a Fabric."""
    return str(fabric.strategy.precision.precision), fabric.device
