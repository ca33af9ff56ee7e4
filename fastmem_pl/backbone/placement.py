"""Which part of a model goes to which device, decided from its shapes before anything is loaded.

Batches, memories and the products with the head are where the trained blocks, the final norm and the LM
head are, so these share a device, the tail's, and the other devices get the more blocks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmem_pl.backbone.families import Anatomy, find_anatomy
from fastmem_pl.backbone.mapping import given_devices
from fastmem_pl.base.errors import FastMemError, unknown

log = logging.getLogger(__name__)

POLICIES = ("auto", "balanced", "sequential")
DeviceMap = str | Mapping[str, Any]

# Beside the weights there should be room for a batch of so many samples, rather for fewer than for none.
_SAMPLES, _TOKENS = (8, 4, 2, 1), 1024
# Share of the free memory that weights and that batch may fill, and what libraries take of a GPU for
# themselves: their kernels' workspace.
_FILLED, _WORKSPACE = 0.95, 1 << 29


@dataclass(frozen=True)
class Part:
    """A piece of a model that stays whole.

    Attributes:
        name: of the module, or of a parameter that is in no part.
        module: ``None`` for a parameter.
        size: bytes.
        block: number of the block that it is, or ``None``.
        tail: whether it has to be on the tail's device.
        entry: whether it has to be where the embeddings are: what the body makes of positions is there.
    """

    name: str
    module: nn.Module | None
    size: int
    block: int | None = None
    tail: bool = False
    entry: bool = False


def parts_of(model: Any, anatomy: Anatomy, num_layers: int, stored: float | None = None) -> list[Part]:
    """The parts of a model, in the order of its modules; it may be on the meta device.

    Args:
        model: a causal language model.
        anatomy: its parts that memories act on.
        num_layers: trained layers.
        stored: bytes of a weight in the linear maps of the trunk; by default those of its type.
    """
    embedding = model.get_input_embeddings()
    tied = embedding.weight is anatomy.head.weight or model.config.get_text_config().tie_word_embeddings
    numbers = {id(block): i for i, block in enumerate(anatomy.blocks)}
    first, parts = len(numbers) - num_layers, []

    def walk(module: nn.Module, prefix: str) -> None:
        entry = module is anatomy.body
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                parts.append(Part(prefix + name, None, tensor.nbytes, None, entry and tied, entry))
        for name, child in module.named_children():
            number = numbers.get(id(child))
            if number is None and any(id(inner) in numbers for inner in child.modules()):
                walk(child, f"{prefix}{name}.")
                continue
            inside = set(child.modules())
            embeds, ends = embedding in inside, {anatomy.head, anatomy.final_norm} & inside
            begins = number is None and not ends and (embeds or entry)
            # Tied embeddings are the head's weight, and are counted there.
            in_tail = bool(ends) or (begins and tied) or (number is not None and number >= first)
            size = 0 if embeds and tied else _size(child, None if number is None or in_tail else stored)
            parts.append(Part(prefix + name, child, size, number, in_tail, begins))

    walk(model, "")
    return parts


def plan(
    device_map: DeviceMap,
    model: Any,
    num_layers: int,
    precision: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    stored: float | None = None,
) -> dict[str, torch.device]:
    """A device for every part of a model.

    Args:
        device_map: one of :data:`POLICIES`, or devices by names of modules.
        model: without weights, on the meta device.
        num_layers: trained layers.
        precision: types of the weights and of the products.
        device: the program's; where a policy puts the tail.
        stored: as :func:`parts_of`.

    Raises:
        FastMemError: when the map does not fit the model, or the model does not fit the devices.
    """
    anatomy = find_anatomy(model)
    parts = parts_of(model, anatomy, num_layers, stored)
    if isinstance(device_map, Mapping):
        return given_devices(device_map, parts, model.get_input_embeddings())
    if device_map not in POLICIES:
        raise unknown("model.device_map", device_map, [*POLICIES, "a mapping of module names to devices"])
    devices = _devices(device)
    if len(devices) == 1 and device.type != "cuda":
        return {part.name: devices[0] for part in parts}
    free = {one: usable_space(one) for one in devices}
    # As few devices as will do: every crossing costs time, and CUDA graphs record one device.
    counts = [len(devices)] if device_map == "balanced" else range(1, len(devices) + 1)
    for samples in _SAMPLES:
        room = Room.of(model, anatomy, num_layers, precision, device, samples, _TOKENS)
        for count in counts:
            some = [*devices[: count - 1], devices[-1]]
            found = lay_out(parts, some, free, room, balanced=device_map != "sequential")
            if found is not None:
                used = list(dict.fromkeys(found.values()))
                log.info("model.device_map: %s, with room for %d samples", ", ".join(map(str, used)), samples)
                return found
    needed = sum(part.size for part in parts) + room.tail
    raise FastMemError(
        f"model.device_map: {device_map} finds no room for the model, {needed / 2**30:.1f} GiB with one "
        f"sample, on {', '.join(f'{d} ({max(b, 0) / 2**30:.1f} GiB)' for d, b in free.items())}; allowed: "
        "--trainer.precision bf16-true, --model.quantization, more devices, or a mapping that leaves some "
        "blocks on the cpu"
    )


def stored_size(quantized: str | None, config: Any) -> float | None:
    """Bytes of a quantized weight, its share of the scales included; ``None`` for plain ones.

    Args:
        quantized: as asked for, or the method of a checkpoint that is quantized already.
        config: of the checkpoint.
    """
    if quantized is None:
        return None
    told = f"{quantized} {getattr(config, 'quantization_config', '')}".lower().replace(" ", "")
    four = any(sign in told for sign in ("-4bit", "load_in_4bit':true", "int4"))
    return 0.55 if four else 1.05


def usable_space(device: torch.device) -> float:
    """Bytes that weights and a batch may fill."""
    return _FILLED * free_bytes(device) - _WORKSPACE


def free_bytes(device: torch.device) -> float:
    """Memory of a device that nothing uses."""
    if device.type != "cuda":
        import psutil

        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@dataclass(frozen=True)
class Room:
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
    ) -> Room:
        """Count for ``samples`` of ``tokens`` each; other arguments as those of :func:`plan`."""
        # Not above: memories are made with backbones.
        from fastmem_pl.backbone.footprint import Footprint, trunk_bytes_per_token
        from fastmem_pl.backbone.split import Tail
        from fastmem_pl.memory.settings import MemorizationSettings

        weights, products = precision
        tail = Tail(anatomy, num_layers, products, torch.device("meta"))
        config, settings = model.config.get_text_config(), MemorizationSettings(num_layers=num_layers)
        footprint = Footprint.of_tail(tail, config, num_layers, device, products, settings)
        copies = 0
        if products != weights:
            shapes = [shape.numel() for ffn in tail.ffns for shape in ffn.shapes.values()]
            copies = (sum(shapes) + anatomy.head.weight.numel()) * products.itemsize
        block, passing = (samples * tokens * size for size in trunk_bytes_per_token(tail, config, products))
        return cls(footprint.cost(samples, tokens) + copies, block, passing)


def _devices(device: torch.device) -> list[torch.device]:
    """All GPUs, that of the program last; or what the program runs on."""
    if device.type != "cuda":
        return [device]
    last = torch.cuda.device_count() - 1 if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != last]
    return [torch.device("cuda", i) for i in (*others, last)]


def lay_out(
    parts: Sequence[Part],
    devices: Sequence[torch.device],
    free: Mapping[torch.device, float],
    room: Room,
    balanced: bool,
) -> dict[str, torch.device] | None:
    """Blocks in order over the devices, the tail on the last; ``None`` when they do not fit."""
    blocks = sorted((p for p in parts if p.block is not None and not p.tail), key=lambda part: part.block)
    fixed = dict.fromkeys(devices, room.device)
    fixed[devices[-1]] += room.tail + sum(part.size for part in parts if part.tail)
    fixed[devices[0]] += sum(part.size for part in parts if part.block is None and not part.tail)
    space = [free[device] - fixed[device] for device in devices]

    def fill(left: float) -> list[int] | None:
        """How many blocks every device takes when each keeps so many bytes."""
        counts, place = [0] * len(devices), 0
        used = 0.0
        for block in blocks:
            size = block.size + room.block
            while place < len(devices) and used + size > space[place] - left:
                place, used = place + 1, 0.0
            if place == len(devices):
                return None
            used += size
            counts[place] += 1
        return counts

    if min(space) < 0 or fill(0) is None:
        return None
    low, high = 0.0, max(space)
    for _ in range(40 if balanced else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) is None else (middle, high)
    counts = fill(low)
    places = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    of_block = {block.name: place for block, place in zip(blocks, places, strict=True)}
    return {part.name: of_block.get(part.name, devices[-1] if part.tail else devices[0]) for part in parts}


def _size(module: nn.Module, stored: float | None) -> int:
    size = 0.0
    for inner in module.modules():
        for tensor in (*inner._parameters.values(), *inner._buffers.values()):
            if tensor is not None:
                packed = stored is not None and tensor.ndim == 2
                size += tensor.numel() * stored if packed else tensor.nbytes
    return int(size)
