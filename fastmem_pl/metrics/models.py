"""Scores of summaries that a model of their own computes, in batches, once all answers are known."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.hub import cache_first, load_tokenizer
from fastmem_pl.base.registry import Registry

_LOADING_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)
# The layers that the bert-score package takes of roberta-base, roberta-large, bert-base-uncased and
# bert-large-uncased: those whose BERTScore agrees best with human judgement (Zhang et al., 2020). Told by
# family and depth, since a local copy of a checkpoint may lie in a folder of any name.
_BERTSCORE_LAYERS = {("roberta", 12): 10, ("roberta", 24): 17, ("bert", 12): 9, ("bert", 24): 18}
_FACTKB_TOKENIZER = "roberta-base"


class MetricModel(ABC):
    """A model that scores answers against the articles they were written from.

    Args:
        source: Hub id or local folder.
        device: that holds the model.
        batch_size: samples of one forward pass; the scores do not depend on it.

    Raises:
        FastMemError: when the checkpoint cannot be loaded or does not fit the metric.

    Attributes:
        name: of the score in records and ``metrics.json``.
        setting: that holds ``source`` on the command line.
        max_tokens: length at which inputs are cut, special tokens included.
    """

    name: ClassVar[str]
    setting: ClassVar[str]

    def __init__(self, source: str, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        self.source, self.device, self.batch_size = source, torch.device(device), batch_size
        try:
            with _isolated(self.device), _silent_transformers():
                self.model = self._load_model(_path(source)).eval()
                self.tokenizer = self._load_tokenizer(_path(source))
            self.max_tokens = _max_tokens(self.model, self.tokenizer)
            self._check()
        except UnpicklingError as error:
            raise self._refusal("its weights file holds more than tensors, which is not read") from error
        except _LOADING_ERRORS as error:
            raise self._refusal(" ".join(str(error).split())[:300]) from error
        self.model.to(self.device)

    def __call__(self, predictions: Sequence[str], articles: Sequence[str]) -> list[float]:
        """Return one value per sample, in the given order; 0.0 for an empty prediction.

        Raises:
            ValueError: when there are not as many articles as predictions.
        """
        pairs = list(zip(predictions, articles, strict=True))
        values = [0.0] * len(pairs)
        rows = [i for i, (prediction, _) in enumerate(pairs) if prediction.strip()]
        with _isolated(self.device), torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                scores = self._score([pairs[i][0] for i in batch], [pairs[i][1] for i in batch])
                for i, score in zip(batch, scores, strict=True):
                    values[i] = score
        return values

    @abstractmethod
    def _load_model(self, path: str) -> Any:
        """Load the model on the CPU."""

    @abstractmethod
    def _score(self, predictions: list[str], articles: list[str]) -> list[float]:
        """Score one batch of predictions, none of them empty."""

    def _load_tokenizer(self, path: str) -> Any:
        return load_tokenizer(path)

    def _check(self) -> None:
        rows = self.model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > rows:
            raise ValueError(f"its tokenizer has {len(self.tokenizer)} tokens, its model only {rows}")
        if self.tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no padding token")

    def _refusal(self, reason: str) -> FastMemError:
        return FastMemError(
            f"{self.name}: cannot load {self.source!r}: {reason.rstrip('.')}; "
            f"give a local folder (--{self.setting}), or null to leave it out"
        )


class BERTScorePrecision(MetricModel):
    """BERTScore precision of a summary against its article (Zhang et al., 2020), by torchmetrics.

    Each token of the summary is matched with the most similar token of the article, by the cosine of their
    contextual embeddings; the score is the mean over the summary's tokens. Special tokens are left out on
    both sides, and a token without any similar one (negative cosines only) counts 0.

    Attributes:
        layer: whose hidden states are the embeddings: for RoBERTa and BERT as in bert-score, else the last.
    """

    name = "bert_precision"
    setting = "model.bertscore_model"

    def __init__(
        self, source: str = "roberta-large", device: torch.device | str = "cpu", batch_size: int = 16
    ) -> None:
        super().__init__(source, device, batch_size)

    def _load_model(self, path: str) -> Any:
        from transformers import AutoModel

        model = _pretrained(AutoModel, path, unused="pooler.")
        depth = model.config.num_hidden_layers
        self.layer = _BERTSCORE_LAYERS.get((model.config.model_type, depth), depth)
        if self.layer < depth:
            model.encoder.layer = model.encoder.layer[: self.layer]
        return model

    def _check(self) -> None:
        super()._check()
        special = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        if self.model.config.is_encoder_decoder or (special[0], special[-1], sum(special)) != (1, 1, 2):
            raise ValueError("it is no encoder that puts one token before and one after a text, like RoBERTa")

    def _score(self, predictions: list[str], articles: list[str]) -> list[float]:
        from torchmetrics.functional.text.bert import bert_score

        scores = []
        for summary, article in zip(self._embed(predictions), self._embed(articles), strict=True):
            # One pair a call: torchmetrics sorts predictions and articles each by their own length and does
            # not undo it right (Lightning-AI/torchmetrics#2728), so several pairs in a call get mixed up.
            result = bert_score(
                _as_input(summary),
                _as_input(article),
                model=self.model,
                user_forward_fn=lambda model, batch: batch["input_ids"],
            )
            # NaN: the tokenizer found nothing in the summary (control characters only, say).
            scores.append(result["precision"].nan_to_num(0.0).item())
        return scores

    def _embed(self, texts: list[str]) -> list[Tensor]:
        """Return the embeddings ``(T, D)`` of each text's tokens, special ones included, on the CPU."""
        # The space makes RoBERTa read the first word as any other word, as bert-score has it.
        batch = self.tokenizer(
            [f" {text.strip()}".rstrip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state
        return [row[mask.bool()].cpu() for row, mask in zip(hidden, batch["attention_mask"], strict=True)]


class FactKB(MetricModel):
    """Probability that a summary is factual given its article (FactKB; Feng et al., 2023).

    The probability of label 1 of a sequence classifier that reads (summary, article). The article is cut to
    what fits; a summary that leaves it no room is cut too, the longer of both first.
    """

    name = "factkb"
    setting = "model.factkb_model"

    def __init__(
        self, source: str = "bunsenfeng/FactKB", device: torch.device | str = "cpu", batch_size: int = 16
    ) -> None:
        super().__init__(source, device, batch_size)

    def _load_model(self, path: str) -> Any:
        from transformers import AutoModelForSequenceClassification

        return _pretrained(AutoModelForSequenceClassification, path)

    def _load_tokenizer(self, path: str) -> Any:
        try:
            return super()._load_tokenizer(path)
        except OSError:
            # The published checkpoint comes without one and was trained with this one.
            try:
                return load_tokenizer(_FACTKB_TOKENIZER)
            except OSError as error:
                raise OSError(f"it has no tokenizer of its own, and {error}") from error

    def _check(self) -> None:
        super()._check()
        if self.model.config.num_labels < 2:
            raise ValueError("it has 1 label where not factual and factual are needed")

    def _score(self, predictions: list[str], articles: list[str]) -> list[float]:
        rows = [self._encode(*pair) for pair in zip(predictions, articles, strict=True)]
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
        return self.model(**batch).logits.softmax(dim=-1)[:, 1].tolist()

    def _encode(self, summary: str, article: str) -> Any:
        room = self.max_tokens - self.tokenizer.num_special_tokens_to_add(pair=True)
        length = len(self.tokenizer(summary, add_special_tokens=False, verbose=False)["input_ids"])
        return self.tokenizer(
            summary,
            article,
            max_length=self.max_tokens,
            # Tokenizers refuse to cut the article to nothing.
            truncation="only_second" if length < room else "longest_first",
        )


METRIC_MODELS: Registry[Callable[..., MetricModel]] = Registry("metric model")
for _factory in (BERTScorePrecision, FactKB):
    METRIC_MODELS.register(_factory.name, _factory)


def load_metric_model(name: str, source: str, device: torch.device | str = "cpu") -> MetricModel:
    """Load a registered metric's model.

    Without a network it fails within seconds: the Hub's client alone would retry for most of a minute.

    Raises:
        FastMemError: when the name is unknown or the checkpoint cannot be loaded, in one line that says which
            setting to change.
    """
    return METRIC_MODELS[name](source, device)


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Compute in plain float32, whatever precision plugin surrounds it, and leave the random state alone."""
    # torchmetrics finds the last token by a running sum in the default dtype, which in bfloat16 can miss it
    # from 153 tokens on; the data loader inside it and newly made layers draw random numbers.
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Silence the report of weights that the checkpoint lacks or has too many; `_pretrained` checks them."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _path(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise OSError("there is no such folder")
    return source


def _pretrained(auto_class: Any, path: str, unused: str | None = None) -> Any:
    """Load a model whose weights all come from the checkpoint, but for those with the prefix ``unused``.

    Heads of the checkpoint for other purposes are left out; layers that the model lacks are not.

    Raises:
        ValueError: naming the first of the weights that are missing, of another shape, or left over.
    """
    # Else transformers asks a bot, from a thread that outlives a failed network, to open a pull request
    # on the Hub for every checkpoint without safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    model, info = cache_first(
        path,
        lambda local_files_only: auto_class.from_pretrained(
            path,
            dtype=torch.float32,
            # Safetensors where there are some. Of a pytorch_model.bin only tensors are read, which runs no
            # code of the file.
            weights_only=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        ),
    )

    def needed(keys: Iterable[str]) -> list[str]:
        return sorted(key for key in keys if unused is None or not key.startswith(unused))

    missing = needed(info["missing_keys"])
    mismatched = needed(name for name, *_ in info["mismatched_keys"])
    if missing:
        raise ValueError(f"it was not trained for this: no weights for {missing[0]} ({len(missing)} missing)")
    if mismatched:
        raise ValueError(f"weights have other shapes than its config.json says: {mismatched[0]}")
    # Numbered, which no head's are.
    layers = sorted(key for key in info["unexpected_keys"] if re.search(r"\.layers?\.\d+\.", key))
    if layers:
        raise ValueError(f"it holds more layers than its config.json says: {layers[0]}")
    return model


def _max_tokens(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", 0)
    if positions < 1:
        raise ValueError("its config states no max_position_embeddings")
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    # RoBERTa counts positions from the padding token's id on: the rows up to it stand for no position.
    return min(tokenizer.model_max_length, positions - (0 if padding is None else padding + 1))


def _as_input(embeddings: Tensor) -> dict[str, Tensor]:
    """Pass embeddings ``(T, D)`` in place of token ids, which torchmetrics leaves to the model."""
    return {
        "input_ids": embeddings.unsqueeze(0),
        "attention_mask": torch.ones(1, len(embeddings), dtype=torch.long),
    }
