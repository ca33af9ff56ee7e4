"""``fastmem ask``: questions to a memory file, answered as they come."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli.asker import Asker
from fastmem_pl.cli.options import (
    CommandParser,
    add_model_options,
    check_exists,
    load_backbone,
    model_settings,
    pick,
    read_text,
)

if TYPE_CHECKING:
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
    check_exists(options.memory)
    settings = model_settings(options)
    decoding = _decoding_settings(options, settings)

    from fastmem_pl.memory import Memory, read_header, trained_layers

    backbone = load_backbone(settings, trained_layers(read_header(options.memory)))
    memory = Memory.load(options.memory, backbone, backbone.device).to(backbone.compute_dtype)
    _warn(memory)
    used = None if options.no_memory else memory
    context = None if options.with_context is False else memory.texts[0]
    asker = Asker(backbone, used, context, options.decoder, decoding, options.answer_prefix)
    if options.with_context is not False and not _shows(asker, options, memory.texts[0], asked or from_file):
        asker = Asker(backbone, used, None, options.decoder, decoding, options.answer_prefix)
    if from_file:
        return _answer_file(asker, from_file, options.json)
    if asked:
        for question in asked:
            _show(asker, question, len(asked) > 1, options.json)
        return 0
    return _loop(asker, options.json)


def _parser() -> CommandParser:
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
    group.add_argument("--alpha", type=float, help="strength of cd and cad (default: 0.5)")
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
    """The settings of decoding; refuses options that would be of no account."""
    from fastmem_pl.decoding import DECODERS, DecodingSettings

    DECODERS[options.decoder]
    if options.decoder == "cd" and options.no_memory:
        raise FastMemError("--decoder: cd contrasts a memory with the base model; leave --no-memory out")
    if options.decoder == "cad" and options.with_context is False:
        raise FastMemError("--decoder: cad contrasts with and without the text; leave --without-context out")
    decoding = pick(DecodingSettings, settings)
    draws = decoding.temperature > 0
    for name, needed, applies in (
        ("alpha", "--decoder cd or cad", options.decoder in ("cd", "cad")),
        ("top_p", "--temperature above 0", draws),
        ("top_k", "--temperature above 0", draws),
        ("seed", "--temperature above 0", draws),
    ):
        if getattr(options, name) is not None and not applies:
            raise FastMemError(f"--{name.replace('_', '-')}: is of no account without {needed}; leave it out")
    return decoding


def _warn(memory: Memory) -> None:
    """Say what is wrong with a memory that can be asked all the same."""
    if memory.status[0] != "ok":
        print(f"fastmem: memorizing {memory.status[0].split(';')[0]}: it is the base model", file=sys.stderr)
    windows = memory.windows
    if windows and windows["updates"] < windows["planned"]:
        done = f"{windows['updates']} of {windows['planned']} updates"
        print(f"fastmem: memorizing was stopped after {done}", file=sys.stderr)


def _shows(asker: Asker, options: argparse.Namespace, text: str | None, questions: list[str]) -> bool:
    """Whether the text is to be shown; says why not, or what of it is not."""
    if text is None:
        if options.with_context or options.decoder == "cad":
            wanted = "--with-context" if options.with_context else f"--decoder {options.decoder}"
            raise FastMemError(
                f"{wanted}: {options.memory} does not hold its text (memorize --no-text); leave it out"
            )
        print("fastmem: the file does not hold its text, so the memory alone is asked", file=sys.stderr)
        return False
    # Of the loop, no question is known yet.
    cut = asker.tokens_cut(questions or [50 * " word"])
    if not cut:
        return True
    if options.with_context or options.decoder == "cad":
        print(f"fastmem: the last {cut} tokens of the text do not fit and are not shown", file=sys.stderr)
        return True
    print(
        "fastmem: the text does not fit the model's context, so the memory alone is asked (--with-context "
        "shows its beginning)",
        file=sys.stderr,
    )
    return False


def _read_questions(path: str) -> list[str]:
    from fastmem_pl.data.tasks import FieldError, check_characters

    questions = []
    # Other ends of lines, such as U+2028, may stand within a question.
    for number, line in enumerate(read_text(path, "questions, one a line").split("\n"), 1):
        question = line.strip()
        if question.startswith("{"):
            try:
                question = json.loads(question)["question"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise FastMemError(f'{path}, line {number}: no JSON object with a text "question"') from None
            try:
                check_characters("question", question)
            except FieldError as error:
                raise FastMemError(f"{path}, line {number}: {error}") from None
            if not question:
                raise FastMemError(f'{path}, line {number}: "question" is empty')
        if question:
            questions.append(question)
    return questions


def _answer_file(asker: Asker, questions: list[str], as_json: bool) -> int:
    """Answer in batches, printed as each is done."""
    from tqdm import tqdm

    size = 1 if asker.reads_once else _BATCH
    with tqdm(total=len(questions), desc="answering", unit="question", disable=None) as bar:
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            texts = ["".join(asker.stream(batch[0]))] if size == 1 else asker.together(batch)
            for question, text in zip(batch, texts, strict=True):
                shown = f"Q: {question}\n{_printable(text)}\n"
                print(asker.record(question, text) if as_json else shown, flush=True)
            bar.update(len(batch))
    return 0


def _show(asker: Asker, question: str, with_question: bool, as_json: bool) -> None:
    if as_json:
        print(asker.record(question, "".join(asker.stream(question))), flush=True)
        return
    if with_question:
        print(f"Q: {question}")
    for piece in asker.stream(question):
        print(_printable(piece), end="", flush=True)
    print("\n" if with_question else "", flush=True)


def _printable(text: str) -> str:
    """A text without what a terminal would act on: a stranger's memory may say anything."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


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
            question.encode()
        except EOFError:
            return 0
        except UnicodeError:
            raise FastMemError("cannot read a question: standard input is no UTF-8 text") from None
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
