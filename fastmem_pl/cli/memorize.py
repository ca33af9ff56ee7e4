"""``fastmem memorize``: a text becomes a memory file."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import check_target, free_name
from fastmem_pl.cli.model import ModelOptions, read_text
from fastmem_pl.export.deviation import relative_error
from fastmem_pl.memory import DocumentFit, MemorizationSettings, Memorizer, Memory, WindowSettings
from fastmem_pl.memory.advice import warn_of_base_model

# Seconds between lines of progress where there is no terminal for a bar.
_LINE_EVERY = 30


def memorize(
    files: list[str],
    *,
    out: str | None = None,
    force: bool = False,
    form: Literal["float32", "bfloat16", "int8"] = "bfloat16",
    no_text: bool = False,
    quiet: bool = False,
    windows: str = "joint",
    window: int | None = None,
    overlap: int | None = None,
    settings: MemorizationSettings = MemorizationSettings(),  # noqa: B008 (frozen)
    options: ModelOptions = ModelOptions(),  # noqa: B008
) -> int:
    """Memorize a text: fit the last feed-forward network to it and keep the change as a file.

      fastmem memorize notes.txt                          writes notes.fastmem
      fastmem ask notes.fastmem "Who wrote the notes?"    asks about it

    A text that is longer than a window is cut into overlapping windows (--windows):
      joint       every update is on all windows, the loss averaged over all tokens (default)
      sequential  one window after the other, each with all updates, going on from the memory so far
      cut         the first window only, as the paper does

    Args:
        files: UTF-8 text, "-" for standard input; several make one memory.
        out: file to write (default: FILE's name, here).
        force: replace an existing file.
        form: how the numbers are stored; int8 takes half of bfloat16.
        no_text: leave the text out of the file; ask then cannot show it to the model.
        quiet: print no progress and no summary.
        windows: joint, sequential or cut.
        window: most tokens of the text in a window.
        overlap: tokens repeated without loss (default: window / 8).
        settings: how the text is memorized; the config's by default.
        options: the model.
    """
    if not files:
        raise FastMemError("memorize: give a FILE, or - for standard input; see fastmem memorize --help")
    target = Path(out or f"{'memory' if files[0] == '-' else Path(files[0]).stem}.fastmem")
    check_target(target, force)
    if target.exists() and any(p != "-" and target.samefile(p) for p in files if Path(p).exists()):
        raise FastMemError(f"--out: {target} is the text itself; give another")
    texts = [read_text(path) for path in files]
    if not settings.steps:
        raise FastMemError("steps: 0 memorizes nothing; allowed: at least 1")
    cutting = WindowSettings(windows, window, overlap)
    memorizer = Memorizer(options.load(settings.num_layers, settings.experts, settings.max_experts), settings)
    warn_of_base_model(memorizer.backbone)
    start = time.perf_counter()
    fit = DocumentFit(memorizer, texts, cutting)
    left_out = sum(part.truncated for part in fit.encoded)
    if left_out:
        print(f"fastmem: {left_out} tokens of the text are left out (--windows cut)", file=sys.stderr)
    # From the first update on, Ctrl-C is held off until the file is whole.
    with _interruptible(fit) as interrupts:
        stopped = _fit(fit, interrupts, quiet)
        memory = fit.memory()
        if memory.status[0] != "ok":
            raise FastMemError(
                f"{target} is not written: {memory.status[0].split(';')[0]}; lower --learning-rate"
            )
        if not force:
            # Somebody else may have written that name meanwhile.
            target = free_name(target)
        memory.save(target, form=form, text=not no_text)
    if not quiet:
        _print_summary(fit, memory, target, form, time.perf_counter() - start)
    if stopped:
        print(f"fastmem: stopped; {target} holds the updates so far", file=sys.stderr)
    return 130 if stopped else 0


def _fit(fit: DocumentFit, interrupts: list[int], quiet: bool) -> bool:
    """Take all updates; returns whether the user stopped after at least one."""
    last = time.perf_counter()
    with tqdm(total=fit.num_updates, desc="memorizing", unit="update", disable=quiet or None) as bar:
        for done in fit.run():
            bar.update(done - bar.n)
            if bar.disable and not quiet and time.perf_counter() - last > _LINE_EVERY:
                # A log has no use for a bar.
                last = time.perf_counter()
                print(f"fastmem: {done} of {fit.num_updates} updates", file=sys.stderr, flush=True)
            if interrupts and done < fit.num_updates:
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

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _print_summary(fit: DocumentFit, memory: Memory, out: Path, form: str, seconds: float) -> None:
    curve, windows = memory.curve, memory.windows
    policy = "" if windows["count"] == 1 else f" in {windows['count']} windows ({windows['policy']})"
    print(f"{out}: {out.stat().st_size:,} bytes, {form}")
    print(f"{fit.num_tokens} tokens{policy}, {len(curve.cross_entropy)} updates, {seconds:.1f} s")
    if curve.cross_entropy:
        print(
            f"cross-entropy {curve.cross_entropy[0]:.3f} -> {curve.cross_entropy[-1]:.3f}, KL "
            f"{curve.kl[-1]:.4f} (nats a token, before the last update)"
        )
    if form != "float32":
        error = relative_error(memory.deltas, Memory.load(out).deltas)
        print(f"{form} changes the memory by {error:.2%} (relative error of the deltas)")
    print(f'ask it: fastmem ask {out} "..."')
