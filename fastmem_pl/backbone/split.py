"""The trunk/tail split: what memorizing can change, and what it cannot.

The trunk is everything up to the first trained FFN. For every position it gives the residual stream without
that FFN's contribution, and the FFN's input; both are constant while the FFN is trained, and so is the KV
cache. The tail is the rest: the trained FFN, blocks above it, the final norm and the LM head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastmem_pl.backbone.anatomy import Anatomy, with_ffn
from fastmem_pl.backbone.experts import RoutedFFN, Routing
from fastmem_pl.backbone.ffn import FFN, BaseActivations, Delta
from fastmem_pl.backbone.modules import float_copy, replaced, with_forward
from fastmem_pl.backbone.norms import with_fused_norms
from fastmem_pl.backbone.replay import CACHE, Record, Replay, recorded
from fastmem_pl.backbone.shortcuts import Shortcuts


@dataclass
class TailInputs:
    """What the tail needs of a trunk pass: residual stream and input of the first trained FFN, ``(B, T, D)``.

    ``calls`` are the arguments with which the model called each block above that FFN. ``early`` are hidden
    states at the last position, ``(B, 1, D)``, by their numbers in a model's ``hidden_states``. ``record`` is
    there where the tail runs the model's own code.
    """

    residual: Tensor
    ffn_input: Tensor
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
    early: Mapping[int, Tensor] = field(default_factory=dict)
    record: Record | None = None
    routing: Routing | None = None

    def at(self, mask: Tensor) -> Self:
        """The positions of all rows where ``mask`` ``(B, T)`` holds, as those of one row."""
        return self._each(lambda tensor: tensor[mask][None])

    def last(self) -> Self:
        """Keep the last position only; all, with a record or blocks above the FFN, which attend to all."""
        return self if self.calls or self.record else self._each(lambda tensor: tensor[:, -1:])

    def expand(self, rows: int) -> Self:
        """One sample's inputs as those of ``rows``, in the same memory."""
        index = self.residual.new_zeros(rows, dtype=torch.long)
        expanded = self._each(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))
        return replace(expanded, calls=self.calls, record=self.record and self.record.rows(index))

    def rows(self, index: Tensor) -> Self:
        """Pick rows, repeats allowed; of the trunk's results, not of blocks above the first trained FFN."""
        found = self._each(lambda tensor: tensor[index])
        return replace(found, record=self.record and self.record.rows(index))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        early = {number: change(hidden) for number, hidden in self.early.items()}
        routing = self.routing and self.routing.each(change)
        return type(self)(change(self.residual), change(self.ffn_input), (), early, routing=routing)


class Trunk:
    """A shallow copy of the model, with the first trained FFN tapped and nothing run above it.

    ``early`` are numbers of hidden states to hand over, none above the first trained block's input. With
    ``record``, passes keep what a replay needs.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        num_layers: int,
        early: Sequence[int] = (),
        fuse_norms: bool = True,
        record: bool = False,
    ) -> None:
        # The functions hold what a pass leaves, not the trunk: no cycle keeps a model alive that is no longer
        # used.
        self._seen = seen = _Seen()
        layout, names = anatomy.layout, anatomy.layout.blocks
        blocks = [with_fused_norms(block) if fuse_norms else block for block in anatomy.blocks]
        first = len(blocks) - num_layers
        blocks[first] = _tapped(blocks[first], anatomy, seen, record)
        for number in early:
            blocks[number] = with_forward(blocks[number], partial(_probe, seen, blocks[number], number))
        blocks[first + 1 :] = [
            with_forward(block, partial(_note_call, seen)) for block in blocks[first + 1 :]
        ]
        parts = {f"{names}.{number}": block for number, block in enumerate(blocks)}
        parts[layout.head] = with_forward(anatomy.head, _same)
        outside = [path for path in layout.fixed if not path.startswith(f"{names}.")] if record else []
        parts |= {p: recorded(anatomy.model.get_submodule(p), p, lambda: seen.record) for p in outside}
        # What the model runs above its blocks would be run on hidden states that lack the FFN.
        ends = {id(module) for module in anatomy.ends[:-1]}
        plain = not record and len(ends) == 1
        above = [p for p in layout.dependent if id(anatomy.model.get_submodule(p)) in ends] if plain else []
        for path in above:
            norm = anatomy.model.get_submodule(path)
            parts[path] = with_forward(norm, partial(_left_out, seen, norm))
        self.model, self._record = replaced(anatomy.model, parts), record
        allowed = signature(anatomy.model.forward).parameters.values()
        self._takes = (
            None if any(p.kind is Parameter.VAR_KEYWORD for p in allowed) else {p.name for p in allowed}
        )

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> TailInputs:
        """Run on ``input_ids`` ``(B, T)``, with a mask ``(B, past + T)`` or the causal one."""
        seen = self._seen
        seen.clear()
        seen.record = Record(input_ids)
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
        }
        if self._takes is not None:
            given = {name: value for name, value in given.items() if name in self._takes}
        try:
            self.model(input_ids=input_ids, use_cache=cache is not None, **given)
            residual = seen.residual
            if residual.ndim > 3:
                # Several streams, which only the model's own code reads.
                residual = seen.ffn_input[0].reshape(*input_ids.shape, -1)
            shape = *input_ids.shape, -1
            early = {number: hidden.to(residual.device) for number, hidden in seen.early.items()}
            ffn_input, *routing = (tensor.reshape(shape) for tensor in seen.ffn_input)
            record = seen.record if self._record else None
            routing = Routing(*routing) if routing else None
            return TailInputs(residual, ffn_input, tuple(seen.calls), early, record, routing)
        finally:
            seen.clear()


class _Seen:
    """What a trunk pass in progress has come by."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.ffn_input = self.residual = self.record = self.beside = None
        self.early: dict[int, Tensor] = {}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


def _left_out(seen: _Seen, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Some models call their final norm on the embeddings as well.
    return module.forward(hidden, *args, **kwargs) if seen.residual is None else hidden


def _same(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


def _probe(
    seen: _Seen, block: nn.Module, number: int, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    seen.early[number] = hidden_states[:, -1:]
    return block.forward(hidden_states, *args, **kwargs)


def _note_call(seen: _Seen, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    seen.calls.append((args, kwargs))
    # As a block of this model returns it.
    return hidden_states if seen.beside is None else (hidden_states, *seen.beside)


def _tapped(block: nn.Module, anatomy: Anatomy, seen: _Seen, record: bool) -> nn.Module:
    """A block that hands over its FFN's input and goes on without the FFN's output."""
    site, layout = anatomy.layout.site, anatomy.layout
    experts = block.get_submodule(site.exit)

    def tap(x: Tensor, *routing: Tensor) -> Tensor:
        # What the base model's experts give is constant while others are trained.
        seen.ffn_input = (x, *routing, experts.forward(x, *routing)) if anatomy.routed else (x,)
        return torch.zeros_like(x)

    last = f"{layout.blocks}.{len(anatomy.blocks) - 1}."
    fixed = [path.removeprefix(last) for path in layout.fixed if path.startswith(last)] if record else []
    inner = dict(block.named_modules())
    parts = {path: recorded(inner[path], path, lambda: seen.record) for path in fixed}
    twin = with_ffn(replaced(block, parts), site, tap)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = twin.forward(*args, **kwargs)
        seen.residual = found if isinstance(found, Tensor) else found[0]
        seen.beside = None if isinstance(found, Tensor) else tuple(found[1:])
        if record:
            # What is run again has a cache of its own, if it needs one.
            kept = {name: CACHE if isinstance(value, Cache) else value for name, value in kwargs.items()}
            seen.record.call = tuple(CACHE if isinstance(value, Cache) else value for value in args), kept
            seen.record.beside = seen.beside
        return found

    return with_forward(block, forward)


class Tail:
    """First trained FFN, blocks above it, final norm and LM head, with optional per-sample deltas."""

    def __init__(
        self,
        anatomy: Anatomy,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        shortcuts: Shortcuts | None = None,
        max_experts: int | None = None,
    ) -> None:
        total = len(anatomy.blocks)
        self.layers = list(range(total - num_layers, total))
        self.routed = anatomy.routed
        if self.routed:
            self.ffns = [RoutedFFN(anatomy.experts(i), dtype, max_experts) for i in self.layers]
        else:
            self.ffns = [FFN(anatomy.projections(i), anatomy.form(i), dtype) for i in self.layers]
        # Of a model without weights, only shapes are asked for.
        self.shortcuts = shortcuts or Shortcuts((1.0, None), (1.0, None))
        needed = None in (self.shortcuts.block, self.shortcuts.top)
        self._replay = Replay(anatomy, self.layers[0], device) if needed else None
        self._post_norm = _norm(anatomy.blocks[self.layers[0]], self.shortcuts.block, device)
        self._final_norm = _norm(anatomy.model, self.shortcuts.top, device)
        # Of the upper FFNs in the call in progress, lowest first.
        self._upper_deltas: list[Delta | None] = [None] * (num_layers - 1)
        self._upper = []
        for number, block in enumerate(anatomy.blocks[self.layers[0] + 1 :]):
            compute = partial(_memorized, self.ffns[number + 1], self._upper_deltas, number)
            self._upper.append(with_ffn(block, anatomy.layout.site, compute))
        self._block_dtype = anatomy.head.weight.dtype
        self.head_weight = anatomy.head.weight.detach().to(dtype)
        bias = getattr(anatomy.head, "bias", None)
        scale = self.shortcuts.logit_scale
        self.head_bias = None if bias is None else bias.detach().float() * scale
        self.softcap = self.shortcuts.softcap

    @property
    def replays(self) -> bool:
        """Whether it runs the model's own code, for which a trunk pass has to keep a record."""
        return self._replay is not None

    @property
    def keeps_states(self) -> bool:
        """Whether keys, values or states in it depend on the memory, so that each decode needs its own."""
        return len(self.layers) > 1 or self.shortcuts.mixes

    @property
    def num_trained(self) -> int:
        """Number of weights of the trained FFNs."""
        return sum(shape.numel() for ffn in self.ffns for shape in ffn.shapes.values())

    def base(self, inputs: TailInputs, deltas: Sequence[Delta] | None = None) -> BaseActivations:
        """Products of the base weights with the first trained FFN's input.

        Of routed experts, those that the ``deltas`` are of, or that were chosen to be memorized.
        """
        if not self.routed:
            return self.ffns[0].base(inputs.ffn_input)
        return self.ffns[0].base(inputs.ffn_input, inputs.routing, deltas and deltas[0])

    def hidden(
        self,
        inputs: TailInputs,
        base: BaseActivations,
        deltas: Sequence[Delta] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the head's input, ``(B, T, D)`` float32; arguments as :meth:`states`."""
        return self.to_head(self.states(inputs, base, deltas, cache)[-1], inputs)

    def states(
        self,
        inputs: TailInputs,
        base: BaseActivations,
        deltas: Sequence[Delta] | None = None,
        cache: Cache | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Return hidden states above each trained block, lowest first, ``(B, T, D)`` float32.

        ``deltas`` are by trained layer, lowest first; ``between`` applies between trained blocks.
        """
        output = base.output if deltas is None else self.ffns[0].memorized(inputs.ffn_input, deltas[0], base)
        states = [self._after_ffn(output, inputs, cache)]
        if deltas is not None:
            self._upper_deltas[:] = deltas[1:]
        try:
            for block, (args, kwargs) in zip(self._upper, inputs.calls, strict=True):
                args = [cache if isinstance(value, Cache) else value for value in args]
                kwargs = {name: cache if isinstance(v, Cache) else v for name, v in kwargs.items()}
                hidden = between(states[-1]) if between else states[-1]
                found = block(hidden.to(self._block_dtype), *args, **kwargs)
                states.append((found if isinstance(found, Tensor) else found[0]).float())
        finally:
            self._upper_deltas[:] = [None] * len(self._upper)
        return states

    def to_head(self, state: Tensor, inputs: TailInputs) -> Tensor:
        """The head's input for hidden states above the last block, with all that scales its logits."""
        if self.shortcuts.top is None:
            hidden, scale = self._replay.top(state, inputs.record), 1.0
        else:
            hidden, scale = self._final_norm(state), self.shortcuts.top[0]
        scale *= self.shortcuts.logit_scale
        return hidden if scale == 1 else hidden * scale

    def _after_ffn(self, output: Tensor, inputs: TailInputs, cache: Cache | None) -> Tensor:
        if self.shortcuts.block is None:
            return self._replay.block(output, inputs.record, cache)
        scale, change = self.shortcuts.block[0], self._post_norm(output)
        return inputs.residual.float() + (change if scale == 1 else scale * change)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """Product of the head with ``hidden`` ``(..., D)``, without bias and soft-cap, float32."""
        return self.head_product(hidden).float()

    def head_product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The same in the type of the products; into ``out``, if given, for ``hidden`` ``(N, D)``."""
        hidden = hidden.to(self.head_weight.dtype)
        if out is not None:
            return torch.mm(hidden, self.head_weight.t(), out=out)
        return F.linear(hidden, self.head_weight)

    @property
    def plain_head(self) -> bool:
        """Whether logits are the head's product and nothing else."""
        return self.head_bias is None and self.softcap is None

    def finish_logits(self, raw: Tensor) -> Tensor:
        """Add the head's bias to its product, ``(..., V)``, and apply the soft-cap."""
        if self.head_bias is not None:
            raw = raw + self.head_bias
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw


def _norm(root: nn.Module, shortcut: tuple[float, str | None] | None, device: torch.device) -> nn.Module:
    """A float32 copy of the norm that a shortcut names."""
    path = shortcut and shortcut[1]
    return float_copy(root.get_submodule(path), device) if path else nn.Identity()


def _memorized(ffn: FFN, deltas: Sequence[Delta | None], number: int, ffn_input: Tensor) -> Tensor:
    delta = deltas[number]
    rows = len(ffn_input) if delta is None else len(next(iter(delta.values())))
    # Some models hand their FFNs positions of all rows in one dimension.
    x = ffn_input.reshape(rows, -1, ffn_input.shape[-1])
    base = ffn.base(x)
    output = base.output if delta is None else ffn.memorized(x, delta, base)
    return output.to(ffn_input.dtype).reshape(ffn_input.shape)
