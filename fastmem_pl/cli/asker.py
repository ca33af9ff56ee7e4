"""Answers to questions, one by one or together, as ``fastmem ask`` gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmem_pl.backbone import Backbone
    from fastmem_pl.decoding import DecodingSettings
    from fastmem_pl.memory import Memory


class Asker:
    """Answers questions with one memory, as the options say.

    Args:
        backbone: the model.
        memory: of one row, or ``None`` for the base model.
        context: shown to the model, or ``None``.
        decoder: its name.
        settings: of decoding.
        answer_prefix: opens every answer.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: Memory | None,
        context: str | None,
        decoder: str,
        settings: DecodingSettings,
        answer_prefix: str,
    ) -> None:
        from fastmem_pl.decoding import PromptCache

        self._backbone, self._context, self._settings = backbone, context, settings
        self._common = {"backbone": backbone, "memory": memory, "decoder": decoder}
        self._common |= {"answer_prefix": answer_prefix, **vars(settings)}
        self._prompts = PromptCache()
        self.decoder, self.with_context, self.with_memory = decoder, context is not None, memory is not None

    @property
    def reads_once(self) -> bool:
        """Whether questions go one by one: the text is then read once, not once a question."""
        return self.with_context and self._backbone.device.type == "cpu"

    def stream(self, question: str) -> Iterator[str]:
        """One answer, piece by piece."""
        from fastmem_pl.decoding.answer import stream_answer

        context = self._cut_for([question])
        return stream_answer(question=question, context=context, prompts=self._prompts, **self._common)

    def together(self, questions: list[str]) -> list[str]:
        """Several answers at once, in halves where there is no memory for all."""
        from fastmem_pl.base.phases import is_out_of_memory
        from fastmem_pl.decoding.answer import answer

        try:
            return answer(questions=questions, context=self._cut_for(questions), **self._common)
        except (RuntimeError, MemoryError) as error:
            if len(questions) == 1 or not is_out_of_memory(error):
                raise
        half = len(questions) // 2
        return self.together(questions[:half]) + self.together(questions[half:])

    def record(self, question: str, text: str) -> str:
        """A line of JSON for one answer."""
        stated = {"question": question, "answer": text, "decoder": self.decoder}
        stated |= {"context": self.with_context, "memory": self.with_memory}
        return json.dumps(stated, ensure_ascii=False)

    def _cut_for(self, questions: list[str]) -> str | None:
        """The context, shorter where one of these questions needs the room."""
        if self._context is None:
            return None
        return self._backbone.chat.cut(self._context, self._room(questions))[0]

    def tokens_cut(self, questions: list[str]) -> int:
        """Tokens of the context that do not fit beside one of these questions."""
        return self._backbone.chat.cut(self._context, self._room(questions))[2]

    def _room(self, questions: list[str]) -> int:
        """Tokens of a context that fit beside each of these questions and its answer."""
        from fastmem_pl.decoding.answer import context_room

        prefix = self._common["answer_prefix"]
        rooms = [context_room(self._backbone, q, self.decoder, self._settings, prefix) for q in questions]
        return max(min(rooms), 1)
