"""The outer LightningModule: a predict step memorizes a batch of contexts and answers about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from fastmem_pl.backbone import Backbone, BackboneSettings, ChatEncoder, ChatSettings, normalize_precision
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError, RunStoppedError
from fastmem_pl.base.files import as_path
from fastmem_pl.base.phases import PhaseMeter, is_out_of_memory
from fastmem_pl.data import TASKS, BatchLimits, ContextSample
from fastmem_pl.decoding import (
    BASELINE,
    DECODERS,
    METHODS,
    DecoderFactory,
    DecodingSettings,
    Generated,
    GraphPool,
    Method,
    Prefills,
    decode,
    select_methods,
)
from fastmem_pl.memory import MemorizationModule, MemorizationSettings, Memorizer, Memory, MemoryFolder
from fastmem_pl.memory.advice import warn_of_base_model
from fastmem_pl.metrics import score_answer
from fastmem_pl.run import published
from fastmem_pl.run.batching import MemoryBudget, halved_when_too_large
from fastmem_pl.run.encoding import EncodedSample, SampleEncoder
from fastmem_pl.run.records import Record

Mode = Literal["fit", "predict", "fit-predict"]


class FastMemModule(LightningModule):
    """Answers questions about contexts, with and without memorizing them first.

    Defaults are the paper's for question answering with Llama-3-8B-Instruct (arXiv 2406.16069).

    Args:
        backbone: the model; its name alone does as well.
        methods: what to compare on every sample: zero-shot, one-shot, cad, adacad, coiecd, cocoa, ck-plug,
            dola, fastmem, fastmem+cd, fastmem+adacd, fastmem+cad, fastmem+adacad, fastmem+coiecd,
            fastmem+dola.
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

    # What quirks of the published code take the place of.
    chat_class: type[ChatEncoder] = ChatEncoder
    encoder_class: type[SampleEncoder] = SampleEncoder
    memorization_class: type[MemorizationModule] = MemorizationModule
    decoders: Mapping[str, DecoderFactory] = DECODERS

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
        self.loading = BackboneSettings.of(backbone)
        self.memorization, self.decoding, self.chat = memorize, decode, chat
        self.memory_quirks, self.answer_quirks = published.apply(self, published_quirks)
        self.given_methods = list(methods)
        self.methods = select_methods(methods)
        self.given_memories = memories
        self.memories = as_path(memories) if memories else None
        self.strict, self.auto_batch = strict, auto_batch
        self.metric_models = {"bertscore_model": bertscore_model, "factkb_model": factkb_model}
        self.mode: Mode = "fit-predict"
        self.meter = PhaseMeter(torch.device("cpu"))
        self._backbone: Backbone | None = None

    @halved_when_too_large
    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[Record]:
        """Encode, memorize, answer by each method, score.

        Returns:
            a record for each sample and method; under ``fit``, a record for each sample.
        """
        encoded = self.encode(batch)
        memory, memorize_seconds = self.obtain_memory(batch, encoded)
        if self.mode == "fit":
            return self.save(batch, encoded, memory)
        prefills = self.prefills(encoded)
        records: dict[tuple[int, str], Record] = {}
        # Methods that share a form of the prompt come together: one prefill is kept at a time.
        for method in sorted(self.methods, key=lambda method: method.prompt):
            used = memory if method.memory else None
            answers, decode_seconds = self.answer(batch, method, used, prefills)
            seconds = {"memorize": memorize_seconds if used else 0.0, "decode": decode_seconds}
            with self.meter.detail("scoring", samples=len(batch)):
                for row, sample in enumerate(batch):
                    records[row, method.name] = self.record(
                        sample, method, answers[row], encoded[row], seconds, used, row
                    )
        return [records[row, method.name] for row in range(len(batch)) for method in self.methods]

    @property
    def num_passes(self) -> int:
        """Passes that a step makes over its batch: memorizing, and an answer by each method."""
        memorizes = self.mode == "fit" or any(method.memory for method in self.methods)
        return (memorizes and self.mode != "predict") + (0 if self.mode == "fit" else len(self.methods))

    def longest_row(self, batch: Sequence[ContextSample]) -> int:
        """Tokens of a batch's longest row, answer included."""
        return max(encoded.longest for encoded in self.encode(batch)) + self.longest_answer

    def encode(self, batch: Sequence[ContextSample]) -> list[EncodedSample]:
        """Token ids of what is memorized and of every prompt."""
        # A batch is encoded to estimate its memory, and again to be answered, perhaps in halves.
        known = {id(sample): encoded for sample, encoded in self._encoded}
        found = [known.get(id(sample)) or self.encoder(sample) for sample in batch]
        self._encoded = list(zip(batch, found, strict=True))
        return found

    def obtain_memory(
        self, batch: Sequence[ContextSample], encoded: Sequence[EncodedSample]
    ) -> tuple[Memory | None, float]:
        """Memorize or load; ``(None, 0)`` where no method needs a memory.

        Returns:
            the memory with a row a sample, and the seconds for each.
        """
        if self.mode != "fit" and not any(method.memory for method in self.methods):
            return None, 0.0
        if self.mode == "predict":
            with self.meter.measure("memorize", name="memories", samples=len(batch)) as timing:
                indices = [sample.index for sample in batch]
                fingerprint, device = self.backbone.fingerprint(), self.backbone.device
                memory = MemoryFolder(self.memories).load(indices, fingerprint, device)
        else:
            steps, contexts = self.memorization.steps, [sample.context for sample in encoded]
            tokens = steps * sum(context.context_tokens for context in contexts)
            with self.meter.measure("memorize", samples=len(batch), tokens=tokens, steps=steps) as timing:
                memory = self.memorizer.fit(contexts)
        if self.mode != "fit":
            memory = memory.to(self.backbone.compute_dtype)
        return memory, timing["seconds"] / len(batch)

    def prefills(self, encoded: Sequence[EncodedSample]) -> Prefills:
        """The trunk's passes over the prompts, one for each form, made when a method needs it."""
        forms = list(encoded[0].prompts)
        prompts = {form: [sample.prompts[form] for sample in encoded] for form in forms}
        early = {form: self.early_layers(form) for form in forms}
        return Prefills(self.backbone, prompts, self.memorization.num_layers, early, self.meter)

    def answer(
        self,
        batch: Sequence[ContextSample],
        method: Method,
        memory: Memory | None,
        prefills: Prefills,
        decoding: DecodingSettings | None = None,
        sharing: int | None = None,
    ) -> tuple[list[Generated], float]:
        """Answer a batch by one method.

        Args:
            batch: samples to answer about.
            method: how.
            memory: a row for each sample; ``None`` for the base model.
            prefills: the trunk's passes over the prompts.
            decoding: settings in place of the module's.
            sharing: answers that share the pass over one prompt, of which the batch is a part.

        Returns:
            an answer for each sample, and the seconds for each, its share of the prompts' pass included.
        """
        answers, seconds, prefill_seconds = decode(
            prefills,
            self.decoders[method.decoder],
            decoding or self.decoding,
            memory and memory.deltas,
            method.prompt,
            method.name,
            rows=len(batch) if sharing and len(batch) > 1 else None,
            keys=[sample.index for sample in batch],
            graphs=self.graphs,
        )
        return answers, seconds / len(batch) + prefill_seconds / (sharing or len(batch))

    def record(
        self,
        sample: ContextSample,
        method: Method,
        answer: Generated,
        encoded: EncodedSample,
        seconds: dict[str, float],
        memory: Memory | None,
        row: int,
    ) -> Record:
        """The record of one answer, scores included.

        Args:
            sample: question and references.
            method: that answered.
            answer: what it said.
            encoded: token ids of the sample.
            seconds: for memorizing and decoding.
            memory: of the batch; ``None`` where the method has none.
            row: of the sample in the memory.
        """
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
            "curve": memory.curves[row].as_dict() if memory else None,
            "status": memory.status[row] if memory else "ok",
        }

    def save(
        self, batch: Sequence[ContextSample], encoded: Sequence[EncodedSample], memory: Memory
    ) -> list[Record]:
        """Save the memory of each sample as a file of its own."""
        folder = MemoryFolder(self.memories)
        if self.memory_quirks:
            quirks = {"published_quirks": tuple(self.memory_quirks)}
            memory = replace(memory, settings=memory.settings | quirks)
        form = "float32" if self.backbone.compute_dtype is torch.float32 else "bfloat16"
        with self.meter.detail("memories", samples=len(batch)):
            for row, sample in enumerate(batch):
                path, context_hash = folder.file(sample.index), encoded[row].context_hash
                try:
                    memory.save(path, row, form, context_hash=context_hash, id=sample.id)
                except FastMemError as error:
                    if not isinstance(error.__cause__, OSError):
                        raise
                    raise RunStoppedError(
                        f"{error}; memories that were saved before stay, and the same command goes on from "
                        "there"
                    ) from error
        return [{"index": s.index, "curve": c.as_dict()} for s, c in zip(batch, memory.curves, strict=True)]

    @property
    def backbone(self) -> Backbone:
        """The loaded model."""
        if self._backbone is None:
            raise FastMemError("the backbone is not loaded; call load_backbone() or run a trainer")
        return self._backbone

    @property
    def is_loaded(self) -> bool:
        """Whether :meth:`load_backbone` was called."""
        return self._backbone is not None

    def configure_model(self) -> None:
        """Load the model; Lightning calls it before every loop."""
        self.load_for(self.trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone: a copy in another process loads a model of its own."""
        loaded = ("graphs", "memorizer", "budget", "_decoders", "encoder", "_encoded")
        kept = {name: value for name, value in super().__getstate__().items() if name not in loaded}
        return {**kept, "_backbone": None, "meter": PhaseMeter(torch.device("cpu"))}

    def load_for(self, trainer: Trainer) -> None:
        """Load the model on a trainer's device, in its precision."""
        device, calls = trainer.strategy.root_device, self.meter.calls
        with PhaseMeter(device, calls).detail("load"):
            self.load_backbone(str(trainer.precision), device)
        self.meter.calls = calls
        if trainer.global_rank == 0 and (self.mode == "fit" or any(method.memory for method in self.methods)):
            warn_of_base_model(self.backbone)

    def load_backbone(self, precision: str, device: torch.device, backbone: Backbone | None = None) -> None:
        """Load the model named in the settings, or keep a given or loaded one that fits.

        It is kept out of the module tree: precision plugins would convert its rotary tables, and
        strategies would wrap parameters that nothing trains.
        """
        backbone, loading = backbone or self._backbone, self.loading
        spread = loading.device_map is not None or loading.quantization is not None
        if (
            backbone is None
            or backbone.precision != normalize_precision(precision)
            or not (spread or backbone.device == device)
        ):
            try:
                backbone = Backbone.load(
                    precision=precision,
                    device=device,
                    num_layers=self.memorization.num_layers,
                    experts=self.memorization.experts,
                    max_experts=self.memorization.max_experts,
                    **vars(loading),
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"out of memory while loading {loading.source}; use "
                    "--trainer.precision bf16-true, a smaller --model.backbone or another device"
                ) from error
        # Settings that do not fit the model are refused below, and whoever ends the run clears this.
        self.graphs = GraphPool()
        backbone = backbone.with_experts(self.memorization.experts, self.memorization.max_experts)
        object.__setattr__(self, "_backbone", backbone.with_chat(self.chat, self.chat_class))
        self.memorizer = Memorizer(self.backbone, self.memorization)
        self.memorizer.module_class = self.memorization_class
        self.meter = self.memorizer.meter = PhaseMeter(self.backbone.device)
        self.budget = MemoryBudget(self.backbone, self.memorization, self.graphs, self.auto_batch)
        self._prepare_methods()

    def _prepare_methods(self) -> None:
        """Find out what the methods need of every batch; refuse decoders that do not fit the model."""
        self._decoders = {
            m.name: self.decoders[m.decoder](self.decoding, self.backbone) for m in self.methods
        }
        decoders = self._decoders.values()
        forms = {method.prompt for method in self.methods}
        if any(decoder.needs_without_context for decoder in decoders):
            forms.add("without_context")
        self.longest_answer = max(decoder.max_new_tokens for decoder in decoders)
        self.encoder = self.encoder_class(self.memorizer, self.longest_answer, forms)
        self._encoded: list[tuple[ContextSample, EncodedSample]] = []

    def early_layers(self, form: str) -> list[int]:
        """Numbers of the hidden states that methods with this form of the prompt look at."""
        methods = (method for method in self.methods if method.prompt == form)
        return sorted({number for m in methods for number in self._decoders[m.name].early_layers})

    def use_mode(self, mode: Mode, run_memories: Path) -> None:
        """Choose what a step does; ``run_memories`` is the run folder's ``memories/``."""
        self.mode = mode
        self.use_methods(self.given_methods)
        if mode == "fit":
            self.memories = run_memories
        elif mode == "predict":
            given = self.given_memories
            self.memories = MemoryFolder.find(as_path(given)).path if given else None
            if given is None and run_memories.is_dir():
                self.memories = run_memories
            if self.memories is None:
                self.methods = [m for m in self.methods if not m.memory] or [METHODS[BASELINE]]

    def use_methods(self, names: Sequence[str]) -> None:
        """Choose the methods to answer by; to be called before the backbone is loaded."""
        self.methods = select_methods(names)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def limits(
        self, batch_size: int | None, max_tokens: int | None, most: int | None, budget: float
    ) -> BatchLimits:
        """Bounds of a batch (:meth:`MemoryBudget.limits`), longest answers included."""
        return self.budget.limits(self.longest_answer, batch_size, max_tokens, most, budget)

    def context_lengths(self, samples: Sequence[ContextSample]) -> list[int]:
        """Tokens of each context, up to the limit; characters, while no model is loaded."""
        if not self.is_loaded:
            return [len(sample.context) for sample in samples]
        if not samples:
            return []
        counts = self.backbone.chat.count_tokens([sample.context for sample in samples])
        return [min(count, self.memorizer.context_limit) for count in counts]

    def check_samples(self, samples: Sequence[ContextSample]) -> None:
        """Refuse what cannot be answered before anything is."""
        for sample in samples:
            self.encoder.check(sample, self.strict)
        if self.mode == "predict" and self.memories and any(method.memory for method in self.methods):
            folder = MemoryFolder(self.memories)
            wanted = {**self.memorization.as_dict(), "published_quirks": self.memory_quirks}
            for sample in samples:
                context_hash = self.encoder(sample).context_hash
                folder.check(sample.index, sample.id, context_hash, self.backbone.fingerprint(), wanted)
