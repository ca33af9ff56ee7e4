"""``fastmem ask``: questions to a memory file, answered as they come."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from tqdm import tqdm

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.cli.model import ModelOptions, read_text
from fastmem_pl.decoding import DECODERS, DecodingSettings, PromptCache
from fastmem_pl.decoding.answer import answer, context_room, stream_answer
from fastmem_pl.memory import Memory, read_header, trained_layers

_BATCH = 16


def ask(
    memory: str,
    question: list[str],
    *,
    questions: str | None = None,
    with_context: bool = False,
    without_context: bool = False,
    no_memory: bool = False,
    json: bool = False,
    decoder: str = "greedy",
    answer_prefix: str = "",
    decode: DecodingSettings = DecodingSettings(),  # noqa: B008 (frozen)
    options: ModelOptions = ModelOptions(),  # noqa: B008
) -> None:
    """Ask a memory.

      fastmem ask notes.fastmem "Who wrote it?" "When?"     questions, answered as the tokens come
      fastmem ask notes.fastmem --questions questions.txt   a file of them, answered in batches
      fastmem ask notes.fastmem                             a prompt loop (an empty line or Ctrl-D ends it)

    The text is shown to the model as well, as in the paper, where the file holds it and it fits
    (--with-context); --without-context asks the memory alone, --no-memory the model alone.

    Args:
        memory: file that fastmem memorize wrote.
        question: one or several, in quotes.
        questions: file with a question a line, or JSONL with "question".
        with_context: show the text to the model as well.
        without_context: ask the memory alone.
        no_memory: ask the base model, to compare.
        json: print one JSON object a line.
        decoder: greedy, cd (memorized against base), cad (with against without context) or dola.
        answer_prefix: text that opens every answer.
        decode: how answers are decoded.
        options: the model.
    """
    asked = [text.strip() for text in question]
    if not all(asked):
        raise FastMemError("a question is empty; give one in quotes")
    if questions and asked:
        raise FastMemError("give questions or --questions FILE, not both")
    if with_context and without_context:
        raise FastMemError("--with-context: not with --without-context; leave one out")
    from_file = _read_questions(questions) if questions else []
    DECODERS[decoder]
    if decoder == "cd" and no_memory:
        raise FastMemError("--decoder: cd contrasts a memory with the base model; leave --no-memory out")
    if decoder == "cad" and without_context:
        raise FastMemError("--decoder: cad contrasts with and without the text; leave --without-context out")
    unused = {"alpha": "--decoder cd or cad"} if decoder not in ("cd", "cad") else {}
    if not decode.temperature:
        unused |= dict.fromkeys(("top_p", "top_k", "seed"), "--temperature above 0")
    for name, needed in unused.items():
        if getattr(decode, name) != options.defaults[name]:
            raise FastMemError(f"--{name.replace('_', '-')}: has no effect without {needed}; leave it out")
    backbone = options.load(trained_layers(read_header(memory)))
    loaded = Memory.load(memory, backbone, backbone.device).to(backbone.compute_dtype)
    _warn(loaded)
    text = None if without_context else loaded.texts[0]
    asker = _Asker(backbone, None if no_memory else loaded, text, decoder, decode, answer_prefix, json)
    if not without_context:
        # An option that needs the text, if one was given.
        wanted = "--with-context" if with_context else "--decoder cad" if decoder == "cad" else ""
        asker.choose_context(wanted, memory, asked or from_file)
    if from_file:
        asker.answer_file(from_file)
    for one in asked:
        asker.show(one, len(asked) > 1)
    if not from_file and not asked:
        asker.loop()


@dataclass
class _Asker:
    """Answers questions with one memory, as the options say."""

    backbone: Backbone
    memory: Memory | None
    context: str | None
    decoder: str
    settings: DecodingSettings
    prefix: str
    as_json: bool

    def __post_init__(self) -> None:
        self.prompts = PromptCache()
        self.common = {"backbone": self.backbone, "memory": self.memory, "decoder": self.decoder}
        self.common |= {"answer_prefix": self.prefix, **vars(self.settings)}

    def choose_context(self, wanted: str, file: str, questions: list[str]) -> None:
        """Show the text only where there is one that fits, or an option wants it; report what is left out."""
        if self.context is None and wanted:
            raise FastMemError(f"{wanted}: {file} does not hold its text (memorize --no-text); leave it out")
        if self.context is None:
            print("fastmem: the file does not hold its text, so the memory alone is asked", file=sys.stderr)
            return
        # In the loop, no question is known yet.
        cut = self.fitting(questions or [50 * " word"])[2]
        if cut and wanted:
            print(f"fastmem: the last {cut} tokens of the text do not fit and are not shown", file=sys.stderr)
        elif cut:
            self.context = None
            print(
                "fastmem: the text does not fit the model's context, so the memory alone is asked "
                "(--with-context shows its beginning)",
                file=sys.stderr,
            )

    def fitting(self, questions: list[str]) -> tuple[str | None, int, int]:
        """The context as far as it fits beside each of these questions and its answer, its tokens, and those
        that are cut off.
        """
        if self.context is None:
            return None, 0, 0
        rest = (self.decoder, self.settings, self.prefix)
        room = min(context_room(self.backbone, question, *rest) for question in questions)
        return self.backbone.chat.cut(self.context, max(room, 1))

    def stream(self, question: str) -> Iterator[str]:
        """One answer, piece by piece."""
        context = self.fitting([question])[0]
        return stream_answer(question=question, context=context, prompts=self.prompts, **self.common)

    def together(self, questions: list[str]) -> list[str]:
        """Several answers at once, in halves where there is no memory for all."""
        try:
            return answer(questions=questions, context=self.fitting(questions)[0], **self.common)
        except (RuntimeError, MemoryError) as error:
            if len(questions) == 1 or not is_out_of_memory(error):
                raise
        half = len(questions) // 2
        return self.together(questions[:half]) + self.together(questions[half:])

    def answer_file(self, questions: list[str]) -> None:
        """Answer in batches, printed as each is done."""
        # On a CPU one by one where the text is shown: it is then read once, not once a question.
        size = 1 if self.context is not None and self.backbone.device.type == "cpu" else _BATCH
        with tqdm(total=len(questions), desc="answering", unit="question", disable=None) as bar:
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                texts = ["".join(self.stream(batch[0]))] if size == 1 else self.together(batch)
                for question, text in zip(batch, texts, strict=True):
                    shown = f"Q: {question}\n{_printable(text)}\n"
                    print(self.record(question, text) if self.as_json else shown, flush=True)
                bar.update(len(batch))

    def show(self, question: str, with_question: bool) -> None:
        """Print one answer as its tokens come, or its record."""
        if self.as_json:
            print(self.record(question, "".join(self.stream(question))), flush=True)
            return
        if with_question:
            print(f"Q: {question}")
        for piece in self.stream(question):
            print(_printable(piece), end="", flush=True)
        print("\n" if with_question else "", flush=True)

    def record(self, question: str, text: str) -> str:
        """A line of JSON for one answer."""
        found = {"question": question, "answer": text, "decoder": self.decoder}
        found |= {"context": self.context is not None, "memory": self.memory is not None}
        return json.dumps(found, ensure_ascii=False)

    def loop(self) -> None:
        """Ask until the input ends; Ctrl-C breaks an answer off."""
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                # Line editing and history for input().
                import readline  # noqa: F401
            print("ask; an empty line or Ctrl-D ends", file=sys.stderr)
        while True:
            try:
                question = input("> " if interactive else "").strip()
                question.encode()
            except EOFError:
                return
            except UnicodeError:
                raise FastMemError("cannot read a question: standard input is no UTF-8 text") from None
            if not question and interactive:
                return
            try:
                if question:
                    self.show(question, not interactive)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print()
            except FastMemError as error:
                # A question that is too long, say: the next may not be.
                if not interactive:
                    raise
                print(f"fastmem: {error}", file=sys.stderr)


def _warn(memory: Memory) -> None:
    """Print what is wrong with a memory that can be asked all the same."""
    if memory.status[0] != "ok":
        print(f"fastmem: memorizing {memory.status[0].split(';')[0]}: it is the base model", file=sys.stderr)
    windows = memory.windows
    if windows and windows["updates"] < windows["planned"]:
        done = f"{windows['updates']} of {windows['planned']} updates"
        print(f"fastmem: memorizing was stopped after {done}", file=sys.stderr)


def _read_questions(path: str) -> list[str]:
    questions = []
    for number, line in enumerate(read_text(path, "questions, one a line").split("\n"), 1):
        question = line.strip()
        if question.startswith("{"):
            try:
                question = json.loads(question)["question"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise FastMemError(f'{path}, line {number}: no JSON object with a text "question"') from None
            if not question:
                raise FastMemError(f'{path}, line {number}: "question" is empty')
        if question:
            questions.append(question)
    return questions


def _printable(text: str) -> str:
    """A text without what a terminal would act on: a stranger's memory may say anything."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
