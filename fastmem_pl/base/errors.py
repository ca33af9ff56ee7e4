"""Errors that a user can act on, and the near-name suggestions in them."""

import difflib
from collections.abc import Iterable


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
    """A scheduler asked the run to end with SIGTERM, and it ended after its batch."""

    exit_status = 143  # 128 + SIGTERM


class FailedElsewhereError(RunStoppedError):
    """Another process of the run failed, and says why itself."""


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
