"""The outer LightningModule: a predict step memorizes a batch of contexts and answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.backbone import Backbone, BackboneSettings, ChatSettings, normalize_precision
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError, RunStoppedError
from fastmem_pl.base.phases import PhaseMeter, is_out_of_memory
from fastmem_pl.base.quirks import ANSWER_QUIRKS, select_quirks
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import (
    BASELINE,
    DECODERS,
    METHODS,
    Decoder,
    Decoding,
    DecodingSettings,
    Generated,
    GraphPool,
    Method,
    Prefill,
    PrefillCache,
    select_methods,
)
from fastmem_pl.memory import MemorizationSettings, Memorizer, Memory, MemoryFolder
from fastmem_pl.metrics import score_answer
from fastmem_pl.run.batching import Room
from fastmem_pl.run.encoding import EncodedSample, SampleEncoder

Mode = Literal["fit", "predict", "fit-predict"]
_QUIRK_FIELDS = {"norm_every_layer", "round_weights", "dola_unlimited", "round_trip", "parse_special_tokens"}


class FastMemModule(LightningModule):
    """Answers questions about contexts, with and without memorizing them first.

    Defaults are the paper's for question answering with Llama-3-8B-Instruct (arXiv 2406.16069).

    Args:
        backbone: the model; its name alone does as well.
        methods: what to compare on every sample: zero-shot, one-shot, cad, dola, fastmem, fastmem+cd,
            fastmem+cad, fastmem+dola.
        memorize: how contexts are memorized.
        decode: how answers are decoded.
        chat: how texts become token sequences.
        memories: folder of memories saved by `fastmem fit`, for `fastmem predict`. Left out, those in
            the run folder are used, and without any it answers zero-shot.
        strict: refuse a context that memorize.max_context_tokens or the model would cut off.
        auto_batch: choose the size of batches by the free memory, and when one does not fit all the same,
            halve it and try again.
        bertscore_model: encoder of the score bert_precision of summaries (a Hub id or a folder; the paper's
            is roberta-large); left out, it is not computed.
        factkb_model: sequence classifier of the score factkb of summaries (the paper's is
            bunsenfeng/FactKB); left out, it is not computed.
        published_quirks: faults of the published code to bring back, for comparison with its results:
            norm-every-layer, round-weights, dola-unlimited, context-round-trip, parse-special-tokens.
    """

    def __init__(
        self,
        backbone: BackboneSettings = BackboneSettings(),  # noqa: B008 (jsonargparse shows it)
        methods: list[str] = ["zero-shot", "fastmem", "fastmem+cd"],  # noqa: B006
        memorize: MemorizationSettings = MemorizationSettings(),  # noqa: B008
        decode: DecodingSettings = DecodingSettings(),  # noqa: B008
        chat: ChatSettings = ChatSettings(),  # noqa: B008
        memories: str | None = None,
        strict: bool = False,
        auto_batch: bool = True,
        bertscore_model: str | None = None,
        factkb_model: str | None = None,
        published_quirks: list[str] = [],  # noqa: B006
    ) -> None:
        super().__init__()
        quirks = select_quirks(published_quirks)
        self.loading = BackboneSettings.of(backbone)
        self.memorization = replace(
            memorize,
            norm_every_layer="norm-every-layer" in quirks,
            round_weights="round-weights" in quirks,
        )
        self.decoding = replace(decode, dola_unlimited="dola-unlimited" in quirks)
        self.chat = replace(
            chat,
            round_trip="context-round-trip" in quirks,
            parse_special_tokens="parse-special-tokens" in quirks,
        )
        self.published_quirks = sorted(quirks)
        self.given_methods = list(methods)
        self.methods = select_methods(methods)
        self.given_memories = memories
        self.memories = Path(memories) if memories else None
        self.strict, self.auto_batch = strict, auto_batch
        self.metric_models = {"bertscore_model": bertscore_model, "factkb_model": factkb_model}
        self.mode: Mode = "fit-predict"
        self._backbone: Backbone | None = None

    def settings(self) -> dict[str, Any]:
        """All settings, nested and plain, as a config file has them."""
        return {
            "backbone": asdict(self.loading),
            "methods": self.given_methods,
            "memorize": _public(self.memorization),
            "decode": _public(self.decoding),
            "chat": _public(self.chat),
            "memories": self.given_memories,
            "strict": self.strict,
            "auto_batch": self.auto_batch,
            **self.metric_models,
            "published_quirks": self.published_quirks,
        }

    @property
    def backbone(self) -> Backbone:
        """The loaded model.

        Raises:
            FastMemError: before :meth:`load_backbone`.
        """
        if self._backbone is None:
            raise FastMemError("the backbone is not loaded; call load_backbone() or run a FastMemTrainer")
        return self._backbone

    def load_backbone(self, precision: str, device: torch.device, backbone: Backbone | None = None) -> None:
        """Load the model named in the settings, or keep a given or loaded one that fits.

        It is kept out of the module tree: precision plugins would convert its rotary tables, and
        strategies would wrap parameters that nothing trains.
        """
        backbone = backbone or self._backbone
        loading = self.loading
        spread = loading.device_map is not None or loading.quantization is not None
        if (
            backbone is None
            or backbone.precision != normalize_precision(precision)
            or not (spread or backbone.device == device)
        ):
            try:
                backbone = Backbone.load(
                    loading.source,
                    precision,
                    device,
                    loading.trust_remote_code,
                    quantization=loading.quantization,
                    device_map=loading.device_map,
                    tp_plan=loading.tp_plan,
                    num_layers=self.memorization.num_layers,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"out of memory while loading {loading.source}; use "
                    "--trainer.precision bf16-true, a smaller --model.backbone or another device"
                ) from error
        object.__setattr__(self, "_backbone", backbone.with_chat(self.chat))
        self.memorizer = Memorizer(self.backbone, self.memorization)
        self.meter = self.memorizer.meter = PhaseMeter(self.backbone.device)
        self.graphs = GraphPool()
        self.room = Room(self.backbone, self.memorization, self.graphs, self.auto_batch)
        self._prepare_methods()

    def use_mode(self, mode: Mode, run_memories: Path) -> None:
        """Choose what a step does; ``run_memories`` is the run folder's ``memories/``."""
        self.mode = mode
        self.use_methods(self.given_methods)
        if mode == "fit":
            self.memories = run_memories
        elif mode == "predict":
            given = self.given_memories
            self.memories = MemoryFolder.find(Path(given)).path if given else None
            if given is None and run_memories.is_dir():
                self.memories = run_memories
            if self.memories is None:
                self.methods = [m for m in self.methods if not m.memory] or [METHODS[BASELINE]]

    def use_methods(self, names: Sequence[str]) -> None:
        """Choose the methods to answer by; to be called before the backbone is loaded."""
        self.methods = select_methods(names)

    def identity(self, answers: bool) -> dict[str, Any]:
        """Settings that memories depend on and, with ``answers``, what answers depend on beside them."""
        settings: dict[str, Any] = {
            "backbone": {"source": self.loading.source, "quantization": self.loading.quantization},
            "memorize": _public(self.memorization),
            "chat": {"template": self.chat.template},
            "published_quirks": [quirk for quirk in self.published_quirks if quirk not in ANSWER_QUIRKS],
        }
        if answers:
            settings["chat"] = _public(self.chat)
            settings["decode"] = _public(self.decoding)
            settings["methods"] = [method.name for method in self.methods]
            settings["memories"] = self.given_memories
            settings["answer_quirks"] = [quirk for quirk in self.published_quirks if quirk in ANSWER_QUIRKS]
        return settings

    def _prepare_methods(self) -> None:
        """Find out what the methods need of every batch; refuse decoders that do not fit the model."""
        self._decoders = {m.name: DECODERS[m.decoder](self.decoding, self.backbone) for m in self.methods}
        decoders = self._decoders.values()
        forms = {method.prompt for method in self.methods}
        if any(decoder.needs_without_context for decoder in decoders):
            forms.add("without_context")
        limits = [decoder.max_new_tokens or self.decoding.max_new_tokens for decoder in decoders]
        self.longest_answer = max(limits)
        self.encoder = SampleEncoder(self.memorizer, self.longest_answer, forms)

    def decoder_of(self, method: Method) -> Decoder:
        """The decoder of one of the methods, with the settings of the model."""
        return self._decoders[method.name]

    def early_layers(self, form: str) -> list[int]:
        """Numbers of the hidden states that methods with this form of the prompt look at."""
        methods = (method for method in self.methods if method.prompt == form)
        return sorted({number for m in methods for number in self._decoders[m.name].early_layers})

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def context_lengths(self, samples: Sequence[ContextSample]) -> list[int]:
        """Tokens of each context, up to the limit."""
        counts = self.backbone.chat.count_tokens([sample.context for sample in samples])
        return [min(count, self.memorizer.context_limit) for count in counts]

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[dict[str, Any]]:
        """Memorize and answer a batch; returns one record per sample and method (``fit``: per sample)."""
        pairs = [(sample, self.encoder(sample)) for sample in batch]
        return self.room.process(pairs, self._longest, self._process)

    def _longest(self, pairs: Sequence[tuple[ContextSample, EncodedSample]]) -> int:
        """Tokens of the longest row, answer included."""
        return max(encoded.longest for _, encoded in pairs) + self.longest_answer

    def check_samples(self, samples: list[ContextSample]) -> None:
        """Refuse what cannot be answered before anything is: questions without room, memories that do
        not fit, and under ``strict`` contexts that would be cut off.
        """
        for sample in samples:
            self.encoder.check(sample, self.strict)
        if self.mode == "predict" and self.memories and any(method.memory for method in self.methods):
            folder, wanted = MemoryFolder(self.memories), self.memorization.as_dict()
            for sample in samples:
                context_hash = self.encoder(sample).context_hash
                folder.check(sample.index, sample.id, context_hash, self.backbone.fingerprint(), wanted)

    def _process(self, pairs: Sequence[tuple[ContextSample, EncodedSample]]) -> list[dict[str, Any]]:
        samples, encoded = [sample for sample, _ in pairs], [encoded for _, encoded in pairs]
        memory, memorize_seconds = self._obtain_memory(samples, encoded)
        if self.mode == "fit":
            with self.meter.detail("memories", samples=len(samples)):
                return self._save(samples, encoded, memory)
        if memory:
            memory = memory.to(self.backbone.compute_dtype)
        records: dict[str, list[dict[str, Any]]] = {}
        num_layers = memory.num_layers if memory else self.memorization.num_layers
        prefills = PrefillCache(
            lambda form: Prefill(
                self.backbone, [s.prompts[form] for s in encoded], num_layers, self.early_layers(form)
            ),
            self.meter,
        )
        for method in sorted(self.methods, key=lambda method: method.prompt):
            used = memory if method.memory else None
            read = [method.prompt]
            if self._decoders[method.name].needs_without_context:
                read.append("without_context")
            prompts, *without_context = (prefills.take(form) for form in read)
            with self.meter.measure("decode", part=method.name, samples=len(samples)) as timing:
                answers = Decoding(
                    prompts,
                    method.decoder,
                    self.decoding,
                    used and used.deltas,
                    *without_context,
                    keys=[sample.index for sample in samples],
                    graphs=self.graphs,
                ).run()
                lengths = [len(answer.token_ids) for answer in answers]
                timing.update(tokens=sum(lengths), steps=max(lengths))
            seconds = {
                "memorize": memorize_seconds / len(samples) if used else 0.0,
                "decode": (sum(prefills.seconds[form] for form in read) + timing["seconds"]) / len(samples),
            }
            records[method.name] = []
            with self.meter.detail("scoring", samples=len(samples)):
                for row, sample in enumerate(samples):
                    record = self.record(sample, method, answers[row], encoded[row], seconds)
                    record["curve"] = used.curves[row].as_dict() if used else None
                    record["status"] = used.status[row] if used else "ok"
                    records[method.name].append(record)
        return [records[method.name][row] for row in range(len(samples)) for method in self.methods]

    def _obtain_memory(
        self, samples: Sequence[ContextSample], encoded: Sequence[EncodedSample]
    ) -> tuple[Memory | None, float]:
        """Memorize or load; ``(None, 0)`` where no method needs a memory."""
        if self.mode != "fit" and not any(method.memory for method in self.methods):
            return None, 0.0
        if self.mode == "predict":
            with self.meter.measure("memorize", name="memories", samples=len(samples)) as timing:
                indices = [sample.index for sample in samples]
                fingerprint, device = self.backbone.fingerprint(), self.backbone.device
                memory = MemoryFolder(self.memories).load(indices, fingerprint, device)
            return memory, timing["seconds"]
        steps, tokens = self.memorization.steps, sum(sample.context.context_tokens for sample in encoded)
        counts = {"samples": len(samples), "tokens": steps * tokens, "steps": steps}
        with self.meter.measure("memorize", **counts) as timing:
            memory = self.memorizer.fit([sample.context for sample in encoded])
        return memory, timing["seconds"]

    def _save(
        self, samples: Sequence[ContextSample], encoded: Sequence[EncodedSample], memory: Memory
    ) -> list[dict[str, Any]]:
        folder = MemoryFolder(self.memories)
        for row, sample in enumerate(samples):
            try:
                memory.save(
                    folder.file(sample.index),
                    row,
                    "float32" if self.backbone.compute_dtype is torch.float32 else "bfloat16",
                    context_hash=encoded[row].context_hash,
                    id=sample.id,
                )
            except FastMemError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                raise RunStoppedError(
                    f"{error}; memories that were saved before stay, and the same command goes on from there"
                ) from error
        return [{"index": s.index, "curve": c.as_dict()} for s, c in zip(samples, memory.curves, strict=True)]

    def record(
        self,
        sample: ContextSample,
        method: Method,
        answer: Generated,
        encoded: EncodedSample,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The record of one answer, but for its memory's curve and status."""
        prediction = sample.answer_prefix + answer.text
        return {
            "index": sample.index,
            "id": sample.id,
            "task": sample.task,
            "method": method.name,
            "question": sample.question,
            "prediction": prediction,
            "token_ids": answer.token_ids,
            "references": list(sample.references),
            "originals": list(sample.originals),
            "scores": score_answer(
                TASKS[sample.task].scores, prediction, sample.references, sample.originals
            ),
            "output_words": len(answer.text.split()),
            "n_context_tokens": encoded.context.context_tokens,
            "n_truncated_tokens": encoded.prompt_cuts[method.prompt],
            "n_prompt_tokens": len(encoded.prompts[method.prompt]),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            **answer.details,
        }


def _public(settings: Any) -> dict[str, Any]:
    """Fields of a settings class that users set, as JSON and YAML know values."""
    values = {name: value for name, value in asdict(settings).items() if name not in _QUIRK_FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
