"""Scores of summaries that a model of their own computes, in batches, once all answers are known."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastmem_pl.base.errors import FastMemError, one_line
from fastmem_pl.base.hub import cache_first, load_tokenizer
from fastmem_pl.base.registry import Registry

# The layers that the bert-score package takes of roberta-base, roberta-large, bert-base-uncased and
# bert-large-uncased: those whose BERTScore agrees best with human judgement (Zhang et al., 2020). By family
# and depth, since a local copy of a checkpoint may lie in a folder of any name.
_BERTSCORE_LAYERS = {("roberta", 12): 10, ("roberta", 24): 17, ("bert", 12): 9, ("bert", 24): 18}
_FACTKB_TOKENIZER = "roberta-base"


class MetricModel(ABC):
    """A model that scores answers against the articles they were written from.

    A subclass states its ``name`` in records, the ``setting`` (option) that holds ``source``, the
    ``auto_class`` of transformers that loads it, and the prefix of weights that stay ``unused``. The
    ``source`` is a Hub id or a local folder; the scores do not depend on ``batch_size``.
    """

    name: ClassVar[str]
    setting: ClassVar[str]
    auto_class: ClassVar[str]
    unused: ClassVar[str | None] = None

    def __init__(self, source: str, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        self.source, self.device, self.batch_size = source, torch.device(device), batch_size
        try:
            path = os.path.expanduser(source)
            with _isolated(self.device):
                self.model = _pretrained(self.auto_class, path, self.unused).eval()
                self.tokenizer = self._load_tokenizer(path)
            self._check()
        except Exception as error:
            # Foreign files fail in many ways.
            reason = one_line(error).rstrip(".")
            if isinstance(error, UnpicklingError):
                reason = "its weights file holds more than tensors, which is not read"
            raise FastMemError(
                f"{self.name}: cannot load {self.source!r}: {reason}; "
                f"give a local folder (--{self.setting}), or null to leave it out"
            ) from error
        self.model.to(self.device)

    def __call__(self, predictions: Sequence[str], articles: Sequence[str]) -> list[float]:
        """Return one value per sample, in the given order; 0.0 for an empty prediction."""
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
    def _score(self, predictions: list[str], articles: list[str]) -> list[float]:
        """Score one batch of predictions, none of them empty."""

    def _load_tokenizer(self, path: str) -> Any:
        return load_tokenizer(path)

    def _check(self) -> None:
        positions = getattr(self.model.config, "max_position_embeddings", 0)
        if positions < 1:
            raise ValueError("its config states no max_position_embeddings")
        embeddings = getattr(self.model.base_model, "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        # RoBERTa counts positions from the padding token's id on: the rows up to it stand for no position.
        positions -= 0 if padding is None else padding + 1
        self.max_tokens = min(self.tokenizer.model_max_length, positions)
        rows = self.model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > rows:
            raise ValueError(f"its tokenizer has {len(self.tokenizer)} tokens, its model only {rows}")
        if self.tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no padding token")


class BERTScorePrecision(MetricModel):
    """BERTScore precision of a summary against its article (Zhang et al., 2020, equation 2).

    Each token of the summary is matched with the most similar token of the article, by the cosine of their
    contextual embeddings: hidden states of the ``layer`` that bert-score takes, else of the last. The score
    is the mean over the summary's tokens; special tokens are left out on both sides, and a token without
    any similar one (negative cosines only) counts 0.
    """

    name = "bert_precision"
    setting = "model.bertscore_model"
    auto_class = "AutoModel"
    unused = "pooler."

    def _check(self) -> None:
        super()._check()
        special = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        if self.model.config.is_encoder_decoder or (special[0], special[-1], sum(special)) != (1, 1, 2):
            raise ValueError("it is no encoder that puts one token before and one after a text, like RoBERTa")
        depth = self.model.config.num_hidden_layers
        self.layer = _BERTSCORE_LAYERS.get((self.model.config.model_type, depth), depth)
        if self.layer < depth:
            self.model.encoder.layer = self.model.encoder.layer[: self.layer]

    def _score(self, predictions: list[str], articles: list[str]) -> list[float]:
        pairs = zip(self._embed(predictions), self._embed(articles), strict=True)
        # torchmetrics' BERTScore mixes pairs up when it sorts them by length (docs/LOG.md).
        best = [functional.pad(summary @ article.T, (1, 0)).amax(dim=1) for summary, article in pairs]
        # The tokenizer may find nothing in a summary (control characters only, say).
        return [tokens.mean().item() if len(tokens) else 0.0 for tokens in best]

    def _embed(self, texts: list[str]) -> list[Tensor]:
        """Return the unit embeddings ``(T, D)`` of each text's tokens, special ones left out, on the CPU."""
        # The space makes RoBERTa read the first word as any other word, as bert-score has it.
        batch = self.tokenizer(
            [f" {text.strip()}".rstrip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        hidden = functional.normalize(self.model(**batch).last_hidden_state, dim=-1)
        masks = batch["attention_mask"].bool()
        return [row[mask][1:-1].cpu() for row, mask in zip(hidden, masks, strict=True)]


class FactKB(MetricModel):
    """Probability that a summary is factual given its article (FactKB; Feng et al., 2023).

    The probability of label 1 of a sequence classifier of (summary, article). The article is cut to what
    fits; a summary that leaves it no room is cut too, the longer of both first.
    """

    name = "factkb"
    setting = "model.factkb_model"
    auto_class = "AutoModelForSequenceClassification"

    def _load_tokenizer(self, path: str) -> Any:
        try:
            return load_tokenizer(path)
        except OSError:
            # The published checkpoint comes without one and was trained with this one.
            return load_tokenizer(_FACTKB_TOKENIZER)

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
METRIC_MODELS.register("bert_precision", BERTScorePrecision)
METRIC_MODELS.register("factkb", FactKB)


def load_metric_model(name: str, source: str, device: torch.device | str = "cpu") -> MetricModel:
    """Load the model of a registered metric."""
    return METRIC_MODELS[name](source, device)


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Compute in plain float32, whatever precision plugin surrounds it, and leave the random state alone."""
    from transformers.utils import logging

    dtype, verbosity = torch.get_default_dtype(), logging.get_verbosity()
    torch.set_default_dtype(torch.float32)
    # Its report of weights that the checkpoint lacks or has too many; `_pretrained` checks them.
    logging.set_verbosity_error()
    try:
        # Newly made layers draw random numbers, which a checkpoint then replaces.
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        logging.set_verbosity(verbosity)


def _pretrained(auto_class: str, path: str, unused: str | None) -> Any:
    """Load a model whose weights all come from the checkpoint, but for those with the prefix ``unused``.

    Heads of the checkpoint for other purposes are left out; layers that the model lacks are refused.
    """
    import transformers

    # Else transformers asks a bot, from a thread that outlives a failed network, to open a pull request
    # on the Hub for every checkpoint without safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    model, info = cache_first(
        path,
        lambda local_files_only: getattr(transformers, auto_class).from_pretrained(
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
    # Numbered, which no head's are.
    layers = [key for key in info["unexpected_keys"] if re.search(r"\.layers?\.\d+\.", key)]
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    for names, fault in (
        (info["missing_keys"], "it was not trained for this: no weights for"),
        (mismatched, "weights have other shapes than its config.json says:"),
        (layers, "it holds more layers than its config.json says:"),
    ):
        wrong = sorted(name for name in names if not (unused and name.startswith(unused)))
        if wrong:
            raise ValueError(f"{fault} {wrong[0]} ({len(wrong)} in all)")
    return model
