"""The trunk/tail split: what memorizing can change, and what it cannot.

The trunk is everything up to the last FFN that is not trained. It gives, for every position, the
residual stream without that FFN's contribution and the FFN's input. Both are constant while the FFN is
trained, and so is the KV cache of the trunk. The tail is the rest: the trained FFN, for
``num_layers > 1`` the blocks above it, the final norm and the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.backbone.ffn import FFN, BaseActivations, Delta
from fastmem_pl.backbone.norms import shallow_copy, with_fused_norms


@dataclass
class BlockCall:
    """Arguments of one call of a block, after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_cache(self, cache: Cache | None) -> BlockCall:
        """The same call with another KV cache."""
        args = tuple(cache if isinstance(v, Cache) else v for v in self.args)
        return BlockCall(args, {k: cache if isinstance(v, Cache) else v for k, v in self.kwargs.items()})


@dataclass
class TailInputs:
    """What the tail needs of a trunk pass.

    Attributes:
        residual: residual stream without the first trained FFN's output, ``(B, T, D)``.
        ffn_input: input of the first trained FFN, ``(B, T, D)``.
        calls: arguments, hidden states aside, with which the model called each block above that FFN
            (attention mask, position embeddings, cache); empty for ``num_layers == 1``.
        early: hidden states at the last position by number, ``(B, 1, D)``, where the trunk was asked for
            them: number ``l`` is the input of block ``l``, as in a model's ``hidden_states``.
    """

    residual: Tensor
    ffn_input: Tensor
    calls: tuple[BlockCall, ...] = ()
    early: Mapping[int, Tensor] = field(default_factory=dict)

    def last(self) -> TailInputs:
        """Keep the last position only; with blocks above the FFN, which attend to all, keep all."""
        if self.calls:
            return self
        return TailInputs(self.residual[:, -1:], self.ffn_input[:, -1:], early=self.early)

    def expand(self, rows: int) -> TailInputs:
        """One sample's inputs as those of ``rows``, in the same memory."""
        residual, ffn_input = (t.expand(rows, -1, -1) for t in (self.residual, self.ffn_input))
        early = {number: hidden.expand(rows, -1, -1) for number, hidden in self.early.items()}
        return TailInputs(residual, ffn_input, self.calls, early)

    def rows(self, index: Tensor) -> TailInputs:
        """Pick rows, repeats allowed; of the trunk's results, not of blocks above the first trained FFN."""
        early = {number: hidden[index] for number, hidden in self.early.items()}
        return TailInputs(self.residual[index], self.ffn_input[index], early=early)


class Trunk:
    """The model's own body, with the first trained FFN tapped and all above it passed through.

    It is a shallow copy that shares every parameter with the model; the model itself is not altered.

    Args:
        anatomy: the model's parts.
        num_layers: trained layers.
        early: numbers of hidden states to hand over, none above the first trained block's input.
        fuse_norms: on a GPU, replace RMS norms that the model's code spells out (see :mod:`.norms`).
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
            calls.append(BlockCall(args, kwargs))
            return hidden_states

        blocks = [with_fused_norms(block) if fuse_norms else block for block in anatomy.blocks]
        first = len(blocks) - num_layers
        blocks[first] = shallow_copy(blocks[first], mlp=_with_forward(nn.Module(), tap))
        for number in early:
            blocks[number] = _with_forward(blocks[number], partial(probe, blocks[number], number))
        blocks[first + 1 :] = [_with_forward(block, record) for block in blocks[first + 1 :]]
        self.body = shallow_copy(
            anatomy.body,
            **{anatomy.layers_name: nn.ModuleList(blocks), anatomy.norm_name: nn.Identity()},
        )

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> TailInputs:
        """Run the trunk on ``input_ids`` ``(B, T)``; a given ``cache`` grows by ``T``.

        ``attention_mask`` is ``(B, past + T)``; without one the plain causal mask applies, which is
        what right-padded rows need.
        """
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
        self._post_norm = _float_copy(anatomy.post_norm(self.layers[0]) or nn.Identity(), device)
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
        """Weights of the trained FFNs."""
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

        Args:
            inputs: of the trunk.
            base: :meth:`base` of them.
            deltas: one per trained layer, lowest first; ``None`` applies the base model.
            cache: KV cache of the blocks above the first trained FFN (``num_layers > 1`` only).
            between: applied to the residual stream between trained blocks.
        """
        output = base.output if deltas is None else self.ffns[0].memorized(inputs.ffn_input, deltas[0], base)
        states = [inputs.residual.float() + self._post_norm(output)]
        if deltas is not None:
            self._upper_deltas[:] = deltas[1:]
        try:
            for block, call in zip(self._upper, inputs.calls, strict=True):
                call = call.with_cache(cache)
                hidden = between(states[-1]) if between else states[-1]
                states.append(block(hidden.to(self._block_dtype), *call.args, **call.kwargs).float())
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
    """A frozen float32 copy of a norm (a few KB), so that it takes float32 activations."""
    return deepcopy(norm).to(device=device, dtype=torch.float32).requires_grad_(False)


def _with_forward(module: nn.Module, forward: Callable) -> nn.Module:
    """A shallow copy that computes something else; the model still finds attributes and hooks on it."""
    twin = shallow_copy(module)
    twin.forward = forward
    return twin


def _memorized(ffn: FFN, deltas: Sequence[Delta | None], number: int, ffn_input: Tensor) -> Tensor:
    """An FFN above the first trained one, with its delta of the call in progress."""
    base, delta = ffn.base(ffn_input), deltas[number]
    output = base.output if delta is None else ffn.memorized(ffn_input, delta, base)
    return output.to(ffn_input.dtype)
