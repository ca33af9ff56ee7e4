"""The frozen language model behind every memory and every answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from fastmem_pl.backbone import quantization as quantizing
from fastmem_pl.backbone.chat import ChatEncoder, ChatSettings
from fastmem_pl.backbone.crossing import Placement, let_cross
from fastmem_pl.backbone.families import check_plain, find_anatomy
from fastmem_pl.backbone.fingerprint import fingerprint_of
from fastmem_pl.backbone.footprint import Footprint, trunk_bytes_per_token
from fastmem_pl.backbone.loading import load_model
from fastmem_pl.backbone.placement import DeviceMap
from fastmem_pl.backbone.precision import Precision, compute_dtype, fabric_settings, normalize_precision
from fastmem_pl.backbone.sharding import Shards, check_tail
from fastmem_pl.backbone.split import Tail, TailInputs, Trunk
from fastmem_pl.base.errors import FastMemError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Relative error of tail(trunk(ids)) against the model's own logits that rounding explains.
_SPLIT_TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 0.03, "bf16-true": 0.03}


class Backbone:
    """A frozen causal language model, split into a trunk and a tail that memories act on.

    Base weights are never written to: a memory is a delta that the tail adds while it computes.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: the model's.
        precision: ``32-true``; ``bf16-true`` (weights in bfloat16); ``bf16-mixed`` (float32 weights,
            bfloat16 products). In all of them norms and losses are float32.
        name: of the model in records.

    Raises:
        FastMemError: when the model has no recognizable last FFN, or splitting it changes its logits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, precision: Precision = "32-true", name: str = "model"
    ) -> None:
        self.precision = normalize_precision(precision)
        method = quantizing.quantized_method(model.config)
        quantizing.check_precision(method, self.precision)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.anatomy = find_anatomy(model)
        self.placement, self.shards = Placement.of(model, self.anatomy), Shards.of(model)
        if self.placement.spread:
            let_cross(model, self.anatomy, self.placement)
        self._device_types = sorted({device.type for device in self.placement.devices})
        self.chat = ChatEncoder(tokenizer)
        self._tails: dict[int, Tail] = {}
        self._trunks: dict[tuple[int, ...], Trunk] = {}
        if method:
            check_plain("the LM head", self.anatomy.head)
            quantizing.hold_still(model, self.compute_dtype)
        with quantizing.must_run(name, method):
            self._check_split()

    @classmethod
    def load(
        cls,
        source: str = "demo",
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        fabric: Fabric | None = None,
        quantization: str | None = None,
        device_map: DeviceMap | None = None,
        tp_plan: str | None = None,
        num_layers: int = 1,
    ) -> Backbone:
        """Load a backbone from a Hub id, a folder, a ``.gguf`` file, or the packaged ``"demo"`` model.

        Args:
            source: which.
            precision: ``32-true`` by default.
            device: the CPU by default, with ``device_map`` the last GPU.
            trust_remote_code: run code that comes with the checkpoint.
            fabric: gives precision and device, where they are left out.
            quantization: keep the trunk in ``bnb-4bit``, ``bnb-8bit``, ``torchao-int8`` or ``torchao-int4``
                (:mod:`.quantization`).
            device_map: lay the blocks out over devices of this process: ``auto``, ``balanced``,
                ``sequential``, or devices by names of modules (:mod:`.placement`).
            tp_plan: ``auto`` shares every matrix of the trunk among the processes of ``torch.distributed``,
                all of which have to load (:mod:`.sharding`).
            num_layers: feed-forward networks from the top that may be trained, so are never quantized nor
                sharded, and are on the LM head's device.

        Raises:
            FastMemError: when there is no such model, it does not fit, or it cannot be quantized or laid
                out so.
        """
        stated = fabric_settings(fabric) if fabric else ("32-true", "cpu")
        precision = normalize_precision(precision or stated[0])
        if device is None:
            on_gpu = device_map and fabric is None and torch.cuda.is_available()
            device = "cuda" if on_gpu else stated[1]
        # Weights made under inference_mode could not take part in memorizing.
        with torch.inference_mode(False):
            model, tokenizer = load_model(
                source, precision, device, num_layers, trust_remote_code, quantization, device_map, tp_plan
            )
        backbone = cls(model, tokenizer, precision, name=source)
        if backbone.shards.processes > 1:
            # Here all processes ask for it; later, one alone would wait for the others.
            backbone.fingerprint()
        return backbone

    def with_chat(self, settings: ChatSettings, encoder: type[ChatEncoder] = ChatEncoder) -> Backbone:
        """This backbone, sharing all of its parts, with texts encoded in another way."""
        twin = copy.copy(self)
        twin.chat = encoder(self.tokenizer, settings)
        return twin

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
        return compute_dtype(self.precision)

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
        end_of_turn = self.tokenizer.convert_tokens_to_ids(self.chat.pieces.end_of_turn or None)
        if isinstance(end_of_turn, int) and end_of_turn != self.tokenizer.unk_token_id:
            ids.add(end_of_turn)
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
        """The part of the model that memories act on, with the last ``num_layers`` FFNs trainable.

        Raises:
            FastMemError: when the model has fewer blocks, or they differ.
        """
        if num_layers not in self._tails:
            if not 1 <= num_layers <= self.num_blocks:
                raise FastMemError(
                    f"model.memorize.num_layers: {num_layers} is out of range; allowed: 1 to "
                    f"{self.num_blocks}"
                )
            self._check_layers(num_layers)
            self._tails[num_layers] = Tail(self.anatomy, num_layers, self.compute_dtype, self.device)
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
        self.tail(num_layers)
        key = (num_layers, *early)
        with self.numerics(), self.autocast():
            if key not in self._trunks:
                self._trunks[key] = Trunk(self.anatomy, num_layers, early)
            return self._trunks[key](input_ids, attention_mask, position_ids, cache)

    def footprint(self, num_layers: int, reference: int, float32_state: bool = False) -> Footprint:
        """What memorizing and answering takes beside the weights; arguments as :meth:`Footprint.of_tail`."""
        tail, config = self.tail(num_layers), self.model.config.get_text_config()
        blocks, here, dtype = self.placement.blocks, self.placement.tail, self.compute_dtype
        kv_cache, passing = trunk_bytes_per_token(tail, config, dtype)
        others = [device for device in self.placement.devices if device != here]
        return replace(
            Footprint.of_tail(
                tail, config, blocks.count(here), here, dtype, reference, float32_state, self.shards.kv
            ),
            elsewhere=tuple((device, blocks.count(device) * kv_cache + passing) for device in others),
        )

    def new_cache(self) -> Cache:
        """An empty KV cache of the model's own layer types."""
        return DynamicCache(config=self.model.config)

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
            self._autocast(False),
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
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.model)

    def autocast(self) -> AbstractContextManager:
        """Run the model's own forward pass in the precision."""
        # Autocast keeps no copies of frozen weights, so bf16-mixed casts them anew in every call.
        return self._autocast(self.precision == "bf16-mixed")

    def agree(self, tensor: Tensor) -> None:
        """Give a tensor the values that it has in the first of the processes that share the trunk."""
        if self.shards.processes > 1:
            torch.distributed.broadcast(tensor, src=0)

    @contextmanager
    def _autocast(self, enabled: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in self._device_types:
                stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled))
            yield

    def _check_layers(self, num_layers: int) -> None:
        """Refuse trained blocks of another layout, and attention types that only the upper blocks have."""
        first = self.num_blocks - num_layers
        for block in self.anatomy.blocks[first:]:
            if not self.anatomy.family.fits(block.mlp):
                raise FastMemError(
                    f"model.memorize.num_layers: a block of the last {num_layers} has another "
                    f"feed-forward network ({type(block.mlp).__name__}); lower it"
                )
        check_tail(self.anatomy, num_layers)
        for number, place in enumerate(self.placement.blocks[first:], start=first):
            if place != self.device:
                raise FastMemError(
                    f"model.backbone.device_map: block {number} is trained with "
                    f"model.memorize.num_layers={num_layers}, and on "
                    f"{place}; allowed: {self.device}, where the LM head is"
                )
        # The model sizes an attention mask by the first cached layer of its type, which the trunk must hold.
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or []
        missing = set(types[first + 1 :]) - set(types[: first + 1])
        if missing:
            raise FastMemError(
                f"model.memorize.num_layers: {num_layers} leaves no {missing.pop()} block "
                f"in the trunk; allowed: fewer layers"
            )

    @torch.no_grad()
    def _check_split(self) -> None:
        """Compare tail(trunk(ids)) with the model's own logits once."""
        tail = self.tail()
        vocabulary = self.anatomy.head.weight.shape[0]
        ids = torch.arange(8, device=self.device).remainder(vocabulary)[None]
        with self.numerics(), self.autocast():
            expected = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            # Norms as the model has them: on ids that are no text, bfloat16 logits differ by half when one
            # rounding does, which says nothing about the split.
            inputs = Trunk(self.anatomy, 1, fuse_norms=False)(ids)
        with self.numerics():
            found = tail.finish_logits(tail.raw_logits(tail.hidden(inputs, tail.base(inputs))))
        error = ((found - expected).norm() / expected.norm()).item()
        if not error <= _SPLIT_TOLERANCE[self.precision]:
            raise FastMemError(
                f"model.backbone: {type(self.model).__name__} does not fit: splitting off its last "
                f"feed-forward network changes the logits by {error:.1%} (family "
                f"{self.anatomy.family.name!r}); allowed: decoder-only models whose last block ends in "
                "residual + FFN, then the final norm and the LM head (docs/families.md)"
            )
