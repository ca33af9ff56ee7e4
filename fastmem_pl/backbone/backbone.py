"""The frozen language model behind every memory and every answer."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from fastmem_pl.backbone import quantization as quantizing
from fastmem_pl.backbone.anatomy import check_plain, find_anatomy
from fastmem_pl.backbone.cache import state_bytes
from fastmem_pl.backbone.chat import ChatEncoder, ChatSettings
from fastmem_pl.backbone.footprint import Footprint, trunk_bytes_per_token
from fastmem_pl.backbone.loading import fingerprint_of, load_model
from fastmem_pl.backbone.placement import DeviceMap, Placement, let_cross
from fastmem_pl.backbone.settings import (
    COMPUTE_DTYPE,
    BackboneSettings,
    Precision,
    fabric_settings,
    normalize_precision,
)
from fastmem_pl.backbone.sharding import Shards, is_sharded, trained_part
from fastmem_pl.backbone.shortcuts import Shortcuts, find_shortcuts
from fastmem_pl.backbone.split import Tail, TailInputs, Trunk
from fastmem_pl.base.errors import FastMemError, one_line
from fastmem_pl.base.phases import is_out_of_memory

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Backbone:
    """A frozen causal language model, split into a trunk and a tail that memories act on.

    Base weights are never written to: a memory is a delta that the tail adds while it computes.

    Args:
        model: a Hugging Face causal language model.
        precision: ``32-true``; ``bf16-true`` (weights in bfloat16); ``bf16-mixed`` (float32 weights,
            bfloat16 products). In all of them norms and losses are float32.
        name: of the model in records.
        experts: of a mixture, those that memories act on: ``shared``, ``routed``, or ``auto``, the shared
            ones where there are any.
        max_experts: routed experts in a memory; as many as have 16,384 hidden units by default.

    Raises:
        FastMemError: when the model has no recognizable last FFN, or splitting it changes its logits.
    """

    revision: str | None = None
    _fingerprint: str | None = None
    # Of linear attention, a sample's.
    _state_bytes = 0
    # Of models that take no other than their own.
    _cache_class: type[Cache] | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        precision: Precision = "32-true",
        name: str = "model",
        experts: str = "auto",
        max_experts: int | None = None,
    ) -> None:
        self.precision = normalize_precision(precision)
        method = quantizing.quantized_method(model.config)
        quantizing.check_precision(method, self.precision)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.experts, self.max_experts = experts, max_experts
        self.anatomy = find_anatomy(model, experts)
        self.placement, self.shards = Placement.of(model, self.anatomy), Shards.of(model)
        if self.placement.spread:
            let_cross(model, self.anatomy, self.placement)
        self._tails: dict[int, Tail] = {}
        self._trunks: dict[tuple[int, ...], Trunk] = {}
        # This backbone with memories on other experts of the model.
        self._kinds: dict[tuple[str, int | None], Self] = {}
        if method:
            check_plain("the LM head", self.anatomy.head)
            quantizing.hold_still(model, self.compute_dtype)
        self._shortcuts = self._split()

    @classmethod
    def load(
        cls,
        source: str = "demo",
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        fabric: "Fabric | None" = None,
        quantization: str | None = None,
        device_map: DeviceMap | None = None,
        tp_plan: str | None = None,
        num_layers: int = 1,
        experts: str = "auto",
        max_experts: int | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Load a backbone from a Hub id, a folder, a ``.gguf`` file, or the packaged ``"demo"`` model.

        Args:
            precision: ``32-true`` by default.
            device: the CPU by default, with ``device_map`` the last GPU.
            fabric: gives precision and device, where they are left out.
            num_layers: feed-forward networks from the top that may be trained, so are never quantized nor
                sharded, and are on the LM head's device. Others are fields of :class:`BackboneSettings`.

        Raises:
            FastMemError: when there is no such model, or it cannot be split, quantized or laid out so.
        """
        stated = fabric_settings(fabric) if fabric else ("32-true", "cpu")
        precision = normalize_precision(precision or stated[0])
        if device is None:
            on_gpu = device_map and fabric is None and torch.cuda.is_available()
            device = "cuda" if on_gpu else stated[1]
        settings = BackboneSettings(
            source,
            quantization,
            device_map,
            tp_plan,
            trust_remote_code,
            revision,
            subfolder,
            attn_implementation,
        )
        try:
            # Weights made under inference_mode could not take part in memorizing.
            with torch.inference_mode(False):
                model, tokenizer = load_model(settings, precision, device, num_layers)
            backbone = cls(model, tokenizer, precision, source, experts, max_experts)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise FastMemError(f"model.backbone: {source!r} does not run here: {one_line(error)}") from error
        backbone.revision = revision
        # What was laid out or sharded for fewer layers is refused here.
        backbone.tail(num_layers)
        if backbone.shards.processes > 1:
            # Here all processes ask for it; later, one alone would wait for the others.
            backbone.fingerprint()
        return backbone

    @cached_property
    def chat(self) -> ChatEncoder:
        """How texts become token sequences; a template that cannot be used is refused on first use."""
        return ChatEncoder(self.tokenizer)

    def with_chat(self, settings: ChatSettings, encoder: type[ChatEncoder] = ChatEncoder) -> Self:
        """This backbone, sharing all of its parts, with texts encoded in another way."""
        twin = copy.copy(self)
        twin.chat, twin._kinds = encoder(self.tokenizer, settings), {}
        return twin

    def with_experts(self, experts: str, max_experts: int | None) -> Self:
        """This backbone with memories on other experts; itself, where they are the same."""
        key = experts, max_experts
        if key == (self.experts, self.max_experts):
            return self
        if key not in self._kinds:
            twin = self._kinds[key] = copy.copy(self)
            (twin.experts, twin.max_experts), twin._tails, twin._trunks, twin._kinds = key, {}, {}, {}
            twin.anatomy = find_anatomy(self.model, experts)
            twin._shortcuts = twin._split()
        return self._kinds[key]

    @property
    def public_name(self) -> str:
        """The name without private folders, for what is shipped."""
        path = Path(self.name)
        local = path.suffix == ".gguf" or self.name.startswith((".", "/", "~")) or path.exists()
        return path.name if local else self.name

    @property
    def device(self) -> torch.device:
        """Where the weights are; of a model on several devices, those of the tail."""
        return self.anatomy.head.weight.device

    @cached_property
    def recordable(self) -> bool:
        """Whether a forward pass can be recorded as a CUDA graph."""
        together = not self.placement.spread and self.shards.processes == 1
        return together and self.device.type == "cuda" and not quantizing.waits_for_device(self.model)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which the tail's matrix products run."""
        return COMPUTE_DTYPE[self.precision]

    @property
    def context_length(self) -> int:
        """Most tokens (prompt and answer) that the model takes."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(limit or 1 << 30, self.tokenizer.model_max_length)

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer: the model's eos ids and the chat's end of turn."""
        eos = self.model.generation_config.eos_token_id
        ids = set(eos if isinstance(eos, list) else [eos]) | {self.tokenizer.eos_token_id}
        ends = self.tokenizer.convert_tokens_to_ids(list(self.chat.pieces.turn_ends))
        ids |= set(ends) - {self.tokenizer.unk_token_id}
        return sorted(i for i in ids if i is not None)

    @property
    def pad_id(self) -> int:
        """Token id that fills rows up; it is masked wherever it could count."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.stop_ids or [0])[0]

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.anatomy.blocks)

    def tail(self, num_layers: int = 1) -> Tail:
        """The part of the model that memories act on, with the last ``num_layers`` FFNs trainable."""
        if num_layers not in self._tails:
            self._check_layers(num_layers)
            how = self.compute_dtype, self.device, self._shortcuts, self.max_experts
            tail = Tail(self.anatomy, num_layers, *how)
            if num_layers > 1:
                self._check_deep(tail, num_layers)
            self._tails[num_layers] = tail
        return self._tails[num_layers]

    def run_trunk(
        self,
        num_layers: int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        early: Sequence[int] = (),
    ) -> TailInputs:
        """Run the :class:`Trunk` below the last ``num_layers`` FFNs, without gradients."""
        record = self.tail(num_layers).replays
        key = (num_layers, *early)
        with self.numerics(), self.autocast():
            if key not in self._trunks:
                self._trunks[key] = Trunk(self.anatomy, num_layers, early, record=record)
            return self._trunks[key](input_ids, attention_mask, position_ids, cache)

    def footprint(self, num_layers: int, reference: int, float32_state: bool = False) -> Footprint:
        """What memorizing and answering takes beside the weights (:meth:`Footprint.of_tail`)."""
        tail, config = self.tail(num_layers), self.model.config.get_text_config()
        blocks, here, dtype = self.placement.blocks, self.device, self.compute_dtype
        kv_cache, passing = trunk_bytes_per_token(tail, config, dtype)
        found = Footprint.of_tail(
            tail, config, blocks.count(here), here, dtype, reference, float32_state, self.shards.kv
        )
        elsewhere = tuple(
            (d, blocks.count(d) * kv_cache + passing) for d in self.placement.devices if d != here
        )
        # The prompt's, and a copy to go on with.
        return replace(found, per_sample=found.per_sample + 2 * self._state_bytes, elsewhere=elsewhere)

    def new_cache(self) -> Cache:
        """An empty cache of the model's own layer types."""
        return self._cache_class() if self._cache_class else DynamicCache(config=self.model.config)

    @contextmanager
    def numerics(self, grad: bool = False) -> Iterator[None]:
        """Shut out what a surrounding trainer sets: inference mode, autocast, default dtype.

        Lightning predicts under ``inference_mode`` by default, holds one autocast region open over a
        whole step, and ``bf16-true`` makes bfloat16 the default dtype; each would break memorizing.
        """
        default = torch.get_default_dtype()
        with (
            self.on_device(),
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            self.autocast(False),
        ):
            torch.set_default_dtype(torch.float32)
            try:
                yield
            finally:
                torch.set_default_dtype(default)

    def on_device(self) -> AbstractContextManager:
        """Make the backbone's GPU the current one: kernels, streams and graphs go there."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def fingerprint(self) -> str:
        """A short hash of the model (:func:`fingerprint_of`)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.model)
        return self._fingerprint

    @contextmanager
    def autocast(self, enabled: bool | None = None) -> Iterator[None]:
        """Run the model's own forward pass in the precision, or as stated."""
        # Autocast keeps no copies of frozen weights, so bf16-mixed casts them anew in every call.
        enabled = self.precision == "bf16-mixed" if enabled is None else enabled
        with ExitStack() as stack:
            for kind in {device.type for device in self.placement.devices}:
                stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled))
            yield

    def agree(self, tensor: Tensor) -> None:
        """Give a tensor the values that it has in the first of the processes that share the trunk."""
        if self.shards.processes > 1:
            torch.distributed.broadcast(tensor, src=0)

    def _check_layers(self, num_layers: int) -> None:
        where, total = f"model.memorize.num_layers: {num_layers}", self.num_blocks
        if not 1 <= num_layers <= total:
            raise FastMemError(f"{where}; allowed: 1 to {total}")
        first = total - num_layers
        # The model sizes an attention mask by the first cached layer of its type, which the trunk must hold.
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or []
        missing = set(types[first + 1 :]) - set(types[: first + 1])
        if self.anatomy.routed and num_layers > 1:
            problem = "is more than one, which memories on routed experts take; lower it"
        elif not all(map(self.anatomy.has_ffn, range(first, total))):
            problem = "is too many, as the feed-forward networks of the last blocks differ; lower it"
        elif missing:
            problem = f"leaves no {missing.pop()} block in the trunk; lower it"
        elif set(self.placement.blocks[first:]) != {self.device}:
            problem = "needs all of its blocks where the LM head is; give another model.backbone.device_map"
        elif any(is_sharded(p) for part in trained_part(self.anatomy, num_layers) for p in part.parameters()):
            problem = "is more than the model was sharded for; load it with as many"
        else:
            return
        raise FastMemError(f"{where} {problem}")

    @torch.no_grad()
    def _split(self) -> Shortcuts:
        """See what follows the last FFN, and that both parts together give the model's logits."""
        expected, cache = self._own_logits(use_cache=True)
        if isinstance(cache, Cache):
            self._cache_class = None if type(cache) is DynamicCache else type(cache)
            self._state_bytes = state_bytes(cache)
        inputs = self._probe(1)
        with self.numerics():
            ffn = Tail(self.anatomy, 1, self.compute_dtype, self.device)
            shortcuts = find_shortcuts(self.anatomy, inputs.record, ffn.base(inputs).output)
        tail = Tail(self.anatomy, 1, self.compute_dtype, self.device, shortcuts)
        self._compare(tail, inputs, expected)
        return shortcuts

    @property
    def _few_ids(self) -> Tensor:
        return torch.arange(8, device=self.device)[None] % self.anatomy.head.weight.shape[0]

    def _own_logits(self, use_cache: bool = False) -> tuple[Tensor, Any]:
        """The model's logits for a few tokens, and its cache."""
        ids = self._few_ids
        with self.numerics(), self.autocast():
            found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache)
            return found.logits.float(), getattr(found, "past_key_values", None)

    def _probe(self, num_layers: int) -> TailInputs:
        """The trunk's part of the same."""
        with self.numerics(), self.autocast():
            # Norms as the model has them: on ids that are no text, bfloat16 logits differ by half when one
            # rounding does, which says nothing about the split.
            return Trunk(self.anatomy, num_layers, fuse_norms=False, record=True)(self._few_ids)

    @torch.no_grad()
    def _compare(self, tail: Tail, inputs: TailInputs, expected: Tensor) -> None:
        with self.numerics():
            found = tail.finish_logits(tail.raw_logits(tail.hidden(inputs, tail.base(inputs))))
        error = ((found - expected).norm() / expected.norm()).item()
        # What rounding explains.
        if not error <= (1e-4 if self.precision == "32-true" else 0.03):
            raise FastMemError(
                f"model.backbone: {type(self.model).__name__} does not fit: splitting off its last "
                f"feed-forward network changes the logits by {error:.1%}; allowed: models that compute the "
                "same again from their recorded parts (docs/families.md)"
            )

    def _check_deep(self, tail: Tail, num_layers: int) -> None:
        """Compare a tail of several trained layers with the model, whose blocks may differ."""
        try:
            self._compare(tail, self._probe(num_layers), self._own_logits()[0])
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise FastMemError(
                f"model.memorize.num_layers: {num_layers} does not fit {type(self.model).__name__} "
                f"({one_line(error)}); lower it"
            ) from error
