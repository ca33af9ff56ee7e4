"""FastMem's decoders inside the ``generate`` of transformers.

:func:`generator` is a ``custom_generate`` that decodes with FastMem's decoders, which look at more than the
memorized model. With :meth:`fastmem_pl.Memory.attached`, the model's own forward pass uses a memory, with all
that ``generate`` can do (beams, assistants, processors).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.decoding import DECODERS, DecodingSettings, Prefill
from fastmem_pl.decoding.state import DecodeState, Views
from fastmem_pl.memory import Memory

# Options of generate that the loop of generator() does not know.
_UNSUPPORTED = {
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "guidance_scale": None,
}
# What generate prepares by itself, and what says nothing that the loop does not know.
_PREPARED = {
    *("attention_mask", "past_key_values", "position_ids", "cache_position"),
    *("use_cache", "logits_to_keep", "token_type_ids"),
}


def generator(
    backbone: Backbone,
    memory: Memory | None,
    decoder: str = "greedy",
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """A ``custom_generate`` for ``backbone.model.generate``, decoding with a memory and a decoder.

    What ``generate`` prepares is honoured: lengths, end tokens, sampling, logits processors, stopping
    criteria. Rows that have ended are filled up with the pad token.

    Args:
        backbone: the model that ``generate`` is called on.
        memory: of one row, or one a prompt; ``None`` for the base model.
        decoder: ``"greedy"``, ``"cd"`` or ``"dola"``.
        streamer: gets the prompt and the tokens as they come. It is given here because ``generate`` hands a
            ``custom_generate`` neither its streamer nor its assistant model.
        settings: of the decoder (:class:`~fastmem_pl.DecodingSettings`): ``alpha``, ``dola_layers``,
            ``relative_top``.

    Raises:
        FastMemError: when the memory is of another model, the decoder needs what is not there, or (in the
            call) an option of ``generate`` cannot be honoured.
    """
    allowed = [
        name for name in DECODERS if not DECODERS[name](DecodingSettings(), backbone).needs_without_context
    ]
    if decoder not in allowed:
        raise unknown("decoder", decoder, allowed)
    for name in settings:
        if name not in ("alpha", "dola_layers", "relative_top"):
            raise FastMemError(f"generator: give {name} to generate, or none: it is no setting of a decoder")
    chosen = DECODERS[decoder](DecodingSettings(**settings), backbone)
    if memory is not None:
        memory.check(backbone)
    elif chosen.needs_base:
        raise FastMemError(f"generator: decoder {decoder!r} contrasts a memory with the base model; give one")

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **prepared: Any,
    ) -> Any:
        _check_options(model, backbone, generation_config)
        _check_prepared(prepared)
        mask = prepared.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)]
        deltas = memory and memory.serving(backbone, len(prompts))
        num_layers = memory.num_layers if memory else 1
        chooser = _Chooser(input_ids, logits_processor, generation_config)
        room = generation_config.max_length - input_ids.shape[1]
        with backbone.on_device(), torch.inference_mode(False), torch.no_grad():
            prefill = Prefill(backbone, prompts, num_layers, chosen.early_layers)
            views = Views(backbone, num_layers, chosen, deltas)
            state: DecodeState | None = None
            if streamer is not None:
                streamer.put(input_ids.cpu())
            while bool(chooser.going.any()):
                if state is None:
                    state = DecodeState.start([prefill], views, chooser, max(room, 1))
                else:
                    state.step()
                if streamer is not None:
                    streamer.put(chooser.ids[:, -1].cpu())
                chooser.going &= ~stopping_criteria(chooser.ids, None)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=chooser.ids)
        return chooser.ids

    return generate


def _check_options(model: Any, backbone: Backbone, config: Any) -> None:
    if model is not backbone.model:
        raise FastMemError("generator: it was made for another model; call generate of backbone.model")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise FastMemError(
            f"generator: generate's mode {str(mode.value).replace('_', ' ')} cannot be honoured; use "
            "memory.attached(model) and the model's own generate"
        )
    for name, only in _UNSUPPORTED.items():
        if getattr(config, name, None) not in (None, only):
            raise FastMemError(
                f"generator: generate's {name} = {getattr(config, name)} cannot be honoured; leave it out "
                "or use memory.attached(model) and the model's own generate"
            )


def _check_prepared(prepared: dict[str, Any]) -> None:
    """Refuse inputs that would not be looked at."""
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise FastMemError("generator: filled past_key_values cannot be gone on from; give the whole prompt")
    for name, value in prepared.items():
        if name not in _PREPARED and value is not None:
            raise FastMemError(f"generator: generate's {name} cannot be honoured; leave it out")


class _Chooser:
    """Chooses tokens as generate does: its processors, then the highest score or a draw.

    Attributes:
        ids: prompts and answers so far, ``(B, T)``.
        going: rows that have not ended, ``(B,)``.
    """

    def __init__(self, ids: Tensor, processors: Any, config: Any) -> None:
        self.ids, self.going = ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._processors, self._sample = processors, config.do_sample
        pad = config._pad_token_tensor if hasattr(config, "_pad_token_tensor") else config.pad_token_id
        self._pad = 0 if pad is None else int(pad)

    def __call__(self, scores: Tensor) -> Tensor:
        scores = self._processors(self.ids, scores)
        token = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if self._sample else scores.argmax(-1)
        token = torch.where(self.going, token, self._pad)
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        return token
