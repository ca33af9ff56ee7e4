"""From samples to token ids: what is memorized, and every prompt, all with the same context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from fastmem_pl.backbone import Backbone, EncodedContext
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.errors import FastMemError


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one sample.

    Attributes:
        context: the memorization sequence.
        prompts: token ids by form of the prompt.
    """

    context: EncodedContext
    prompts: dict[str, list[int]]

    @property
    def context_hash(self) -> str:
        """Short hash that ties a saved memory to what was memorized."""
        ids = " ".join(map(str, self.context.input_ids))
        return hashlib.sha256(ids.encode()).hexdigest()[:16]


class SampleEncoder:
    """Encodes samples for one backbone.

    Args:
        backbone: whose chat template and context length apply.
        max_context_tokens: longer contexts are cut off here.
        max_new_tokens: room left for the answer.
        forms: forms of the prompt that will be answered.
    """

    def __init__(
        self, backbone: Backbone, max_context_tokens: int, max_new_tokens: int, forms: Iterable[str]
    ) -> None:
        self._chat = backbone.chat
        self._limit = backbone.context_length
        self._max_context_tokens = max_context_tokens
        self._max_new_tokens = max_new_tokens
        self._forms = sorted(set(forms))

    def __call__(self, sample: ContextSample) -> EncodedSample:
        """Encode one sample; its context is cut to what fits every prompt."""
        text, kept, cut = self._cut(sample, self.room(sample))
        prompts = {form: self._prompt(sample, text, form) for form in self._forms}
        return EncodedSample(self._chat.whole_context(text, kept, cut), prompts)

    def room(self, sample: ContextSample) -> int:
        """Most context tokens that fit the settings and the model beside question and answer.

        Raises:
            FastMemError: when there is no room for any.
        """
        with_context = [form for form in self._forms if form != "without_context"]
        task = TASKS[sample.task]
        texts = [task.prompt_text("", sample.question, form) for form in with_context]
        # Every token is at least a byte, so short texts need no counting.
        system = self._chat.settings.system_prompt or ""
        overhead = max((len(text.encode()) for text in texts), default=0)
        overhead += len((system + sample.answer_prefix).encode()) + 64
        if overhead + self._max_context_tokens + self._max_new_tokens > self._limit:
            overhead = max((len(self._prompt(sample, "", form)) for form in with_context), default=0)
        room = self._limit - overhead - self._max_new_tokens
        if room < 1:
            raise FastMemError(
                f"data: the question of sample {sample.id} leaves no room for its context in the model's "
                f"{self._limit} tokens; shorten it or lower --model.max_new_tokens"
            )
        return min(self._max_context_tokens, room)

    def check_whole(self, sample: ContextSample) -> None:
        """Refuse a sample whose context would be cut off.

        Raises:
            FastMemError: naming the sample and its length in tokens.
        """
        _, kept, cut = self._cut(sample, self.room(sample))
        if cut:
            raise FastMemError(
                f"data: the context of sample {sample.id} has {kept + cut} tokens, allowed: {kept}; "
                "shorten it, raise --model.max_context_tokens, or drop --model.strict"
            )

    def _cut(self, sample: ContextSample, room: int) -> tuple[str, int, int]:
        text, kept, cut = self._chat.truncate(sample.context, room)
        if self._chat.settings.round_trip and TASKS[sample.task].is_summary:
            # The published code sends articles through it on loading and again for every sample.
            text, kept, cut_again = self._chat.truncate(text, room)
            cut += cut_again
        return text, kept, cut

    def _prompt(self, sample: ContextSample, context: str, form: str) -> list[int]:
        text = TASKS[sample.task].prompt_text(context, sample.question, form)
        return self._chat.prompt(text, sample.answer_prefix)
