"""``fastmem ask``: questions to a memory file, answered as they come."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastmem_pl.commands.options import (
    CommandParser,
    add_model_options,
    load_backbone,
    model_settings,
    pick,
    read_text,
)
from fastmem_pl.errors import FastMemError

if TYPE_CHECKING:
    from fastmem_pl.backbone import Backbone
    from fastmem_pl.decoding import DecodingSettings
    from fastmem_pl.memory import Memory

DESCRIPTION = """\
Ask a memory.

  fastmem ask notes.fastmem "Who wrote it?" "When?"     questions, answered as the tokens come
  fastmem ask notes.fastmem --questions questions.txt   a file of them, answered in batches
  fastmem ask notes.fastmem                             a prompt loop (an empty line or Ctrl-D ends it)

The text is shown to the model as well, as in the paper, where the file holds it and it fits
(--with-context); --without-context asks the memory alone, --no-memory the model alone.
"""
_BATCH = 16


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

        self._common = {"backbone": backbone, "context": context, "memory": memory, "decoder": decoder}
        self._common["answer_prefix"] = answer_prefix
        self._settings, self._prompts = vars(settings), PromptCache()
        self.decoder, self.with_context, self.with_memory = decoder, context is not None, memory is not None

    def stream(self, question: str) -> Iterator[str]:
        """One answer, piece by piece."""
        from fastmem_pl.answering import stream_answer

        return stream_answer(question=question, prompts=self._prompts, **self._common, **self._settings)

    def together(self, questions: list[str]) -> list[str]:
        """Several answers at once."""
        from fastmem_pl.answering import answer

        return answer(questions=questions, **self._common, **self._settings)

    def record(self, question: str, text: str) -> str:
        """A line of JSON for one answer."""
        stated = {"question": question, "answer": text, "decoder": self.decoder}
        stated |= {"context": self.with_context, "memory": self.with_memory}
        return json.dumps(stated, ensure_ascii=False)


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for a mistake.
    """
    options = _parser().parse(arguments)
    asked = [question.strip() for question in options.question]
    if not all(asked):
        raise FastMemError("a question is empty; give one in quotes")
    if options.questions and asked:
        raise FastMemError("give questions or --questions FILE, not both")
    from_file = _read_questions(options.questions) if options.questions else []
    settings = model_settings(options)

    from fastmem_pl.memory import Memory, read_header

    read_header(options.memory)
    asker_settings = _decoding_settings(options, settings)
    backbone = load_backbone(settings)
    memory = Memory.load(options.memory, backbone, backbone.device)
    context = _context(options, memory, backbone, asker_settings, asked or from_file)
    used = None if options.no_memory else memory
    asker = Asker(backbone, used, context, options.decoder, asker_settings, options.answer_prefix)
    if from_file:
        return _answer_file(asker, from_file, options.json)
    if asked:
        for question in asked:
            _show(asker, question, len(asked) > 1, options.json)
        return 0
    return _loop(asker, options.json)


def _parser() -> CommandParser:
    from fastmem_pl.decoding.settings import DecodingSettings

    parser = CommandParser(prog="fastmem ask", description=DESCRIPTION)
    parser.add_argument("memory", metavar="MEMORY", help="file that fastmem memorize wrote")
    parser.add_argument("question", nargs="*", metavar="QUESTION", help="one or several, in quotes")
    parser.add_argument("--questions", metavar="FILE", help='one a line, or JSONL with "question"')
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--with-context", action="store_true", default=None, help="show the text to the model as well"
    )
    shown.add_argument(
        "--without-context", dest="with_context", action="store_false", help="ask the memory alone"
    )
    parser.add_argument("--no-memory", action="store_true", help="ask the base model, to compare")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decoder",
        default="greedy",
        metavar="NAME",
        help="greedy (default), cd (memorized against base), cad (with against without context), dola",
    )
    defaults = DecodingSettings()
    group.add_argument("--alpha", type=float, help=f"strength of cd and cad (default: {defaults.alpha})")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 100)")
    group.add_argument("--temperature", type=float, help="above 0 draws tokens (default: 0)")
    group.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this total probability")
    group.add_argument("--top-k", type=int, help="draw from this many likeliest tokens")
    group.add_argument("--repetition-penalty", type=float, help="1 is none; dola takes 1.2")
    group.add_argument("--seed", type=int, help="of the draws (default: 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given again")
    group.add_argument("--answer-prefix", default="", metavar="TEXT", help="opens every answer")
    add_model_options(parser)
    return parser


def _decoding_settings(options: argparse.Namespace, settings: dict[str, Any]) -> DecodingSettings:
    from fastmem_pl.decoding import DECODERS, DecodingSettings

    DECODERS[options.decoder]
    # A demo run keeps its answers short; an asked one may be long.
    own = {**settings, "max_new_tokens": options.max_new_tokens, "alpha": options.alpha}
    own["stop"] = tuple(options.stop or ())
    own["temperature"] = options.temperature
    return pick(DecodingSettings, own)


def _context(
    options: argparse.Namespace,
    memory: Memory,
    backbone: Backbone,
    settings: DecodingSettings,
    questions: Iterable[str],
) -> str | None:
    """The text to show, cut where it has to be, or ``None``."""
    text = memory.texts[0]
    if options.with_context is False:
        return None
    if text is None:
        if options.with_context:
            raise FastMemError(
                f"{options.memory} does not hold its text (it was made with --no-text); ask --without-context"
            )
        print("fastmem: the file does not hold its text, so the memory alone is asked", file=sys.stderr)
        return None
    from fastmem_pl.answering import context_room

    # Of the loop, no question is known yet.
    longest = max(questions, key=len, default=50 * " word")
    room = context_room(backbone, longest, options.decoder, settings, options.answer_prefix)
    shown, _, cut = backbone.chat.cut(text, max(room, 1))
    if cut and options.with_context is None:
        print(
            f"fastmem: the text does not fit the model's {backbone.context_length} tokens, so the memory "
            "alone is asked (--with-context shows its beginning)",
            file=sys.stderr,
        )
        return None
    if cut:
        print(f"fastmem: the last {cut} tokens of the text do not fit and are not shown", file=sys.stderr)
    return shown


def _read_questions(path: str) -> list[str]:
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
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


def _answer_file(asker: Asker, questions: list[str], as_json: bool) -> int:
    """Answer in batches, printed as each is done."""
    from tqdm import tqdm

    with tqdm(total=len(questions), desc="answering", unit="question", disable=None) as bar:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            for question, text in zip(batch, asker.together(batch), strict=True):
                print(asker.record(question, text) if as_json else f"Q: {question}\n{text}\n", flush=True)
            bar.update(len(batch))
    return 0


def _show(asker: Asker, question: str, with_question: bool, as_json: bool) -> None:
    if as_json:
        print(asker.record(question, "".join(asker.stream(question))), flush=True)
        return
    if with_question:
        print(f"Q: {question}")
    for piece in asker.stream(question):
        print(piece, end="", flush=True)
    print("\n" if with_question else "", flush=True)


def _loop(asker: Asker, as_json: bool) -> int:
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
        except EOFError:
            return 0
        if not question:
            if interactive:
                return 0
            continue
        try:
            _show(asker, question, not interactive, as_json)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except FastMemError as error:
            # A question that is too long, say: the next may not be.
            if not interactive:
                raise
            print(f"fastmem: {error}", file=sys.stderr)
