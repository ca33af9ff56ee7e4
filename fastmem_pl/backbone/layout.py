"""Where a model computes its last feed-forward network, found by a pass on tensors without values.

No module is known by name. The model runs on ``meta`` tensors, which have shapes and no values, while every
operation is watched: an FFN is where linear maps of one input come together, position by position, in another
linear map back to that input's width. Attention mixes positions on the way and so does not count.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fastmem_pl.base.errors import FastMemError, one_line

# Operations that keep positions apart, beside all elementwise ones: views, and reductions within a position.
_POSITION_WISE = frozenset(
    """view _unsafe_view reshape split chunk slice select unsqueeze squeeze expand t transpose permute
    _to_copy clone copy_ alias detach mean sum split_with_sizes unbind narrow cat native_layer_norm var_mean
    _fused_rms_norm std topk empty_like zeros_like ones_like zeros ones full arange lift_fresh empty stack
    linalg_vector_norm native_dropout""".split()  # noqa: SIM905 (a name a line would be longer than the rest)
)
_MIXED, _BLOCK_INPUT, _OUTPUT = "mixed", "input of the block", "output of the FFN"


@dataclass(frozen=True)
class Site:
    """One FFN in its block; modules are named relative to the block.

    ``entries`` are linear maps of the FFN's input in the order of their calls, ``exit`` is the one whose
    output is the FFN's; of routed experts, ``exit`` is the module that holds them all, without entries.
    ``whole`` is a module that takes that input to that output and does nothing else, if there is one.
    """

    entries: tuple[str, ...]
    exit: str
    whole: str | None = None


@dataclass(frozen=True)
class Layout:
    """Names of the parts of a model that memories act on.

    ``fixed`` are the outermost modules whose results the last FFN has no influence on, ``dependent`` those
    that take part in what the model computes of its output, but for the head; of blocks, only the last one's
    are among them.
    """

    blocks: str  # the list of decoder blocks
    head: str
    site: Site
    fixed: tuple[str, ...]
    dependent: tuple[str, ...]


def find_layout(model: nn.Module, experts: str = "auto") -> Layout:
    """Find the last FFN of a causal language model; a model may be on the ``meta`` device.

    Of a mixture, ``experts`` are its ``shared`` ones, those that it ``routed`` positions to, or ``auto``: the
    shared ones where there are any.

    Raises:
        FastMemError: where there is none, or the model does not run on tensors without values.
    """
    known = model.__dict__.setdefault("_fastmem_layouts", {})
    if experts not in known:
        known[experts] = _find(model, experts)
    return known[experts]


def keep_layouts(model: nn.Module, other: nn.Module) -> None:
    """Find all layouts of a model for another of the same kind."""
    for experts in ("auto", "shared", "routed"):
        with suppress(FastMemError):
            find_layout(model, experts)
    other.__dict__["_fastmem_layouts"] = dict(model.__dict__["_fastmem_layouts"])


def _find(model: nn.Module, experts: str) -> Layout:
    name = type(model).__name__
    names = {module: path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    blocks = _blocks_of(model)
    if head is None or blocks is None:
        children = ", ".join(path for path, _ in model.named_children())
        raise FastMemError(
            f"model.backbone: {name} has no decoder blocks with an LM head (its parts: {children}); allowed: "
            "causal language models (docs/families.md)"
        )
    last = blocks[-1]
    search = _Search(last)
    # Not of what the block is given, which may be several streams in one tensor.
    search.hidden_size = getattr(model.config.get_text_config(), "hidden_size", 0)
    calls = search.calls_of(model)
    dense, routed = _largest(calls, search.hidden_size), _routed(calls)
    site = {"auto": dense or routed, "shared": dense, "routed": routed}[experts]
    if site is None and (dense or routed):
        raise FastMemError(
            f"model.memorize.experts: the last block of {name} has no {experts} experts; allowed: auto"
        )
    if site is None:
        raise FastMemError(
            f"model.backbone: the last block of {name} has no feed-forward network ({type(last).__name__} "
            f"with {', '.join(path for path, _ in last.named_children())}); allowed: models whose last block "
            "ends in one (docs/families.md)"
        )
    inner = dict(last.named_modules())
    fixed, dependent = _Consequences(inner[site.exit], blocks).parts_of(model)
    dependent = tuple(path for path in dependent if not f"{names[head]}.".startswith(f"{path}."))
    # The FFN's own first part gives nothing that a replay needs.
    entries = [f"{names[last]}.{path}." for path in site.entries]
    fixed = tuple(path for path in fixed if not any(entry.startswith(f"{path}.") for entry in entries))
    return Layout(names[blocks], names[head], site, fixed, dependent)


def _blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """The list of decoder blocks: the outermost one with the most weights."""
    for body in (model.get_decoder(), model.base_model):
        found: dict[str, nn.ModuleList] = {}
        for path, module in body.named_modules():
            nested = any(path.startswith(f"{other}.") for other in found)
            if (
                isinstance(module, nn.ModuleList)
                and len(module)
                and list(module[-1].children())
                and not nested
            ):
                found[path] = module
        if found:
            return max(found.values(), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return None


class _Flow(TorchDispatchMode):
    """Carries labels from tensors to all that is computed of them, and runs a model without values."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: Any = WeakTensorKeyDictionary()
        self.handles = ExitStack()

    def of(self, values: Any) -> frozenset[str]:
        """Labels of all tensors in a structure."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self.labels.get(tensor, frozenset()) for tensor in tensors))

    def put(self, values: Any, labels: frozenset[str]) -> None:
        """Label all tensors in a structure."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.labels[leaf] = labels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation."""
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        if operation in ("_local_scalar_dense", "equal", "is_nonzero"):
            # What a mask allows must not matter: every comparison of values holds.
            return True
        labels = self.of((args, kwargs))
        if operation == "nonzero":
            found = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
            self.put(found, labels | {_MIXED})
            return found
        if torch.Tag.pointwise not in func.tags and operation not in _POSITION_WISE:
            labels |= {_MIXED}
        found = func(*args, **kwargs)
        self.put(found, labels)
        return found

    def run(self, model: nn.Module) -> None:
        """A pass over two rows of seven tokens, with hooks and stand-ins, which go afterwards."""
        tensors = (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors}
        ids = torch.ones(2, 7, dtype=torch.long, device="meta")
        with self.handles, torch.inference_mode(False), torch.no_grad(), torch.device("meta"), self:
            for module in model.modules():
                stand_in = _stand_in(module)
                if stand_in is not None:
                    self.handles.enter_context(_forward(module, stand_in))
            try:
                functional_call(
                    model, empty, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False
                )
            except Exception as error:
                raise FastMemError(
                    f"model.backbone: {type(model).__name__} does not run on tensors without values, by "
                    f"which its feed-forward network is found: {one_line(error)} (docs/families.md)"
                ) from error

    def watch(self, module: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
        """Hooks that get arguments, and arguments with results."""
        if before:
            hook = lambda m, args, kwargs: before((args, kwargs))  # noqa: E731
            self.handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if after:
            done = lambda m, args, kwargs, found: after((args, kwargs), found)  # noqa: E731
            self.handles.callback(module.register_forward_hook(done, with_kwargs=True).remove)


@dataclass(frozen=True)
class _Call:
    path: str
    module: nn.Module
    given: Tensor
    found: Tensor
    sources: frozenset[str]  # labels of what it was given


class _Search(_Flow):
    """Labels the output of every linear map in a block by its name."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block, self._calls, self.hidden_size = block, [], 0

    def calls_of(self, model: nn.Module) -> list[_Call]:
        """Calls of linear maps and of experts in the block, in order; those of all its modules too."""
        self.watch(self._block, before=self._enter)
        for path, module in self._block.named_modules():
            if path:
                self.watch(module, after=partial(self._note, path, module))
        self.run(model)
        return self._calls

    def _enter(self, given: Any) -> None:
        self.put(given, frozenset({_BLOCK_INPUT}))
        self.hidden_size = self.hidden_size or _tensors(given)[0].shape[-1]

    def _note(self, path: str, module: nn.Module, given: Any, found: Any) -> None:
        given, results = _tensors(given), _tensors(found)
        if not given or not results:
            return
        sources = self.of(given[0])
        if is_linear(module):
            self.put(results[0], frozenset({path}))
        self._calls.append(_Call(path, module, given[0], results[0], sources))


def _largest(calls: list[_Call], hidden_size: int) -> Site | None:
    """The FFN with most weights among linear maps."""
    linear = {call.path: call for call in calls if is_linear(call.module)}
    sites: dict[Site, int] = {}
    for call in linear.values():
        entries = [linear[path] for path in linear if path in call.sources]
        inputs = {id(entry.given) for entry in entries}
        width = call.given.shape[-1]
        fits = len(inputs) == 1 and call.sources == {entry.path for entry in entries}
        fits = fits and entries[0].given.shape == call.found.shape and call.found.shape[-1] == hidden_size
        fits = fits and all(entry.found.shape[-1] in (width, 2 * width) for entry in entries)
        if fits:
            whole = next(
                (
                    c.path
                    for c in calls
                    if c.given is entries[0].given and c.found is call.found and c is not call
                ),
                None,
            )
            site = Site(tuple(entry.path for entry in entries), call.path, whole)
            sites[site] = sum(entry.module.weight.numel() for entry in (*entries, call))
    return max(reversed(sites), key=sites.get) if sites else None


def _routed(calls: list[_Call]) -> Site | None:
    """The last routed experts."""
    return next((Site((), call.path) for call in reversed(calls) if is_routed(call.module)), None)


class _Consequences(_Flow):
    """Labels the output of one module, and sees which other modules it reaches."""

    def __init__(self, source: nn.Module, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._source, self._blocks = source, blocks
        self._reached: dict[str, bool] = {}

    def parts_of(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the outermost modules that it does not reach, and of those that it does."""
        paths = {module: path for path, module in model.named_modules()}
        source, blocks = paths[self._source], paths[self._blocks]
        lower = tuple(f"{blocks}.{number}." for number in range(len(self._blocks) - 1))
        for module, path in paths.items():
            if path and not f"{path}.".startswith(lower):
                self.watch(module, after=partial(self._note, path))
        # After the hooks that note its call.
        self.watch(self._source, after=lambda given, found: self.put(found, frozenset({_OUTPUT})))
        self.run(model)
        around = [path for path in self._reached if source == path or source.startswith(f"{path}.")]
        # Modules whose parents are not called, but used by their methods, are among them.
        outer = [path for path in self._reached if path not in around]
        inside = lambda path: any(path.startswith(f"{other}.") for other in outer)  # noqa: E731
        outer = [path for path in outer if not inside(path)]
        return tuple(p for p in outer if not self._reached[p]), tuple(p for p in outer if self._reached[p])

    def _note(self, path: str, given: Any, found: Any) -> None:
        self._reached[path] = self._reached.get(path, False) or _OUTPUT in self.of(given)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map, quantized ones too."""
    weight = getattr(module, "weight", None)
    one = isinstance(weight, Tensor) and not isinstance(module, nn.Embedding) and not list(module.children())
    return one and (weight.ndim == 2 or hasattr(module, "in_features"))


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a weight is stored in fewer bits, as bitsandbytes, torchao or others keep it."""
    packed = type(weight).__module__.split(".")[0] in ("bitsandbytes", "torchao")
    return packed or weight is None or not weight.is_floating_point()


def is_routed(module: nn.Module) -> bool:
    """Whether a module holds experts behind the interface that transformers has for them."""
    return (
        is_experts(module)
        and hasattr(module, "_apply_gate")
        and not getattr(module, "has_post_expert_norm", False)
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several FFNs."""
    return sum(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) > 1


def _stand_in(module: nn.Module) -> Callable | None:
    """A forward in place of what cannot run without values: experts, whose work follows from values."""
    if is_experts(module):
        return lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
    if hasattr(module, "in_features") and is_quantized(module.weight):
        # Quantized weights have a shape of their own.
        return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)
    return None


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Another forward for a module, for some time."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
