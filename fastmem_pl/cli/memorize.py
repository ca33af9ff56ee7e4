"""``fastmem memorize``: a text becomes a memory file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import check_target, free_name
from fastmem_pl.cli.options import (
    CommandParser,
    add_model_options,
    load_backbone,
    model_settings,
    pick,
    read_text,
)

if TYPE_CHECKING:
    from fastmem_pl.memory import DocumentFit, Memory

DESCRIPTION = """\
Memorize a text: fit the last feed-forward network to it and keep the change as a file.

  fastmem memorize notes.txt                          writes notes.fastmem
  fastmem ask notes.fastmem "Who wrote the notes?"    asks about it

A text that is longer than a window is cut into overlapping windows (--windows):
  joint       every update is on all windows, the loss averaged over all tokens (default)
  sequential  one window after the other, each with all updates, going on from the memory so far
  cut         the first window only, as the paper does
"""
# Seconds between lines that say how far it is, where there is no terminal for a bar.
_LINE_EVERY = 30


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for a mistake.
    """
    options = _parser().parse(arguments)
    if options.windows == "cut" and options.overlap is not None:
        raise FastMemError("--overlap: is of no account with --windows cut; leave it out")
    out = Path(options.out or _default_out(options.files[0]))
    check_target(out, options.force)
    if out.exists() and any(
        path != "-" and out.samefile(path) for path in options.files if Path(path).exists()
    ):
        raise FastMemError(f"--out: {out} is the text itself; give another")
    texts = [read_text(path) for path in options.files]
    settings = model_settings(options)

    from fastmem_pl.memory import DocumentFit, MemorizationSettings, Memorizer, WindowSettings

    memorization = pick(MemorizationSettings, settings)
    if not memorization.steps:
        raise FastMemError("steps: 0 memorizes nothing; allowed: at least 1")
    windows = WindowSettings(options.windows, options.window, options.overlap)
    backbone = load_backbone(settings, memorization.num_layers)
    start = time.perf_counter()
    fit = DocumentFit(Memorizer(backbone, memorization), texts, windows)
    left_out = sum(part.truncated for part in fit.encoded)
    if left_out:
        print(f"fastmem: {left_out} tokens of the text are left out (--windows cut)", file=sys.stderr)
    if not options.quiet:
        windows_ = "" if len(fit.encoded) == 1 else f" in {len(fit.encoded)} windows ({options.windows})"
        print(f"fastmem: {fit.num_tokens} tokens{windows_}, {fit.num_updates} updates", file=sys.stderr)
    # From the first update on, Ctrl-C is held off until the file is whole.
    with _interruptible(fit) as seen:
        stopped = _fit(fit, seen, options.quiet)
        memory = fit.memory()
        if memory.status[0] != "ok":
            raise FastMemError(
                f"{out} is not written: {memory.status[0].split(';')[0]}; lower --learning-rate"
            )
        if not options.force:
            # What came there meanwhile is somebody's.
            out = free_name(out)
        memory.save(out, form=options.form, text=options.text)
    if not options.quiet:
        for line in _summary(fit, memory, out, options.form, time.perf_counter() - start):
            print(line)
    if stopped:
        print(f"fastmem: stopped; {out} holds the updates so far", file=sys.stderr)
    return 130 if stopped else 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="fastmem memorize", description=DESCRIPTION)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help='UTF-8 text, "-" for standard input; several: one memory',
    )
    parser.add_argument("--out", metavar="PATH", help="file to write (default: FILE's name, here)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--form",
        default="bfloat16",
        choices=("float32", "bfloat16", "int8"),
        help="how the numbers are stored (default: bfloat16; int8 halves it again)",
    )
    parser.add_argument(
        "--no-text",
        dest="text",
        action="store_false",
        help="leave the text out of the file; ask then cannot show it to the model",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress and no summary")
    group = parser.add_argument_group("windows")
    group.add_argument(
        "--windows", default="joint", metavar="POLICY", help="joint (default), sequential or cut"
    )
    group.add_argument("--window", type=int, metavar="N", help="most tokens of the text in a window")
    group.add_argument(
        "--overlap", type=int, metavar="N", help="tokens repeated without loss (default: window / 8)"
    )
    group = parser.add_argument_group("memorizing (defaults come from the config)")
    group.add_argument("--steps", type=int, metavar="N", help="updates")
    group.add_argument("--learning-rate", type=float, metavar="X", help="of AdamW, constant")
    group.add_argument(
        "--kl-coeff", type=float, metavar="X", help="weight of the KL that holds the model near itself"
    )
    group.add_argument("--kl-target", type=float, metavar="X", help="adapt that weight to reach this KL")
    group.add_argument("--num-layers", type=int, metavar="N", help="train the FFNs of this many last blocks")
    group.add_argument(
        "--weight-decay", type=float, metavar="X", help="decoupled decay of the trained weights"
    )
    group.add_argument("--max-grad-norm", type=float, metavar="X", help="bound of the gradient's norm")
    add_model_options(parser)
    return parser


def _default_out(first: str) -> str:
    return f"{'memory' if first == '-' else Path(first).stem}.fastmem"


def _fit(fit: DocumentFit, seen: list[int], quiet: bool) -> bool:
    """Take all updates; returns whether the user stopped after at least one."""
    from tqdm import tqdm

    said = time.perf_counter()
    with tqdm(total=fit.num_updates, desc="memorizing", unit="update", disable=quiet or None) as bar:
        for done in fit.run():
            bar.update(done - bar.n)
            if bar.disable and not quiet and time.perf_counter() - said > _LINE_EVERY:
                # A log has no use for a bar.
                said = time.perf_counter()
                print(f"fastmem: {done} of {fit.num_updates} updates", file=sys.stderr, flush=True)
            if seen and done < fit.num_updates:
                return True
    return False


@contextmanager
def _interruptible(fit: DocumentFit) -> Iterator[list[int]]:
    """Let the update in progress end at the first Ctrl-C, which the list then holds; a second one raises, as
    does the first where there is no update to keep yet.
    """
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen or not fit.num_done:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nfastmem: stopping after this update; Ctrl-C again stops at once", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        # Signals are the main thread's.
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(fit: DocumentFit, memory: Memory, out: Path, form: str, seconds: float) -> list[str]:
    from fastmem_pl.export.deviation import relative_error
    from fastmem_pl.memory import Memory

    curve, windows = memory.curve, memory.windows
    policy = "" if windows["count"] == 1 else f" in {windows['count']} windows ({windows['policy']})"
    lines = [f"{out}: {out.stat().st_size:,} bytes, {form}"]
    lines.append(f"{fit.num_tokens} tokens{policy}, {len(curve.cross_entropy)} updates, {seconds:.1f} s")
    if curve.cross_entropy:
        lines.append(
            f"cross-entropy {curve.cross_entropy[0]:.3f} -> {curve.cross_entropy[-1]:.3f}, KL "
            f"{curve.kl[-1]:.4f} (nats a token, before the last update)"
        )
    if form != "float32":
        error = relative_error(memory.deltas, Memory.load(out).deltas)
        lines.append(f"{form} changes the memory by {error:.2%} (relative error of the deltas)")
    lines.append(f'ask it: fastmem ask {out} "..."')
    return lines
