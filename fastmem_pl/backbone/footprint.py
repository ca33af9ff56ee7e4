"""How much memory a batch takes beside the weights, and how much there is."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fastmem_pl import kernels
from fastmem_pl.backbone.split import Tail

# Share of the free memory that batches may fill: estimates are no measurements, allocators leave gaps.
_USABLE = {"cpu": 0.5, "cuda": 0.85}


@dataclass(frozen=True)
class Footprint:
    """Bytes that memorizing and answering a batch takes beside the weights, from the model's shapes."""

    per_sample: int  # deltas, moments, and what decoding copies of them
    per_token: int  # activations, reference predictions and KV cache, for every padded position
    per_pair: int  # Gram matrices of the clipping norm, for every two positions of a row
    fixed: int
    elsewhere: tuple[tuple[torch.device, int], ...] = ()  # a position's on the trunk's other devices

    @classmethod
    def of_tail(
        cls,
        tail: Tail,
        config: Any,
        num_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
        reference: int,
        float32_state: bool = False,
        kv_shards: int = 1,
    ) -> Self:
        """Count for the device of a tail, whose weights need not be loaded, and of ``num_blocks``.

        ``reference``: bytes of a label token's reference prediction. ``float32_state``: deltas and moments
        are not bfloat16 with the kernel. ``kv_shards``: processes that share the KV heads.
        """
        size, kernel = dtype.itemsize, kernels.usable(device, dtype)
        # Delta, moments and a copy for the products; without the kernel also the gradient.
        state = 4 + 8 + size if float32_state else 2 + 2 + 4
        state = state if kernel else 4 + 4 + 8 + size
        decoding = size if device.type == "cuda" else 0  # graphs read the memory from a place of their own
        # Of routed experts, each sample has those of its own memory, for products and for their decay.
        state += 2 * size if tail.routed else 0
        kv_cache = num_blocks * trunk_bytes_per_token(tail, config, dtype, kv_shards)[0]
        passes = 8 * size if tail.ffns[0].has_kernel() else 12 * 4
        width, hidden_size = tail.ffns[0].shapes["up"]
        activations = len(tail.ffns) * width * passes + 12 * 4 * hidden_size
        # Chunks of the head's products and their gradients.
        fixed = 1 << 27 if device.type == "cpu" else 1 << 30
        per_token = kv_cache + activations + reference
        return cls(tail.num_trained * (state + decoding), per_token, 12 if kernel else 0, fixed)

    def cost(self, samples: int, tokens: int) -> int:
        """Bytes of a batch whose longest row has ``tokens``, on the tail's device."""
        return self.fixed + samples * self._row(tokens)

    def samples_in(self, budget: float, tokens: int) -> int:
        """How many rows of ``tokens`` fit ``budget`` bytes of the tail's device, and what others have."""
        fitting = [(budget - self.fixed) // self._row(tokens)]
        fitting += [usable_bytes(device) // (tokens * size) for device, size in self.elsewhere]
        return int(min(fitting))

    def _row(self, tokens: int) -> int:
        return self.per_sample + tokens * (self.per_token + tokens * self.per_pair)


def trunk_bytes_per_token(tail: Tail, config: Any, dtype: torch.dtype, kv_shards: int = 1) -> tuple[int, int]:
    """Bytes of a position in one block's KV cache, and of its activations in the block that runs."""
    width, hidden_size = tail.ffns[0].shapes["up"]
    heads = getattr(config, "num_attention_heads", None) or 1
    head_size = getattr(config, "head_dim", None) or hidden_size // heads
    kv_heads = (getattr(config, "num_key_value_heads", None) or heads) // kv_shards
    kv_cache = 2 * 2 * kv_heads * head_size * dtype.itemsize  # the prompt's, and its copy
    return kv_cache, (6 * hidden_size + 3 * width) * dtype.itemsize


def usable_bytes(device: torch.device, share: float | None = None) -> float:
    """A share, by default what batches may fill, of the memory that is free or held by PyTorch unused."""
    share = share or _USABLE["cuda" if device.type == "cuda" else "cpu"]
    if device.type != "cuda":
        import psutil

        left = psutil.virtual_memory().available
        # The system does not count a container's limit as its own memory.
        with suppress(OSError, ValueError):
            limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
            left = min(left, float(limit) - float(used))
        return share * left
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    # torch.cuda.set_per_process_memory_fraction can be read since torch 2.8.
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        free = min(free, torch.cuda.get_per_process_memory_fraction(device) * total - used)
    return share * free
