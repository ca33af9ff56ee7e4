"""From samples to token ids: what is memorized, and every prompt about it."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastmem_pl.backbone import EncodedContext
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.memory import Memorizer, context_hash


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one sample: context, prompts by form, and the context tokens that each form leaves out."""

    context: EncodedContext
    prompts: dict[str, list[int]]
    prompt_cuts: dict[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest of them."""
        return max(len(self.context.input_ids), *map(len, self.prompts.values()))

    @property
    def context_hash(self) -> str:
        """Short hash that ties a saved memory to what was memorized."""
        return context_hash([self.context])


class SampleEncoder:
    """Encodes samples for one backbone, with room for an answer in every form of the prompt.

    What is memorized depends on the memorizer alone, so that a memory serves whatever is asked of it. A
    prompt gets the same context, cut further only where the model has no room for it beside question,
    worked example and answer.
    """

    def __init__(self, memorizer: Memorizer, max_new_tokens: int, forms: Iterable[str]) -> None:
        self._chat = memorizer.backbone.chat
        self._length = memorizer.backbone.context_length
        self._max_context_tokens = memorizer.settings.max_context_tokens
        self._limit = memorizer.context_limit
        self._max_new_tokens = max_new_tokens
        self._forms = sorted(set(forms))

    def __call__(self, sample: ContextSample) -> EncodedSample:
        """Encode one sample."""
        text, kept, cut = self.cut(sample)
        prompts, prompt_cuts = {}, {}
        for form in self._forms:
            room = self._room(sample, form)
            shown = self._chat.cut(text, room)[0] if kept > room else text
            prompts[form] = self._prompt(sample, shown, form)
            prompt_cuts[form] = cut + max(kept - room, 0)
        return EncodedSample(self._chat.whole_context(text, kept, cut), prompts, prompt_cuts)

    def check(self, sample: ContextSample, strict: bool) -> None:
        """Refuse a question without room for a context, and under ``strict`` a context that would be cut."""
        rooms = {form: self._room(sample, form) for form in self._forms}
        if not strict:
            return
        _, kept, cut = self.cut(sample)
        allowed = min(kept, *rooms.values()) if cut else min(rooms.values())
        if kept + cut > allowed:
            bound = self._max_context_tokens <= allowed
            mend = (
                "raise --model.memorize.max_context_tokens"
                if bound
                else "lower --model.decode.max_new_tokens"
            )
            raise FastMemError(
                f"data: the context of sample {sample.id} has {kept + cut} tokens, allowed: {allowed}; "
                f"shorten it, {mend}, or drop --model.strict"
            )

    def _room(self, sample: ContextSample, form: str) -> int:
        """Most context tokens that a prompt has room for beside question and answer."""
        if form == "without_context":
            return self._length
        bare = TASKS[sample.task].prompt_text("", sample.question, form)
        # Every token is at least a byte, so short texts need no counting.
        system = self._chat.settings.system_prompt or ""
        overhead = len((bare + system + sample.answer_prefix).encode()) + 64
        if overhead + self._limit + self._max_new_tokens > self._length:
            overhead = len(self._prompt(sample, "", form))
        room = self._length - overhead - self._max_new_tokens
        if room < 1:
            raise FastMemError(
                f"data: the question of sample {sample.id} leaves no room for its context in the model's "
                f"{self._length} tokens; shorten it or lower --model.decode.max_new_tokens"
            )
        return room

    def cut(self, sample: ContextSample) -> tuple[str, int, int]:
        """The context, its tokens that are kept, and those that are cut off."""
        return self._chat.cut(sample.context, self._limit)

    def _prompt(self, sample: ContextSample, context: str, form: str) -> list[int]:
        text = TASKS[sample.task].prompt_text(context, sample.question, form)
        return self._chat.prompt(text, sample.answer_prefix)
