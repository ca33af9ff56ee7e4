"""The outer LightningModule: a predict step memorizes a batch of contexts and answers about them."""

from __future__ import annotations

import gc
import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.backbone import Backbone, EncodedContext, normalize_precision
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding import BASELINE, DECODERS, METHODS, DecodingSettings, Method, Prefill, select_methods
from fastmem_pl.errors import FastMemError, OutOfMemoryError
from fastmem_pl.memory import MemorizationSettings, Memorizer, Memory, read_header, text_hash
from fastmem_pl.metrics import SCORES
from fastmem_pl.phases import PhaseMeter

log = logging.getLogger(__name__)

Mode = Literal["fit", "predict", "fit-predict"]


class FastMemModule(LightningModule):
    """Answers questions about contexts, with and without memorizing them first.

    Defaults are the paper's for question answering with Llama-3-8B-Instruct (arXiv 2406.16069).

    Args:
        backbone: "demo" (SmolLM2-135M-Instruct), a Hub id, a model folder, or a .gguf file.
        methods: what to compare on every sample: zero-shot, fastmem, fastmem+cd.
        steps: updates on each context (the paper's epochs). 0 memorizes nothing.
        learning_rate: of AdamW, constant. Higher moves answers more and keeps the format less.
        kl_coeff: weight of the term that holds the model near itself.
        num_layers: train the feed-forward networks of this many last blocks; 1 is by far the fastest.
        weight_decay: of AdamW.
        max_grad_norm: bound of each sample's gradient norm.
        max_context_tokens: longer contexts are cut off here, and counted in the report.
        strict: refuse a context that would be cut off instead.
        max_new_tokens: most tokens of an answer.
        alpha: strength of contrastive decoding (fastmem+cd); 0 is greedy decoding.
        memories: folder of memories saved by `fastmem fit`, for `fastmem predict`. Left out, those in
            the run folder are used, and without any it answers zero-shot.
        auto_batch: when a batch does not fit in memory, halve it and try again.
        trust_remote_code: run model code that comes with a checkpoint. Off unless you trust its source.
    """

    def __init__(
        self,
        backbone: str = "demo",
        methods: list[str] = ["zero-shot", "fastmem", "fastmem+cd"],  # noqa: B006 (jsonargparse shows it)
        steps: int = 10,
        learning_rate: float = 1e-5,
        kl_coeff: float = 0.1,
        num_layers: int = 1,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        max_context_tokens: int = 7500,
        strict: bool = False,
        max_new_tokens: int = 100,
        alpha: float = 0.5,
        memories: str | None = None,
        auto_batch: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings = MemorizationSettings(
            steps, learning_rate, kl_coeff, num_layers, weight_decay, max_grad_norm, max_context_tokens
        )
        self.decoding = DecodingSettings(max_new_tokens, alpha)
        self.methods = select_methods(methods)
        self.memories = Path(memories) if memories else None
        self.mode: Mode = "fit-predict"
        self._backbone: Backbone | None = None

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
        if backbone is None or (backbone.precision, backbone.device) != (
            normalize_precision(precision),
            device,
        ):
            try:
                backbone = Backbone.load(
                    self.hparams.backbone, precision, device, self.hparams.trust_remote_code
                )
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"out of memory while loading {self.hparams.backbone}; use "
                    "--trainer.precision bf16-true, a smaller --model.backbone or another device"
                ) from error
        object.__setattr__(self, "_backbone", backbone)
        self.memorizer = Memorizer(self.backbone, self.settings)
        self.meter = PhaseMeter(self.backbone.device)

    def use_mode(self, mode: Mode, run_memories: Path) -> None:
        """Choose what a step does; ``run_memories`` is the run folder's ``memories/``."""
        self.mode = mode
        self.methods = select_methods(self.hparams.methods)
        if mode == "fit":
            self.memories = run_memories
        elif mode == "predict":
            given = self.hparams.memories
            self.memories = _memories_folder(Path(given)) if given else None
            if given is None and run_memories.is_dir():
                self.memories = run_memories
            if self.memories is None:
                self.methods = [m for m in self.methods if not m.memory] or [METHODS[BASELINE]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[dict[str, Any]]:
        """Memorize and answer a batch; returns one record per sample and method (``fit``: per sample)."""
        try:
            return self._process(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Outside the handler, so that the traceback no longer keeps the tensors alive.
        gc.collect()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1 or not self.hparams.auto_batch:
            raise OutOfMemoryError(
                f"out of memory with {len(batch)} sample(s) at once; lower --data.batch_size, "
                "--model.max_context_tokens or use --trainer.precision bf16-true; "
                "what was answered before stays, and the same command goes on from there"
            )
        half = len(batch) // 2
        log.warning("out of memory with %d samples at once; trying %d", len(batch), half)
        return self.predict_step(batch[:half]) + self.predict_step(batch[half:])

    def check_samples(self, samples: list[ContextSample]) -> None:
        """Refuse what cannot be answered before anything is: questions without room, memories that do
        not fit, and under ``strict`` contexts that would be cut off.
        """
        for sample in samples:
            room = self._room(sample)
            if self.hparams.strict:
                _, kept, cut = self.backbone.chat.truncate(sample.context, room)
                if cut:
                    raise FastMemError(
                        f"data: the context of sample {sample.id} has {kept + cut} tokens, allowed: {kept}; "
                        "shorten it, raise --model.max_context_tokens, or drop --model.strict"
                    )
        if self.mode == "predict":
            self._check_memories(samples)

    def _check_memories(self, samples: list[ContextSample]) -> None:
        """Refuse saved memories of another model, other texts or other settings, or missing ones."""
        if self.memories is None or not any(method.memory for method in self.methods):
            return
        fingerprint, wanted = self.backbone.fingerprint(), self.settings.as_dict()
        for sample in samples:
            path = memory_path(self.memories, sample.index)
            if not path.is_file():
                raise FastMemError(
                    f"no memory of sample {sample.id} in {self.memories}; run fastmem fit on this data first"
                )
            header = read_header(path, fingerprint)
            if header.get("context_hash") != text_hash(self._context(sample)[0]):
                raise FastMemError(
                    f"memory {path} is of another context than sample {sample.id}'s; "
                    "run fastmem fit on this data first"
                )
            made = json.loads(header["settings"])
            for name, value in made.items():
                if wanted.get(name) != value:
                    raise FastMemError(
                        f"model.{name}: {wanted.get(name)}, but the memories in {self.memories} were "
                        f"made with {value}; give --model.{name} {value}, or run fastmem fit again"
                    )

    def _process(self, samples: list[ContextSample]) -> list[dict[str, Any]]:
        encoded, prompts = zip(*(self._encode(sample) for sample in samples), strict=True)
        memory, memorize_seconds = self._obtain_memory(samples, encoded)
        if self.mode == "fit":
            return self._save(samples, memory)
        num_layers = memory.num_layers if memory else self.settings.num_layers
        with self.meter.measure("decode") as prefill:
            prefilled = Prefill(self.backbone, prompts, num_layers)
        records: list[list[dict[str, Any]]] = [[] for _ in samples]
        for method in self.methods:
            used = memory if method.memory else None
            with self.meter.measure("decode") as timing:
                decoder = DECODERS[method.decoder](self.decoding)
                answers = prefilled.decode(decoder, used and used.deltas, self.decoding.max_new_tokens)
            seconds = {
                "memorize": memorize_seconds / len(samples) if used else 0.0,
                "decode": (prefill["seconds"] + timing["seconds"]) / len(samples),
            }
            for row, sample in enumerate(samples):
                records[row].append(
                    self._record(
                        sample, method, answers[row], encoded[row], len(prompts[row]), seconds, used, row
                    )
                )
        return [record for of_sample in records for record in of_sample]

    def _room(self, sample: ContextSample) -> int:
        """Most context tokens that fit the settings and the model beside question and answer."""
        chat, limit = self.backbone.chat, self.backbone.context_length
        bare = TASKS[sample.task].prompt_text("", sample.question)
        # Every token is at least a byte, so short texts need no counting.
        overhead = len((bare + sample.answer_prefix).encode()) + 64
        if overhead + self.settings.max_context_tokens + self.decoding.max_new_tokens > limit:
            overhead = len(chat.prompt(bare, sample.answer_prefix))
        room = limit - overhead - self.decoding.max_new_tokens
        if room < 1:
            raise FastMemError(
                f"data: the question of sample {sample.id} leaves no room for its context in the model's "
                f"{limit} tokens; shorten it or lower --model.max_new_tokens"
            )
        return min(self.settings.max_context_tokens, room)

    def _context(self, sample: ContextSample) -> tuple[str, int]:
        """The context that fits, and how many tokens were cut off."""
        text, _, cut = self.backbone.chat.truncate(sample.context, self._room(sample))
        return text, cut

    def _encode(self, sample: ContextSample) -> tuple[EncodedContext, list[int]]:
        """Encode memorization sequence and prompt; both hold the same, possibly cut, context."""
        text, cut = self._context(sample)
        prompt = TASKS[sample.task].prompt_text(text, sample.question)
        encoded = replace(self.memorizer.encode(text), truncated=cut)
        return encoded, self.backbone.chat.prompt(prompt, sample.answer_prefix)

    def _obtain_memory(
        self, samples: list[ContextSample], encoded: tuple[EncodedContext, ...]
    ) -> tuple[Memory | None, float]:
        """Memorize or load; ``(None, 0)`` where no method needs a memory."""
        if self.mode != "fit" and not any(method.memory for method in self.methods):
            return None, 0.0
        with self.meter.measure("memorize") as timing:
            memory = self._load(samples) if self.mode == "predict" else self.memorizer.fit(encoded)
        return memory, timing["seconds"]

    def _load(self, samples: list[ContextSample]) -> Memory:
        fingerprint, device = self.backbone.fingerprint(), self.backbone.device
        paths = [memory_path(self.memories, sample.index) for sample in samples]
        return Memory.stack([Memory.load(path, fingerprint, device) for path in paths])

    def _save(self, samples: list[ContextSample], memory: Memory) -> list[dict[str, Any]]:
        for row, sample in enumerate(samples):
            memory.save(
                memory_path(self.memories, sample.index),
                row,
                self.backbone.compute_dtype,
                context_hash=text_hash(self._context(sample)[0]),
                id=sample.id,
            )
        return [{"index": s.index, "curve": c.as_dict()} for s, c in zip(samples, memory.curves, strict=True)]

    def _record(
        self,
        sample: ContextSample,
        method: Method,
        token_ids: list[int],
        encoded: EncodedContext,
        prompt_tokens: int,
        seconds: dict[str, float],
        memory: Memory | None,
        row: int,
    ) -> dict[str, Any]:
        text = self.backbone.chat.decode(token_ids)
        prediction = sample.answer_prefix + text
        scores = {}
        for name in TASKS[sample.task].scores if sample.references else ():
            value = SCORES[name].function(prediction, sample.references, sample.originals)
            if value is not None:
                scores[name] = value
        return {
            "index": sample.index,
            "id": sample.id,
            "task": sample.task,
            "method": method.name,
            "question": sample.question,
            "prediction": prediction,
            "token_ids": token_ids,
            "references": list(sample.references),
            "originals": list(sample.originals),
            "scores": scores,
            "output_words": len(text.split()),
            "curve": memory.curves[row].as_dict() if memory else None,
            "n_context_tokens": encoded.context_tokens,
            "n_truncated_tokens": encoded.truncated,
            "n_prompt_tokens": prompt_tokens,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "status": memory.status[row] if memory else "ok",
        }


def memory_path(folder: Path, index: int) -> Path:
    """File of the memory of the sample at ``index`` of the data."""
    return folder / f"{index:06d}.safetensors"


def saved_memories(folder: Path, samples: list[ContextSample]) -> dict[int, dict[str, str]]:
    """Headers of the whole memory files in ``folder`` by sample index; damaged ones are left out."""
    headers = {}
    for sample in samples:
        path = memory_path(folder, sample.index)
        if path.is_file():
            with suppress(FastMemError):
                headers[sample.index] = read_header(path)
    return headers


def _memories_folder(path: Path) -> Path:
    """Accept the folder of memories or the run folder around it."""
    folder = path / "memories" if (path / "memories").is_dir() else path
    if not any(folder.glob("*.safetensors")):
        raise FastMemError(f"model.memories: no memories in {path}; make them with fastmem fit")
    return folder


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
