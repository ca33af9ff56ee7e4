"""Tensor parallelism: every process holds a share of each matrix of the trunk, and all of the tail.

The plan is the model's own, of transformers. The tail's weights are put together again after loading: every
process computes the same tail from the same residual stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate.utils import patch_environment
from torch import Tensor, distributed, nn

from fastmem_pl.backbone.anatomy import Anatomy, find_anatomy
from fastmem_pl.base.errors import FastMemError, unknown

# Projections whose output holds the keys of the attention, alone or with others.
_KEYS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class Shards:
    """How many processes share a loaded model, and how many its KV heads (1 where each of them has all)."""

    processes: int = 1
    kv: int = 1

    @classmethod
    def of(cls, model: Any) -> Self:
        """Look at the parameters."""
        count = next((p.device_mesh.size() for p in model.parameters() if is_sharded(p)), 1)
        return cls(count, count if count > 1 and _shares_heads(model.tp_plan) else 1)


def check_processes(tp_plan: str, device: torch.device) -> int:
    """Number of the processes that will share the trunk."""
    if tp_plan != "auto":
        raise unknown("model.backbone.tp_plan", tp_plan, ["auto"])
    joined = distributed.is_available() and distributed.is_initialized()
    count = distributed.get_world_size() if joined else 1
    if count == 1:
        raise FastMemError(
            f"model.backbone.tp_plan: {tp_plan} shares the model among processes, and there is one; start it "
            "with --trainer.devices N or torchrun --nproc-per-node N, or use --model.backbone.device_map auto"
        )
    mesh = torch._C._get_accelerator().type
    if mesh != device.type:
        raise FastMemError(
            f"model.backbone.tp_plan: transformers shards on this machine's {mesh}, trainer.accelerator says "
            f"{device.type}; allowed: --trainer.accelerator {'gpu' if mesh == 'cuda' else mesh}"
        )
    return count


@contextmanager
def loading(tp_plan: str, model: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Arguments of ``from_pretrained`` that keep this process's share only; ``model`` has no weights yet."""
    from transformers.distributed import DistributedConfig

    count = check_processes(tp_plan, device)
    _check_plan(model, count)
    # Where it looks which GPU is this process's; launchers other than torchrun do not say it there.
    environment = {}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        environment["LOCAL_RANK"] = str(index)
    with patch_environment(**environment):
        yield {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=count)}


def _check_plan(model: Any, count: int) -> None:
    name, plan = type(model).__name__, model.tp_plan or {}
    layers = find_anatomy(model).layout.blocks.rpartition(".")[2]
    if not any(f"{layers}.*" in rule for rule in plan):
        raise FastMemError(
            f"model.backbone.tp_plan: transformers has no plan to shard {name}; allowed: "
            "--model.backbone.device_map auto"
        )
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if _shares_heads(plan) and heads % count:
        raise FastMemError(
            f"model.backbone.tp_plan: {count} processes cannot share the {heads} key and value heads of "
            f"{name}; allowed: a divisor of {heads}, or --model.backbone.device_map auto"
        )


@torch.no_grad()
def make_tail_whole(model: Any, num_layers: int) -> None:
    """Give every process, all at once, the whole trained FFNs, blocks above the first, norm and head."""
    anatomy = find_anatomy(model)
    tail = [*trained_part(anatomy, num_layers), *anatomy.ends]
    embedding = model.get_input_embeddings()
    if embedding.weight is anatomy.head.weight:
        tail.append(embedding)
    found: dict[nn.Parameter, nn.Parameter] = {}
    for module in [inner for part in tail for inner in part.modules()]:
        for name, parameter in module._parameters.items():
            if is_sharded(parameter):
                if parameter not in found:
                    found[parameter] = nn.Parameter(whole(parameter), requires_grad=False)
                module._parameters[name] = found[parameter]
    for module in model.modules():
        # What is whole needs none of the plan's wrappers. Norms of single heads have one for gradients.
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if getattr(module, "_is_hooked", False) and own and not any(map(is_sharded, own)):
            module.__dict__.pop("forward", None)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this process holds a share of a tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; for a share, all processes have to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def trained_part(anatomy: Anatomy, num_layers: int) -> list[nn.Module]:
    """The lowest trained FFN and all blocks above it."""
    first = len(anatomy.blocks) - num_layers
    return [*anatomy.site_modules(first), *anatomy.blocks[first + 1 :]]


def _shares_heads(plan: dict[str, str]) -> bool:
    return any(rule.rsplit(".", 1)[-1] in _KEYS and style == "colwise" for rule, style in plan.items())
