"""Which part of a model goes to which device, decided before anything is loaded, and what crosses over then.

Batches and memories are with the trained blocks, the final norm and the LM head: on the tail's device.
Accelerate's ``infer_auto_device_map`` balances weights, not what a batch has left beside them (docs/LOG.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import nn

from fastmem_pl.backbone.anatomy import Anatomy, find_anatomy
from fastmem_pl.backbone.footprint import Footprint, trunk_bytes_per_token, usable_bytes
from fastmem_pl.backbone.split import Tail
from fastmem_pl.base.errors import FastMemError, nearest, unknown

POLICIES = ("auto", "balanced", "sequential")
DeviceMap = str | Mapping[str, Any]

# Beside the weights there should be room for a batch of so many samples, rather for fewer than for none.
_SAMPLES, _TOKENS = (8, 4, 2, 1), 1024
# Share of the free memory that weights and that batch may fill, and what libraries take of a GPU for
# themselves: their kernels' workspace.
_FILLED, _WORKSPACE = 0.95, 1 << 29


@dataclass(frozen=True)
class Part:
    """A piece of a model that stays whole: a block, or a module outside of them with tensors of its own."""

    name: str
    size: int  # bytes
    block: int | None
    tail: bool  # shares the tail's device
    entry: bool  # the embeddings, and what the body makes of positions, which is beside them


def parts_of(model: Any, anatomy: Anatomy, num_layers: int, stored: float | None = None) -> list[Part]:
    """The parts of a model; ``stored``: bytes of a weight in linear maps of the trunk, if quantized."""
    names = {module: name for name, module in model.named_modules()}
    body, blocks = f"{names[anatomy.body]}.", f"{names[anatomy.blocks]}."
    embedding, ends = names[model.get_input_embeddings()], {names[module] for module in anatomy.ends}
    config = model.config.get_text_config()
    tied = model.get_input_embeddings().weight is anatomy.head.weight or config.tie_word_embeddings
    first, parts = len(anatomy.blocks) - num_layers, {}
    buffers = model.named_buffers(remove_duplicate=False)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
        owner, block = name.rpartition(".")[0], None
        if name.startswith(blocks):
            number = name.removeprefix(blocks).partition(".")[0]
            owner, block = blocks + number, int(number)
        elif blocks.startswith(f"{owner}."):
            owner = name
        entry = owner == embedding or (owner.startswith(body) and block is None and owner not in ends)
        tail = owner in ends or (entry and tied) or (block is not None and block >= first)
        size = tensor.nbytes
        if owner == embedding and tied:
            size = 0  # it is the head's weight, and counted there
        elif stored is not None and block is not None and not tail and tensor.ndim == 2:
            size = int(tensor.numel() * stored)
        size += parts[owner].size if owner in parts else 0
        parts[owner] = Part(owner, size, block, tail, entry)
    return list(parts.values())


def device_plan(
    device_map: DeviceMap,
    model: Any,
    num_layers: int,
    precision: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    stored: float | None = None,
) -> dict[str, torch.device]:
    """A device for every part of a model without weights; ``device`` is where a policy puts the tail.

    ``precision`` is the types of the weights and of the products.
    """
    anatomy = find_anatomy(model)
    parts = parts_of(model, anatomy, num_layers, stored)
    if isinstance(device_map, Mapping):
        embedding = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embedding)
        return _given_devices(device_map, parts, name)
    if device_map not in POLICIES:
        raise unknown("model.backbone.device_map", device_map, [*POLICIES, "a mapping of modules to devices"])
    devices = _devices(device)
    if len(devices) == 1 and device.type != "cuda":
        return {part.name: devices[0] for part in parts}
    free = {one: space_for_weights(one) for one in devices}
    # As few devices as will do: every crossing costs time, and CUDA graphs record one device.
    counts = [len(devices)] if device_map == "balanced" else range(1, len(devices) + 1)
    for samples in _SAMPLES:
        reserve = Reserve.of(model, anatomy, num_layers, precision, device, samples, _TOKENS)
        for count in counts:
            some = [*devices[: count - 1], devices[-1]]
            found = lay_out(parts, some, free, reserve, balanced=device_map != "sequential")
            if found is not None:
                return found
    needed = sum(part.size for part in parts) + reserve.tail
    found = ", ".join(f"{one} ({max(size, 0) / 2**30:.1f} GiB)" for one, size in free.items())
    raise FastMemError(
        f"model.backbone.device_map: {device_map} finds no room for the model, {needed / 2**30:.1f} GiB "
        f"with one sample, on {found}; allowed: --trainer.precision bf16-true, "
        "--model.backbone.quantization, more devices, or a mapping that leaves some blocks on the cpu"
    )


def space_for_weights(device: torch.device) -> float:
    """Bytes that weights and a batch may fill."""
    return usable_bytes(device, _FILLED) - _WORKSPACE


@dataclass(frozen=True)
class Reserve:
    """Bytes for a batch beside the weights: of the tail, of every trunk block, and of any device."""

    tail: int
    block: int
    device: int

    @classmethod
    def of(
        cls,
        model: Any,
        anatomy: Anatomy,
        num_layers: int,
        precision: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        samples: int,
        tokens: int,
    ) -> Self:
        """Count for ``samples`` of ``tokens`` each; the rest as :func:`device_plan`."""
        weights, products = precision
        tail = Tail(anatomy, num_layers, products, torch.device("meta"))
        config = model.config.get_text_config()
        # Reference predictions as they are kept without the kernel: logits, and with a soft-cap two of them.
        reference = tail.head_weight.shape[0] * (4 if tail.softcap is None else 8)
        footprint = Footprint.of_tail(tail, config, num_layers, device, products, reference)
        copied = 0 if products == weights else tail.num_trained + tail.head_weight.numel()
        block, passing = (samples * tokens * size for size in trunk_bytes_per_token(tail, config, products))
        return cls(footprint.cost(samples, tokens) + copied * products.itemsize, block, passing)


def _devices(device: torch.device) -> list[torch.device]:
    # All GPUs, that of the program last; or what the program runs on.
    if device.type != "cuda":
        return [device]
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return sorted(gpus, key=lambda gpu: gpu == device)


def lay_out(
    parts: Sequence[Part],
    devices: Sequence[torch.device],
    free: Mapping[torch.device, float],
    reserve: Reserve,
    balanced: bool,
) -> dict[str, torch.device] | None:
    """Blocks in order over the devices, the tail on the last; ``None`` when they do not fit."""
    blocks = sorted((p for p in parts if p.block is not None and not p.tail), key=lambda part: part.block)
    fixed = dict.fromkeys(devices, reserve.device)
    fixed[devices[-1]] += reserve.tail + sum(part.size for part in parts if part.tail)
    fixed[devices[0]] += sum(part.size for part in parts if part.block is None and not part.tail)
    space = [free[device] - fixed[device] for device in devices]

    def fill(left: float) -> list[torch.device] | None:
        """A device for every block when each device keeps so many bytes."""
        places, number, used = [], 0, 0.0
        for block in blocks:
            size = block.size + reserve.block
            while used + size > space[number] - left:
                number, used = number + 1, 0.0
                if number == len(devices):
                    return None
            used += size
            places.append(devices[number])
        return places

    if min(space) < 0 or fill(0) is None:
        return None
    low, high = 0.0, max(space)
    for _ in range(40 if balanced else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) is None else (middle, high)
    of_block = dict(zip((block.name for block in blocks), fill(low), strict=True))
    return {part.name: of_block.get(part.name, devices[-1] if part.tail else devices[0]) for part in parts}


def _given_devices(
    device_map: Mapping[str, Any], parts: Sequence[Part], embedding: str
) -> dict[str, torch.device]:
    # The longest name that a part begins with counts; transformers takes layers.1 for layers.10 as well.
    places = {name: re.sub(r"^(?=\d+$)", "cuda:", str(place)) for name, place in device_map.items()}
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for place in places.values():
        if place not in there:
            raise unknown("model.backbone.device_map", place, there)
    known, found = set(), {}
    for part in parts:
        # The name and all that it begins with, longest first: ["a.b", "a", ""].
        words = part.name.split(".")
        prefixes = [".".join(words[:count]) for count in range(len(words), -1, -1)]
        known.update(prefixes)
        name = next((prefix for prefix in prefixes if prefix in places), None)
        if name is None:
            raise FastMemError(f"model.backbone.device_map: {part.name!r} has no device; give one to '', all")
        found[part.name] = torch.device(places[name])
    for name in set(places) - known:
        raise FastMemError(
            f"model.backbone.device_map: {name!r} is no module of the model, or a part of a block; allowed: "
            f"whole modules{nearest(name, known)}"
        )
    # Tied embeddings go where the head goes, and what is beside them with them, whatever the mapping says.
    entry = [part for part in parts if part.entry]
    ends = [part.name for part in parts if part.tail and not part.entry]
    device = found[ends[-1] if entry[0].tail else embedding]
    return found | {part.name: device for part in entry}


@dataclass(frozen=True)
class Placement:
    """Devices of the embeddings, of each block, and of the LM head (the tail's, where memories are)."""

    entry: torch.device
    blocks: tuple[torch.device, ...]
    tail: torch.device

    @classmethod
    def of(cls, model: Any, anatomy: Anatomy) -> Self:
        """Look where parameters are."""
        entry = model.get_input_embeddings().weight.device
        blocks = [_device_of(f"block {i}", [block], entry) for i, block in enumerate(anatomy.blocks)]
        tail = _device_of("the final norm with the LM head", anatomy.ends, entry)
        return cls(entry, tuple(blocks), tail)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, each once, in the order of a pass."""
        return tuple(dict.fromkeys((self.entry, *self.blocks, self.tail)))

    @property
    def spread(self) -> bool:
        """Whether there are several."""
        return len(self.devices) > 1


def let_cross(model: Any, anatomy: Anatomy, placement: Placement) -> None:
    """Make a model that lies on several devices run, by hooks in place of those of Accelerate."""
    if getattr(model, "_fastmem_crosses", False):
        return
    model._fastmem_crosses = True
    # Accelerate wraps the forward of every module, which copies of a module would run past: a hook of PyTorch
    # is in a dict that shallow copies share, and a pass crosses at blocks only.
    remove_hook_from_submodules(model)
    for module in model.modules():
        # It leaves the class's method on each module, bound to that one.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for module, device in zip(
        [anatomy.body, *anatomy.blocks], [placement.entry, *placement.blocks], strict=True
    ):
        module.register_forward_pre_hook(partial(_send, device), with_kwargs=True)


def _send(device: torch.device, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A cache has the tensors of each block where that block is.
    return send_to_device(args, device), send_to_device(kwargs, device, skip_keys="past_key_values")


def _device_of(name: str, modules: Sequence[nn.Module], default: torch.device) -> torch.device:
    devices = list(dict.fromkeys(p.device for module in modules for p in module.parameters()))
    if len(devices) > 1 or torch.device("meta") in devices:
        found = " and ".join("no device (offloaded)" if d.type == "meta" else str(d) for d in devices)
        raise FastMemError(f"model.backbone.device_map: {name} is on {found}; allowed: one that computes")
    return devices[0] if devices else default
