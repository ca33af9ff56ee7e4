"""The parts of a causal language model that memories act on, as modules, and what its last FFNs compute."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastmem_pl.backbone.layout import Layout, Site, find_layout, is_linear, is_quantized
from fastmem_pl.backbone.modules import float_copy, replaced, stand_in
from fastmem_pl.base.errors import FastMemError

Combine = Callable[[Mapping[str, Tensor]], Tensor]
"""Takes outputs of an FFN's first linear maps by name, ``(..., F)``, to the input of its last one."""

_ACTIVATIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, lambda x: F.relu(x).square())


@dataclass(frozen=True)
class Projection:
    """One linear map of an FFN: ``weight`` is ``(out, in)``, ``bias`` ``(out,)`` or ``None``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Form:
    """What an FFN computes: ``activation(gate) * up``, ``activation(up)``, or what its ``own`` code does.

    ``parts`` names the rows of each entry, in order: ``gate`` and ``up`` may be halves of one matrix.
    """

    parts: tuple[tuple[str, ...], ...]
    activation: Callable[[Tensor], Tensor] | None = None
    own: Combine | None = None

    def combine(self, projections: Mapping[str, Tensor]) -> Tensor:
        """See :data:`Combine`."""
        if self.own is not None:
            return self.own(projections)
        if "gate" in projections:
            return self.activation(projections["gate"]) * projections["up"]
        return self.activation(projections["up"])


class Anatomy:
    """Blocks, head and FFNs of a model, by its :class:`~fastmem_pl.backbone.layout.Layout`."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.blocks: nn.ModuleList = model.get_submodule(layout.blocks)
        self.head: nn.Module = model.get_submodule(layout.head)
        self.body: nn.Module = model.get_submodule(layout.blocks.rpartition(".")[0])
        self._forms: dict[int, Form] = {}

    @property
    def ends(self) -> list[nn.Module]:
        """What a model runs after its blocks, the head last."""
        above = [p for p in self.layout.dependent if not p.startswith(f"{self.layout.blocks}.")]
        return [*map(self.model.get_submodule, above), self.head]

    @property
    def routed(self) -> bool:
        """Whether memories act on experts that a router chooses."""
        return not self.layout.site.entries

    def experts(self, layer: int) -> nn.Module:
        """The module that holds a block's routed experts."""
        return self.blocks[layer].get_submodule(self.layout.site.exit)

    def has_ffn(self, layer: int) -> bool:
        """Whether a block has an FFN in the same place, of the same kind, as the last one."""
        last, block = (dict(self.blocks[i].named_modules()) for i in (-1, layer))
        site = self.layout.site
        return all(type(block.get(path)) is type(last[path]) for path in (*site.entries, site.exit))

    def site_modules(self, layer: int) -> list[nn.Module]:
        """The modules whose weights memories change."""
        site = self.layout.site
        return [self.blocks[layer].get_submodule(path) for path in (*site.entries, site.exit)]

    def ffn_modules(self, layer: int) -> list[tuple[tuple[str, ...], nn.Module]]:
        """The linear modules of a block's FFN, each with the projections that its rows are, in order."""
        site, block = self.layout.site, self.blocks[layer]
        entries = zip(self.form(layer).parts, site.entries, strict=True)
        return [
            *((parts, block.get_submodule(path)) for parts, path in entries),
            (("down",), block.get_submodule(site.exit)),
        ]

    def form(self, layer: int) -> Form:
        """What a block's FFN computes between its linear maps."""
        if layer not in self._forms:
            self._forms[layer] = self._form(layer)
        return self._forms[layer]

    def projections(self, layer: int) -> dict[str, Projection]:
        """Views of the FFN's base weights under the names ``gate`` (if gated), ``up`` and ``down``."""
        found: dict[str, Projection] = {}
        for parts, module in self.ffn_modules(layer):
            check_plain("a feed-forward network", module)
            # GPT-2's Conv1D stores its weight as (in, out).
            weight = (module.weight.t() if isinstance(module, Conv1D) else module.weight).detach()
            bias = getattr(module, "bias", None)
            size = weight.shape[0] // len(parts)
            biases = (None,) * len(parts) if bias is None else bias.detach().split(size)
            for part, rows, own_bias in zip(parts, weight.split(size), biases, strict=True):
                found[part] = Projection(rows, own_bias)
        return {part: found[part] for part in ("gate", "up", "down") if part in found}

    @torch.no_grad()
    def _form(self, layer: int) -> Form:
        """Find the form by what the FFN makes of random numbers."""
        site, block = self.layout.site, self.blocks[layer]
        exit_module = block.get_submodule(site.exit)
        width = exit_module.weight.shape[0 if isinstance(exit_module, Conv1D) else 1]
        middle = _Middle(block, site.entries, site.exit)
        names = ("up",) if len(site.entries) == 1 else ("gate", "up")
        unknown = Form(tuple((name,) for name in names), own=middle)
        if middle.device.type == "meta":
            # Only the modules and their shapes matter then.
            return unknown
        generator = torch.Generator("cpu").manual_seed(0)
        widths = [_width(block.get_submodule(path)) for path in site.entries]
        values = [3 * torch.randn(1, 5, size, generator=generator, device="cpu") for size in widths]
        values = [value.to(middle.device) for value in values]
        if middle.module is None:
            # The two linear maps stand in the block itself, which the check of the whole split runs.
            activations = [m for m in block.children() if not is_linear(m) and not list(m.parameters())]
            others = filter(callable, vars(block).values())
            return Form((("up",),), activation=next(_elementwise([*activations, *others]), F.relu))
        expected = middle(dict(zip(names, values, strict=True)))
        for parts in _orders(widths, width):
            pieces = [
                piece for value, own in zip(values, parts, strict=True) for piece in value.chunk(len(own), -1)
            ]
            given = dict(zip((part for own in parts for part in own), pieces, strict=True))
            for activation in (*_elementwise(middle.callables()), *_ACTIVATIONS):
                form = Form(parts, activation)
                if torch.allclose(form.combine(given).float(), expected.float(), rtol=1e-5, atol=1e-6):
                    return form
        return unknown


class _Middle:
    """What an FFN's own code does between its linear maps, in float32."""

    def __init__(self, block: nn.Module, entries: tuple[str, ...], exit_path: str) -> None:
        self.device = next(block.parameters()).device
        owner = exit_path.rpartition(".")[0]
        while owner and not all(path.startswith(f"{owner}.") for path in entries):
            owner = owner.rpartition(".")[0]
        # Not the block itself, which runs its attention too.
        self.module = block.get_submodule(owner) if owner else None
        self._entries = tuple(path.removeprefix(f"{owner}.") for path in entries)
        self._exit = exit_path.removeprefix(f"{owner}.")
        self._twin: nn.Module | None = None

    def __call__(self, projections: Mapping[str, Tensor]) -> Tensor:
        """See :data:`Combine`."""
        if self._twin is None:
            self._twin = self._made()
        given = [projections[name] for name in ("gate", "up") if name in projections]
        self._given[:], self._seen[:] = given, []
        x = given[0].new_zeros(*given[0].shape[:-1], self._width)
        needed = [
            p for p in signature(self._twin.forward).parameters.values() if p.default is Parameter.empty
        ]
        try:
            self._twin.forward(*(x for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)))
            return self._seen[0]
        finally:
            # A batch's deltas hang on them.
            self._given.clear()
            self._seen.clear()

    def callables(self) -> list[Any]:
        """What may be its activation."""
        inner = [m for path, m in self._twin.named_modules() if path and not is_linear(m)]
        return [*inner, *filter(callable, vars(self.module).values())]

    def _made(self) -> nn.Module:
        self._given, self._seen = list[Tensor](), list[Tensor]()
        self._width = _width(self.module.get_submodule(self._exit))

        def give(number: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._given[number]

        def see(hidden: Tensor) -> Tensor:
            self._seen.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], self._width)

        inner = {path: self.module.get_submodule(path) for path in (*self._entries, self._exit)}
        stand_ins = {path: stand_in(inner[path], give(i)) for i, path in enumerate(self._entries)}
        stand_ins[self._exit] = stand_in(inner[self._exit], see)
        kept = {
            path: float_copy(m)
            for path, m in self.module.named_children()
            if path not in stand_ins and not list(m.children())
        }
        return replaced(self.module, {**kept, **stand_ins})


def _width(linear: nn.Module) -> int:
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


def _orders(widths: list[int], width: int) -> Iterator[tuple[tuple[str, ...], ...]]:
    """What the rows of the entries may be."""
    if len(widths) == 2:
        yield from ((("gate",), ("up",)), (("up",), ("gate",)))
    elif widths == [2 * width]:
        yield from ((("gate", "up"),), (("up", "gate"),))
    else:
        yield (("up",),)


def _elementwise(candidates: list[Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Those that take a tensor to one of its shape."""
    for candidate in candidates:
        try:
            device = next(iter(candidate.parameters())).device if isinstance(candidate, nn.Module) else "cpu"
        except StopIteration:
            device = "cpu"
        probe = torch.linspace(-2, 2, 8, device=device)
        try:
            found = candidate(probe)
        except Exception:  # whatever it is, it is no activation
            continue
        if isinstance(found, Tensor) and found.shape == probe.shape and not torch.equal(found, probe):
            yield candidate


def with_ffn(block: nn.Module, site: Site, compute: Callable[..., Tensor]) -> nn.Module:
    """A copy of a block whose FFN's output is what ``compute`` makes of its input ``(..., D)``.

    Of routed experts ``compute`` also gets which experts a position goes to, and with what weights.
    """
    if not site.entries or site.whole is not None:
        path = site.whole or site.exit
        return replaced(block, {path: stand_in(block.get_submodule(path), compute)})
    seen: list[Tensor] = []

    def enter(width: int, x: Tensor) -> Tensor:
        seen.append(x)
        return x.new_zeros(*x.shape[:-1], width)

    def leave(hidden: Tensor) -> Tensor:
        x = seen[-1]
        seen.clear()
        return compute(x)

    inner = {path: block.get_submodule(path) for path in (*site.entries, site.exit)}
    parts = {path: stand_in(inner[path], partial(enter, _width(inner[path]))) for path in site.entries}
    return replaced(block, {**parts, site.exit: stand_in(inner[site.exit], leave)})


def check_plain(what: str, module: nn.Module) -> None:
    """Refuse a module that memories act on when its weight is quantized."""
    # Layers of some quantizers have no attribute of this name.
    if is_quantized(getattr(module, "weight", None)):
        raise FastMemError(
            f"model.backbone.quantization: {what} is quantized ({type(module).__name__}) where memories "
            "act; load the model with Backbone.load, and with num_layers as in the settings"
        )


def find_anatomy(model: Any, experts: str = "auto") -> Anatomy:
    """Find the parts of a Hugging Face causal language model, or refuse it and say why.

    ``experts`` are those of :func:`~fastmem_pl.backbone.layout.find_layout`.
    """
    return Anatomy(model, find_layout(model, experts))
