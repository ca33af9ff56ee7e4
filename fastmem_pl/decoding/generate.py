"""FastMem's decoders inside the ``generate`` of transformers, as a ``custom_generate``."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding.decoders import DECODERS
from fastmem_pl.decoding.loop import Decoding
from fastmem_pl.decoding.prefill import Prefill
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.memory import Memory

# What generate can do, and the loop of generator() cannot.
_REFUSED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "guidance_scale")
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
        memory: of one row, or one a prompt; ``None`` for the base model.
        decoder: ``"greedy"``, ``"cd"``, ``"adacd"`` or ``"dola"``.
        streamer: gets the prompt and the tokens as they come; ``generate`` would not hand on its own.
        settings: ``alpha``, ``alpha_min``, ``dola_layers`` and ``relative_top`` of
            :class:`~fastmem_pl.DecodingSettings`.

    Raises:
        FastMemError: when the memory is of another model, the decoder needs what is not there, or (in the
            call) an option of ``generate`` cannot be honoured.
    """
    for name in settings:
        if name not in ("alpha", "alpha_min", "dola_layers", "relative_top"):
            raise FastMemError(f"generator: give {name} to generate, or none: it is no setting of a decoder")
    chosen = DECODERS[decoder](DecodingSettings(**settings), backbone)
    if chosen.needs_without_context:
        raise FastMemError(
            f"generator: decoder {decoder!r} reads a second prompt, which generate does not have"
        )
    if memory is not None:
        backbone = memory.on(backbone)
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
        if model is not backbone.model:
            raise FastMemError("generator: it was made for another model; call generate of backbone.model")
        for refused in _refused(generation_config, prepared):
            raise FastMemError(
                f"generator: generate's {refused} cannot be honoured; leave it out or use "
                "memory.attached(model) and the model's own generate"
            )
        mask = prepared.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)]
        deltas = memory and memory.serving(backbone, len(prompts))
        prefill = Prefill(backbone, prompts, memory.num_layers if memory else 1, chosen.early_layers)
        room = max(generation_config.max_length - input_ids.shape[1], 1)
        chooser = _GenerateChooser(input_ids, logits_processor, generation_config)
        limited = DecodingSettings(max_new_tokens=room, **settings)
        decoding = Decoding(prefill, decoder, limited, deltas, chooser=chooser)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        while bool(chooser.going.any()):
            decoding.step()
            if streamer is not None:
                streamer.put(chooser.ids[:, -1].cpu())
            chooser.going = chooser.going & ~stopping_criteria(chooser.ids, None)
        if streamer is not None:
            streamer.end()
        output = GenerateDecoderOnlyOutput(sequences=chooser.ids)
        return output if generation_config.return_dict_in_generate else chooser.ids

    return generate


def _refused(config: Any, prepared: dict[str, Any]) -> Iterator[str]:
    """Options and inputs of generate that the loop would not look at."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        yield f"mode {str(mode.value).replace('_', ' ')}"
    for name in _REFUSED:
        value = getattr(config, name, None)
        if value is not None and value is not False:
            yield f"{name} = {value}"
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        yield "filled past_key_values"
    yield from (name for name, value in prepared.items() if name not in _PREPARED and value is not None)


class _GenerateChooser:
    """Chooses tokens as generate does: its processors, then the highest score or a draw."""

    def __init__(self, ids: Tensor, processors: Any, config: Any) -> None:
        # Prompts and answers so far, (B, T), and the rows that have not ended, (B,).
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
