"""``fastmem ask``: questions to a memory file, answered as they come."""

import json as json_format
import re
import sys
from collections.abc import Iterable
from contextlib import suppress

from tqdm import tqdm

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.cli.model import ModelOptions, read_text
from fastmem_pl.data.tasks import RawRecord
from fastmem_pl.decoding import DECODERS, DecodingSettings
from fastmem_pl.decoding.conversation import Conversation
from fastmem_pl.memory import Memory, read_header, trained_part


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
        decoder: greedy, cd or adacd (memorized against base), cad, adacad, coiecd, cocoa or ck-plug (with
            against without context), or dola (last against premature layer).
        answer_prefix: text that opens every answer.
        decode: how answers are decoded.
        options: the model.
    """
    asked = [text.strip() for text in question]
    if not all(asked):
        raise FastMemError("a question is empty; give one in quotes")
    made_by = DECODERS[decoder]
    two_prompts = getattr(made_by, "needs_without_context", False)
    for one, other, both in (
        ("questions", "--questions FILE", questions and asked),
        ("--with-context", "--without-context", with_context and without_context),
        (f"--decoder {decoder}", "--no-memory", getattr(made_by, "needs_base", False) and no_memory),
        (f"--decoder {decoder}", "--without-context", two_prompts and without_context),
    ):
        if both:
            raise FastMemError(f"{one}: not with {other}; leave one out")
    from_file = _read_questions(questions) if questions else []
    backbone = options.load(**trained_part(read_header(memory)))
    loaded = Memory.load(memory, backbone, backbone.device).to(backbone.compute_dtype)
    if loaded.status[0] != "ok":
        _say(f"memorizing {loaded.status[0].split(';')[0]}: it is the base model")
    windows = loaded.windows
    if windows and windows["updates"] < windows["planned"]:
        _say(f"memorizing was stopped after {windows['updates']} of {windows['planned']} updates")
    text = None if without_context else loaded.texts[0]
    talk = Conversation(backbone, None if no_memory else loaded, text, decoder, decode, answer_prefix)
    if not without_context:
        # An option that needs the text, if one was given.
        wanted = "--with-context" if with_context else f"--decoder {decoder}" if two_prompts else ""
        if text is None and wanted:
            raise FastMemError(f"{wanted}: {memory} holds no text (memorize --no-text); leave it out")
        # In the loop, no question is known yet.
        cut = talk.fitting(asked or from_file or [50 * " word"])[1]
        if cut and wanted:
            _say(f"the last {cut} tokens of the text do not fit and are not shown")
        elif cut:
            talk.context = None
            _say("the text does not fit, so the memory alone is asked (--with-context shows its beginning)")
        elif text is None:
            _say("the file holds no text, so the memory alone is asked")
    if from_file:
        answers = tqdm(talk.answers(from_file), "answering", len(from_file), unit="question", disable=None)
        for one, answered in zip(from_file, answers, strict=True):
            _show(talk, one, [answered], True, json)
    for one in asked:
        _show(talk, one, talk.stream(one), len(asked) > 1, json)
    if not from_file and not asked:
        _loop(talk, json)


def _say(notice: str) -> None:
    print(f"fastmem: {notice}", file=sys.stderr)


def _show(
    talk: Conversation, question: str, pieces: Iterable[str], with_question: bool, as_json: bool
) -> None:
    """Print one answer as its tokens come, or its record."""
    if as_json:
        record = {"question": question, "answer": "".join(pieces), "decoder": talk.decoder}
        record |= {"context": talk.context is not None, "memory": talk.memory is not None}
        print(json_format.dumps(record, ensure_ascii=False), flush=True)
        return
    if with_question:
        print(f"Q: {question}")
    for piece in pieces:
        # A stranger's memory may say anything: nothing that a terminal would act on.
        shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", piece) if sys.stdout.isatty() else piece
        print(shown, end="", flush=True)
    print("\n" if with_question else "", flush=True)


def _loop(talk: Conversation, as_json: bool) -> None:
    """Ask until the input ends; at a terminal, Ctrl-C breaks an answer off and an empty line ends."""
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
                _show(talk, question, talk.stream(question), not interactive, as_json)
        except (KeyboardInterrupt, FastMemError) as error:
            # A question that is too long, say: the next may not be.
            if not interactive:
                raise
            print(f"\nfastmem: {error or 'stopped'}", file=sys.stderr)


def _read_questions(path: str) -> list[str]:
    questions = [line.strip() for line in read_text(path, "questions, one a line").split("\n")]
    for number, question in enumerate(questions):
        if question.startswith("{"):
            try:
                questions[number] = RawRecord(json_format.loads(question)).text("question").strip()
            except ValueError as error:
                raise FastMemError(f"{path}, line {number + 1}: {error}") from None
    return list(filter(None, questions))
