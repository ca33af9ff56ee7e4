"""The outer LightningModule: a predict step memorizes a batch of contexts and answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.backbone import Backbone, ChatSettings, normalize_precision
from fastmem_pl.base.errors import FastMemError, OutOfMemoryError, RunStoppedError
from fastmem_pl.base.phases import PhaseMeter, is_out_of_memory
from fastmem_pl.base.quirks import ANSWER_QUIRKS, select_quirks
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import (
    BASELINE,
    DECODERS,
    METHODS,
    Decoder,
    DecodingSettings,
    Generated,
    GraphPool,
    Method,
    Prefills,
    decode,
    select_methods,
)
from fastmem_pl.memory import MemorizationSettings, Memorizer, Memory, MemoryFolder
from fastmem_pl.metrics import score_answer
from fastmem_pl.run.batching import Room
from fastmem_pl.run.encoding import EncodedSample, SampleEncoder

Mode = Literal["fit", "predict", "fit-predict"]
Settings = TypeVar("Settings")


class FastMemModule(LightningModule):
    """Answers questions about contexts, with and without memorizing them first.

    Defaults are the paper's for question answering with Llama-3-8B-Instruct (arXiv 2406.16069).

    Args:
        backbone: "demo" (SmolLM2-135M-Instruct), a Hub id, a model folder, or a .gguf file.
        methods: what to compare on every sample: zero-shot, one-shot, cad, dola, fastmem, fastmem+cd,
            fastmem+cad, fastmem+dola.
        steps: updates on each context (the paper's epochs). 0 memorizes nothing.
        learning_rate: of AdamW, constant. Higher moves answers more and keeps the format less.
        kl_coeff: weight of the term that holds the model near itself.
        kl_target: adapt kl_coeff from step to step so that the KL nears this value (nats a token); left
            out, it is constant.
        kl_gain: how fast kl_coeff adapts.
        num_layers: train the feed-forward networks of this many last blocks; 1 is by far the fastest.
        weight_decay: of AdamW.
        max_grad_norm: bound of each sample's gradient norm.
        max_context_tokens: longer contexts are cut off here, and counted in the report.
        strict: refuse a context that would be cut off instead.
        chat_template: use the tokenizer's chat template; off, prompts are plain text.
        system_prompt: text of a system turn; none by default, as in the paper.
        max_new_tokens: most tokens of an answer.
        alpha: strength of contrastive decoding (cad, fastmem+cd, fastmem+cad); 0 is no contrast.
        temperature: 0 takes the best token; above 0, tokens are drawn from the softmax of scores divided by
            it, under every method.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from this many most likely tokens; 0 for all.
        repetition_penalty: weakens tokens that were said already; left out, 1.2 for dola and none for the
            others.
        seed: of the draws (--seed_everything does not change them); up to rounding, an answer depends on
            it and its sample, not on the batch.
        stop: texts that end an answer, which is cut before them.
        dola_layers: premature layers: auto, low or high (half of the model), or a list of numbers, below 1
            as fractions of the depth.
        relative_top: dola keeps tokens of at least this share of the highest probability.
        published_quirks: faults of the published code to bring back, for comparison with its results:
            norm-every-layer, round-weights, dola-unlimited, context-round-trip, parse-special-tokens.
        memories: folder of memories saved by `fastmem fit`, for `fastmem predict`. Left out, those in
            the run folder are used, and without any it answers zero-shot.
        bertscore_model: encoder of the score bert_precision of summaries (a Hub id or a folder; the paper's
            is roberta-large); left out, it is not computed.
        factkb_model: sequence classifier of the score factkb of summaries (the paper's is
            bunsenfeng/FactKB); left out, it is not computed.
        optimizer_state: auto keeps a memory and its first moment in bfloat16 where the kernel trains it (on a
            GPU, in bfloat16); float32 keeps all of it in float32, and takes more memory.
        auto_batch: choose the size of batches by the free memory, and when one does not fit all the same,
            halve it and try again.
        quantization: keep the trunk in fewer bits: bnb-4bit, bnb-8bit (extra bnb), torchao-int8, torchao-int4
            (extra torchao). The trained networks and the head stay as they are.
        device_map: lay the trunk out over the devices of this process: auto, balanced, sequential, or a
            mapping from module names to devices.
        tp_plan: "auto" shards every matrix of the trunk over the processes of torchrun or trainer.devices,
            which then work on the same batch.
        trust_remote_code: run model code that comes with a checkpoint. Off unless you trust its source.
    """

    def __init__(
        self,
        backbone: str = "demo",
        methods: list[str] = ["zero-shot", "fastmem", "fastmem+cd"],  # noqa: B006 (jsonargparse shows it)
        steps: int = 10,
        learning_rate: float = 1e-5,
        kl_coeff: float = 0.1,
        kl_target: float | None = None,
        kl_gain: float = 0.1,
        num_layers: int = 1,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        max_context_tokens: int = 7500,
        strict: bool = False,
        chat_template: bool = True,
        system_prompt: str | None = None,
        max_new_tokens: int = 100,
        alpha: float = 0.5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: list[str] = [],  # noqa: B006
        dola_layers: str | list[float] = "auto",
        relative_top: float = 0.1,
        published_quirks: list[str] = [],  # noqa: B006
        memories: str | None = None,
        bertscore_model: str | None = None,
        factkb_model: str | None = None,
        optimizer_state: str = "auto",
        auto_batch: bool = True,
        quantization: str | None = None,
        device_map: str | dict[str, str | int] | None = None,
        tp_plan: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        quirks = select_quirks(published_quirks)
        self.settings = self._pick(
            MemorizationSettings,
            norm_every_layer="norm-every-layer" in quirks,
            round_weights="round-weights" in quirks,
        )
        layers = dola_layers if isinstance(dola_layers, str) else tuple(dola_layers)
        self.decoding = self._pick(
            DecodingSettings,
            stop=stop if isinstance(stop, str) else tuple(stop),
            dola_layers=layers,
            dola_unlimited="dola-unlimited" in quirks,
        )
        self.chat = self._pick(
            ChatSettings,
            round_trip="context-round-trip" in quirks,
            parse_special_tokens="parse-special-tokens" in quirks,
        )
        self.methods = select_methods(methods)
        self.memories = Path(memories) if memories else None
        self.mode: Mode = "fit-predict"
        self._backbone: Backbone | None = None

    def _pick(self, kind: type[Settings], **further: Any) -> Settings:
        """Build one of the settings classes from the arguments of the same names."""
        given = {f.name: self.hparams[f.name] for f in fields(kind) if f.name in self.hparams}
        return kind(**{**given, **further})

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
        spread = self.hparams.device_map is not None or self.hparams.quantization is not None
        if (
            backbone is None
            or backbone.precision != normalize_precision(precision)
            or not (spread or backbone.device == device)
        ):
            try:
                backbone = Backbone.load(
                    self.hparams.backbone,
                    precision,
                    device,
                    self.hparams.trust_remote_code,
                    quantization=self.hparams.quantization,
                    device_map=self.hparams.device_map,
                    tp_plan=self.hparams.tp_plan,
                    num_layers=self.settings.num_layers,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"out of memory while loading {self.hparams.backbone}; use "
                    "--trainer.precision bf16-true, a smaller --model.backbone or another device"
                ) from error
        object.__setattr__(self, "_backbone", backbone.with_chat(self.chat))
        self.memorizer = Memorizer(self.backbone, self.settings)
        self.meter = self.memorizer.meter = PhaseMeter(self.backbone.device)
        self.graphs = GraphPool()
        self.room = Room(self.backbone, self.settings, self.graphs, self.hparams.auto_batch)
        self._prepare_methods()

    def use_mode(self, mode: Mode, run_memories: Path) -> None:
        """Choose what a step does; ``run_memories`` is the run folder's ``memories/``."""
        self.mode = mode
        self.use_methods(self.hparams.methods)
        if mode == "fit":
            self.memories = run_memories
        elif mode == "predict":
            given = self.hparams.memories
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
        quirks = sorted(select_quirks(self.hparams.published_quirks))
        names = ["backbone", "quantization", *(f.name for f in fields(MemorizationSettings)), "chat_template"]
        settings = {name: self.hparams[name] for name in names if name in self.hparams}
        settings["published_quirks"] = [quirk for quirk in quirks if quirk not in ANSWER_QUIRKS]
        if answers:
            names = [f.name for f in fields(DecodingSettings)]
            settings |= {name: self.hparams[name] for name in names if name in self.hparams}
            settings["methods"] = [method.name for method in self.methods]
            settings["memories"] = self.hparams.memories
            settings["system_prompt"] = self.hparams.system_prompt
            settings["answer_quirks"] = [quirk for quirk in quirks if quirk in ANSWER_QUIRKS]
        return settings

    def _prepare_methods(self) -> None:
        """Find out what the methods need of every batch; refuse decoders that do not fit the model."""
        self._decoders = {m.name: DECODERS[m.decoder](self.decoding, self.backbone) for m in self.methods}
        decoders = self._decoders.values()
        forms = {method.prompt for method in self.methods}
        if any(decoder.needs_without_context for decoder in decoders):
            forms.add("without_context")
        limits = [decoder.max_new_tokens for decoder in decoders]
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
            self.encoder.check(sample, self.hparams.strict)
        if self.mode == "predict" and self.memories and any(method.memory for method in self.methods):
            folder, wanted = MemoryFolder(self.memories), self.settings.as_dict()
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
        num_layers = memory.num_layers if memory else self.settings.num_layers
        forms = list(encoded[0].prompts)
        prefills = Prefills(
            self.backbone,
            {form: [sample.prompts[form] for sample in encoded] for form in forms},
            num_layers,
            {form: self.early_layers(form) for form in forms},
            self.meter,
        )
        for method in sorted(self.methods, key=lambda method: method.prompt):
            used = memory if method.memory else None
            answers, decode_seconds, prefill_seconds = decode(
                prefills,
                method.decoder,
                self.decoding,
                used and used.deltas,
                method.prompt,
                method.name,
                keys=[sample.index for sample in samples],
                graphs=self.graphs,
            )
            seconds = {
                "memorize": memorize_seconds / len(samples) if used else 0.0,
                "decode": (prefill_seconds + decode_seconds) / len(samples),
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
        steps, tokens = self.settings.steps, sum(sample.context.context_tokens for sample in encoded)
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
