"""The trunk/tail split: what memorizing can change, and what it cannot.

The trunk is everything up to the first trained FFN. For every position it gives the residual stream without
that FFN's contribution, and the FFN's input; both are constant while the FFN is trained, and so is the KV
cache. The tail is the rest: the trained FFN, blocks above it, the final norm and the LM head.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.backbone.ffn import FFN, BaseActivations, Delta
from fastmem_pl.backbone.norms import shallow_copy, with_fused_norms


@dataclass
class TailInputs:
    """What the tail needs of a trunk pass: residual stream and input of the first trained FFN, ``(B, T, D)``.

    ``calls`` are the arguments with which the model called each block above that FFN. ``early`` are hidden
    states at the last position, ``(B, 1, D)``, by their numbers in a model's ``hidden_states``.
    """

    residual: Tensor
    ffn_input: Tensor
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
    early: Mapping[int, Tensor] = field(default_factory=dict)

    def last(self) -> Self:
        """Keep the last position only; with blocks above the FFN, which attend to all, keep all."""
        return self if self.calls else self._each(lambda tensor: tensor[:, -1:])

    def expand(self, rows: int) -> Self:
        """One sample's inputs as those of ``rows``, in the same memory."""
        return self._each(lambda tensor: tensor.expand(rows, -1, -1), self.calls)

    def rows(self, index: Tensor) -> Self:
        """Pick rows, repeats allowed; of the trunk's results, not of blocks above the first trained FFN."""
        return self._each(lambda tensor: tensor[index])

    def _each(self, change: Callable[[Tensor], Tensor], calls: Sequence[Any] = ()) -> Self:
        early = {number: change(hidden) for number, hidden in self.early.items()}
        return type(self)(change(self.residual), change(self.ffn_input), calls, early)


class Trunk:
    """A shallow copy of the model's own body, with the first trained FFN tapped and nothing run above it.

    ``early`` are numbers of hidden states to hand over, none above the first trained block's input.
    """

    def __init__(
        self, anatomy: Anatomy, num_layers: int, early: Sequence[int] = (), fuse_norms: bool = True
    ) -> None:
        # What a pass leaves: the FFN's input, early hidden states by number, calls of the blocks above. The
        # functions hold these, not the trunk: no cycle keeps a model alive that is no longer used.
        self._seen = tapped, states, calls = [], {}, []

        def tap(ffn_input: Tensor) -> Tensor:
            tapped.append(ffn_input)
            return torch.zeros_like(ffn_input)

        def probe(block: nn.Module, number: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            states[number] = hidden_states[:, -1:]
            return block.forward(hidden_states, *args, **kwargs)

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return hidden_states

        blocks = [with_fused_norms(block) if fuse_norms else block for block in anatomy.blocks]
        first = len(blocks) - num_layers
        blocks[first] = shallow_copy(blocks[first], mlp=_with_forward(nn.Module(), tap))
        for number in early:
            blocks[number] = _with_forward(blocks[number], partial(probe, blocks[number], number))
        blocks[first + 1 :] = [_with_forward(block, record) for block in blocks[first + 1 :]]
        replaced = {anatomy.layers_name: nn.ModuleList(blocks), anatomy.norm_name: nn.Identity()}
        self.body = shallow_copy(anatomy.body, **replaced)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> TailInputs:
        """Run on ``input_ids`` ``(B, T)``, with a mask ``(B, past + T)`` or the causal one."""
        tapped, states, calls = self._seen
        try:
            residual = self.body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
            early = {number: hidden.to(residual.device) for number, hidden in states.items()}
            return TailInputs(residual, tapped[0], tuple(calls), early)
        finally:
            for seen in self._seen:
                seen.clear()


class Tail:
    """First trained FFN, blocks above it, final norm and LM head, with optional per-sample deltas."""

    def __init__(self, anatomy: Anatomy, num_layers: int, dtype: torch.dtype, device: torch.device) -> None:
        total = len(anatomy.blocks)
        self.layers = list(range(total - num_layers, total))
        self.ffns = [FFN(anatomy.projections(i), anatomy.activation(i), dtype) for i in self.layers]
        # A norm on the FFN's output, as Gemma 2 and 3 and OLMo 2 have it.
        lowest = anatomy.blocks[self.layers[0]]
        post_norm = getattr(lowest, "post_feedforward_layernorm", nn.Identity())
        self._post_norm = _float_copy(post_norm, device)
        self.final_norm = _float_copy(anatomy.final_norm, device)
        # Of the upper FFNs in the call in progress, lowest first.
        self._upper_deltas: list[Delta | None] = [None] * (num_layers - 1)
        self._upper = []
        for number, block in enumerate(anatomy.blocks[self.layers[0] + 1 :]):
            forward = partial(_memorized, self.ffns[number + 1], self._upper_deltas, number)
            self._upper.append(shallow_copy(block, mlp=_with_forward(nn.Module(), forward)))
        self._block_dtype = anatomy.head.weight.dtype
        self.head_weight = anatomy.head.weight.detach().to(dtype)
        bias = getattr(anatomy.head, "bias", None)
        self.head_bias = None if bias is None else bias.detach().float()
        self.softcap = anatomy.softcap

    @property
    def num_trained(self) -> int:
        """Number of weights of the trained FFNs."""
        return sum(shape.numel() for ffn in self.ffns for shape in ffn.shapes.values())

    def base(self, inputs: TailInputs) -> BaseActivations:
        """Products of the base weights with the first trained FFN's input."""
        return self.ffns[0].base(inputs.ffn_input)

    def hidden(
        self,
        inputs: TailInputs,
        base: BaseActivations,
        deltas: Sequence[Delta] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the head's input, ``(B, T, D)`` float32; arguments as :meth:`residuals`."""
        return self.final_norm(self.residuals(inputs, base, deltas, cache)[-1])

    def residuals(
        self,
        inputs: TailInputs,
        base: BaseActivations,
        deltas: Sequence[Delta] | None = None,
        cache: Cache | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the residual stream above each trained block, lowest first, ``(B, T, D)`` float32.

        ``deltas`` are by trained layer, lowest first; ``between`` applies between trained blocks.
        """
        output = base.output if deltas is None else self.ffns[0].memorized(inputs.ffn_input, deltas[0], base)
        states = [inputs.residual.float() + self._post_norm(output)]
        if deltas is not None:
            self._upper_deltas[:] = deltas[1:]
        try:
            for block, (args, kwargs) in zip(self._upper, inputs.calls, strict=True):
                args = [cache if isinstance(value, Cache) else value for value in args]
                kwargs = {name: cache if isinstance(v, Cache) else v for name, v in kwargs.items()}
                hidden = between(states[-1]) if between else states[-1]
                states.append(block(hidden.to(self._block_dtype), *args, **kwargs).float())
        finally:
            self._upper_deltas[:] = [None] * len(self._upper)
        return states

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


def _float_copy(norm: nn.Module, device: torch.device) -> nn.Module:
    return deepcopy(norm).to(device=device, dtype=torch.float32).requires_grad_(False)


def _with_forward(module: nn.Module, forward: Callable) -> nn.Module:
    # The model still finds attributes and hooks on it.
    twin = shallow_copy(module)
    twin.forward = forward
    return twin


def _memorized(ffn: FFN, deltas: Sequence[Delta | None], number: int, ffn_input: Tensor) -> Tensor:
    base, delta = ffn.base(ffn_input), deltas[number]
    output = base.output if delta is None else ffn.memorized(ffn_input, delta, base)
    return output.to(ffn_input.dtype)
