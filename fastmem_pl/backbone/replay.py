"""What a model computes after its last FFN, by its own code, run again with another output of that FFN.

A pass through the trunk records the results of all modules that the FFN has no influence on; in a replay they
stand in for these modules. The rest is run for real, in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from fastmem_pl.backbone.anatomy import Anatomy, with_ffn
from fastmem_pl.backbone.modules import float_copy, replaced, with_forward

# Stands for a cache in the arguments of a recorded call.
CACHE = object()


@dataclass
class Record:
    """Results of a trunk pass by the names of the modules that they are from, in the order of their calls."""

    ids: Tensor  # (B, T)
    results: dict[str, list[Any]] = field(default_factory=dict)
    # With which the block of the first trained FFN was called, and what it returned beside hidden states.
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    beside: tuple[Any, ...] | None = None

    def rows(self, index: Tensor) -> Self:
        """Pick rows of everything that has a row for each sample or for each of its positions."""
        samples, positions = self.ids.shape

        def pick(tensor: Tensor) -> Tensor:
            if tensor.ndim and len(tensor) == samples:
                return tensor.index_select(0, index.to(tensor.device))
            if tensor.ndim and len(tensor) == samples * positions:
                rows = tensor.unflatten(0, (samples, positions))
                return rows.index_select(0, index.to(tensor.device)).flatten(0, 1)
            return tensor

        found = tree_map_only(Tensor, pick, [self.ids, self.results, self.call, self.beside])
        return type(self)(*found)


def recorded(module: nn.Module, path: str, record: Callable[[], Record]) -> nn.Module:
    """A module whose results go to the record of the pass in progress."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = module.forward(*args, **kwargs)
        record().results.setdefault(path, []).append(found)
        return found

    return with_forward(module, forward)


class Replay:
    """The part of a model above the FFN of one block, to run with recorded results."""

    def __init__(self, anatomy: Anatomy, layer: int, device: torch.device) -> None:
        layout, self._device = anatomy.layout, device
        self._model, self._blocks = anatomy.model, layout.blocks
        self._block, site = anatomy.blocks[layer], layout.site
        last = f"{layout.blocks}.{len(anatomy.blocks) - 1}."
        self.fixed = [path.removeprefix(last) for path in layout.fixed if path.startswith(last)]
        self.outside = [path for path in layout.fixed if not path.startswith(f"{layout.blocks}.")]
        own = f"{layout.blocks}.{layer}."
        within = [p.removeprefix(last) for p in layout.dependent if p.startswith(last)]
        self.after = {path: self._own(own + path) for path in within}
        self.above = {
            path: self._own(path) for path in layout.dependent if not path.startswith(f"{layout.blocks}.")
        }
        self._head, self._site = layout.head, site

    def _own(self, path: str) -> nn.Module:
        return float_copy(self._model.get_submodule(path), self._device)

    def block(self, output: Tensor, record: Record, cache: Cache | None = None) -> Tensor:
        """What the block makes of its FFN's output ``(B, T, D)``, ``(B, T, ...)`` float32.

        What mixes positions after the FFN goes on from, and writes to, the ``cache``.
        """
        block = self._block
        given = {p: self._given(block, p, record.results[p]) for p in self.fixed if p in record.results}
        block = with_ffn(
            replaced(block, {**given, **self.after}),
            self._site,
            lambda x, *_: output.reshape(x.shape).clone(),
        )
        args, kwargs = self._float(record.call)
        args = [cache if value is CACHE else value for value in args]
        kwargs = {name: cache if value is CACHE else value for name, value in kwargs.items()}
        found = block(*args, **kwargs)
        return (found if isinstance(found, Tensor) else found[0]).float()

    def top(self, state: Tensor, record: Record) -> Tensor:
        """The head's input for what the last block gives."""
        seen: list[Tensor] = []

        def see(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden)
            return hidden

        self._run(record, state, see)
        return seen[0].float()

    def logits(self, raw: Tensor, record: Record, state: Tensor) -> Tensor:
        """What the model makes of the head's output."""
        found = self._run(record, state, lambda hidden, *args, **kwargs: raw)
        return found.logits if hasattr(found, "logits") else found[0]

    def _run(self, record: Record, state: Tensor, head: Callable) -> Any:
        blocks = self._model.get_submodule(self._blocks)
        found = state if record.beside is None else (state, *record.beside)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return found

        parts = {f"{self._blocks}.{i}": with_forward(block, stand_in) for i, block in enumerate(blocks)}
        given = {
            path: self._given(self._model, path, record.results[path])
            for path in self.outside
            if path in record.results
        }
        head_module = self._model.get_submodule(self._head)
        twin = replaced(
            self._model, {**parts, **given, **self.above, self._head: with_forward(head_module, head)}
        )
        return twin(input_ids=record.ids, use_cache=False)

    def _given(self, root: nn.Module, path: str, results: Sequence[Any]) -> nn.Module:
        left = iter([self._float(result) for result in results])
        return with_forward(root.get_submodule(path), lambda *args, **kwargs: next(left))

    def _float(self, values: Any) -> Any:
        # Copies: the model's code may add to them in place.
        def own(tensor: Tensor) -> Tensor:
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            return tensor.to(self._device, kind, copy=True)

        return tree_map_only(Tensor, own, values)
