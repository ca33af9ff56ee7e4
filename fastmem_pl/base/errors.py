"""Errors that a user can act on, and the near-name suggestions in them."""

import difflib
import re
import sys
from collections.abc import Iterable
from contextlib import suppress


class FastMemError(ValueError):
    """A mistake or a condition that the user can mend: one line that says what and how.

    The command line prints the message without a traceback and exits with ``exit_status``.
    """

    exit_status = 2


class OutOfMemoryError(FastMemError):
    """The device had no room for one sample; the message says which setting to lower."""


class RunStoppedError(FastMemError):
    """A run ended before it was done, by no fault of its settings: the same command goes on."""

    exit_status = 75  # EX_TEMPFAIL: worth another try


class TerminatedError(RunStoppedError):
    """A signal asked the run to end, and it ended after its batch; the status is 128 and its number."""

    exit_status = 143


class FailedElsewhereError(RunStoppedError):
    """Another process of the run failed, and says why itself."""


# Control characters but tab and newline, changes of direction, halves of characters.
_ACTED_ON = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object) -> str:
    """Text as it may go to a terminal, without what the terminal would act on."""
    return _ACTED_ON.sub("\ufffd", str(text))


def say(message: object) -> None:
    """Print a message of the command in one line, where anybody listens."""
    with suppress(OSError, ValueError):
        print(f"fastmem: {' '.join(shown(message).split())}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed name, or an empty string.

    >>> nearest("nqswop", ["nqswap", "nq"])
    "; did you mean 'nqswap'?"
    >>> nearest("zzz", ["nqswap", "nq"])
    ''
    """
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[match[0]]}'?" if match else ""


def unknown(field: str, value: object, allowed: Iterable[str]) -> FastMemError:
    """Build the error for a name that is not among ``allowed``.

    >>> print(unknown("data.task", "nqswop", ["nqswap", "nq"]))
    data.task: 'nqswop' is unknown; allowed: nq, nqswap; did you mean 'nqswap'?
    """
    names = sorted(allowed)
    return FastMemError(
        f"{field}: {value!r} is unknown; allowed: {', '.join(names)}{nearest(str(value), names)}"
    )
