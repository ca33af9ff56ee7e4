"""The trunk/tail split: what memorizing can change, and what it cannot.

The trunk is everything up to the last FFN that is not trained. It gives, for every position, the
residual stream without that FFN's contribution and the FFN's input. Both are constant while the FFN is
trained, and so is the KV cache of the trunk. The tail is the rest: the trained FFN, for
``num_layers > 1`` the blocks above it, the final norm and the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastmem_pl.backbone.copies import float_copy, shallow_copy
from fastmem_pl.backbone.crossing import Entrance
from fastmem_pl.backbone.families import Anatomy
from fastmem_pl.backbone.ffn import FFN, BaseActivations, Delta
from fastmem_pl.backbone.norms import with_fused_norms


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
        """Keep the last position only; blocks above the FFN attend to all, so with them all stay."""
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
        self._tap = _Tap()
        blocks = [with_fused_norms(block) if fuse_norms else block for block in anatomy.blocks]
        first = len(blocks) - num_layers
        blocks[first] = shallow_copy(blocks[first], mlp=self._tap)
        self._probes = {number: _Probe(blocks[number]) for number in early}
        for number, probe in self._probes.items():
            blocks[number] = probe
        self._recorders = [_Recorder(block) for block in blocks[first + 1 :]]
        blocks[first + 1 :] = self._recorders
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
        residual = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        calls = tuple(recorder.take() for recorder in self._recorders)
        early = {number: probe.take().to(residual.device) for number, probe in self._probes.items()}
        return TailInputs(residual, self._tap.take(), calls, early)


class Tail:
    """First trained FFN, blocks above it, final norm and LM head, with optional per-sample deltas."""

    def __init__(self, anatomy: Anatomy, num_layers: int, dtype: torch.dtype, device: torch.device) -> None:
        total = len(anatomy.blocks)
        self.layers = list(range(total - num_layers, total))
        self.ffns = [FFN(anatomy.projections(i), anatomy.activation(i), dtype) for i in self.layers]
        post_norm = anatomy.post_norm(self.layers[0])
        self._post_norm = None if post_norm is None else float_copy(post_norm, device)
        self.final_norm = float_copy(anatomy.final_norm, device)
        self._upper_ffns = [_MemorizedFFN(ffn) for ffn in self.ffns[1:]]
        self._upper = [
            shallow_copy(anatomy.blocks[i], mlp=module)
            for i, module in zip(self.layers[1:], self._upper_ffns, strict=True)
        ]
        self._block_dtype = anatomy.head.weight.dtype
        self.head_weight = anatomy.head.weight.detach().to(dtype)
        bias = getattr(anatomy.head, "bias", None)
        self.head_bias = None if bias is None else bias.detach().float()
        self.softcap = anatomy.softcap

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
        norm_every_layer: bool = False,
    ) -> list[Tensor]:
        """Return the residual stream above each trained block, lowest first, ``(B, T, D)`` float32.

        Args:
            inputs: of the trunk.
            base: :meth:`base` of the same inputs.
            deltas: one per trained layer, lowest first; ``None`` applies the base model.
            cache: KV cache of the blocks above the first trained FFN (``num_layers > 1`` only).
            norm_every_layer: apply the final norm between the trained blocks as well, as the published
                code does from the second step on.
        """
        output = base.output if deltas is None else self.ffns[0].memorized(inputs.ffn_input, deltas[0], base)
        if self._post_norm is not None:
            output = self._post_norm(output)
        states = [inputs.residual.float() + output]
        with self._memorized(deltas):
            for block, call in zip(self._upper, inputs.calls, strict=True):
                call = call.with_cache(cache)
                hidden = self.final_norm(states[-1]) if norm_every_layer else states[-1]
                states.append(block(hidden.to(self._block_dtype), *call.args, **call.kwargs).float())
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
        """Add the head's bias and apply the soft-cap."""
        if self.head_bias is not None:
            raw = raw + self.head_bias
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw

    @contextmanager
    def _memorized(self, deltas: Sequence[Delta] | None) -> Iterator[None]:
        for module, delta in zip(self._upper_ffns, (deltas or [None] * len(self.ffns))[1:], strict=True):
            module.delta = delta
        try:
            yield
        finally:
            for module in self._upper_ffns:
                module.delta = None


class _Tap(nn.Module):
    """Stands in for an FFN: remembers its input and contributes nothing to the residual stream."""

    def forward(self, ffn_input: Tensor) -> Tensor:
        self._input = ffn_input
        return torch.zeros_like(ffn_input)

    def take(self) -> Tensor:
        return self.__dict__.pop("_input")


class _Wrapper(nn.Module):
    """Stands in for a block; the model reads the block's attributes through it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        for hook in block._forward_pre_hooks.values():
            # Arguments are on the block's device when they are seen here.
            if isinstance(hook, Entrance):
                self.register_forward_pre_hook(hook, with_kwargs=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)


class _Probe(_Wrapper):
    """Runs its block and remembers the block's input at the last position."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._input = hidden_states[:, -1:]
        return self.block(hidden_states, *args, **kwargs)

    def take(self) -> Tensor:
        return self.__dict__.pop("_input")


class _Recorder(_Wrapper):
    """Remembers how the model called the block and passes the hidden states on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._call = BlockCall(args, kwargs)
        return hidden_states

    def take(self) -> BlockCall:
        return self.__dict__.pop("_call")


class _MemorizedFFN(nn.Module):
    """An FFN inside a block above the first trained one, with the deltas of the call in progress."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn
        self.delta: Delta | None = None

    def forward(self, ffn_input: Tensor) -> Tensor:
        base = self.ffn.base(ffn_input)
        output = base.output if self.delta is None else self.ffn.memorized(ffn_input, self.delta, base)
        return output.to(ffn_input.dtype)
