"""Many questions to one model, with one memory and one text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.decoding.answer import answer, encode_prompt, stream_answer
from fastmem_pl.decoding.decoders import DECODERS
from fastmem_pl.decoding.prefill import PromptCache
from fastmem_pl.decoding.settings import DecodingSettings
from fastmem_pl.memory import Memory

_BATCH = 16


@dataclass
class Conversation:
    """Answers questions with a memory and as much of its text as fits beside question and answer."""

    backbone: Backbone
    memory: Memory | None
    context: str | None
    decoder: str
    settings: DecodingSettings
    answer_prefix: str
    _prompts: PromptCache = field(default_factory=PromptCache)

    def fitting(self, questions: Sequence[str]) -> tuple[str | None, int]:
        """The text as far as it fits beside each of these questions, and the number of tokens cut off."""
        if self.context is None:
            return None, 0
        longest = max(len(encode_prompt(self.backbone, q, "", self.answer_prefix)) for q in questions)
        answered = DECODERS[self.decoder](self.settings, self.backbone).max_new_tokens
        # Tokens may merge otherwise where the context begins and ends.
        room = self.backbone.context_length - longest - answered - 4
        text, _, cut = self.backbone.chat.cut(self.context, max(room, 1))
        return text, cut

    def stream(self, question: str) -> Iterator[str]:
        """One answer, piece by piece."""
        return stream_answer(question=question, prompts=self._prompts, **self._common([question]))

    @property
    def reads_once(self) -> bool:
        """Whether questions go one by one, so that the text is read once: on a CPU where it is shown."""
        return self.context is not None and self.backbone.device.type == "cpu"

    def answers(self, questions: Sequence[str]) -> Iterator[str]:
        """One answer a question, in batches."""
        size = 1 if self.reads_once else _BATCH
        for start in range(0, len(questions), size):
            yield from self._together(questions[start : start + size])

    def _together(self, questions: Sequence[str]) -> list[str]:
        if len(questions) > 1:
            try:
                return answer(questions=questions, **self._common(questions))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        return ["".join(self.stream(question)) for question in questions]

    def _common(self, questions: Sequence[str]) -> dict[str, Any]:
        return {
            "backbone": self.backbone,
            "context": self.fitting(questions)[0],
            "memory": self.memory,
            "decoder": self.decoder,
            "answer_prefix": self.answer_prefix,
            **vars(self.settings),
        }
