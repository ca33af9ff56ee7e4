"""Progress within a batch: loops report their steps, and whoever shows progress watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Watcher = Callable[[str, int, int], None]
_watchers: list[Watcher] = []


def report(what: str, done: int, total: int) -> None:
    """Report ``done`` of ``total`` steps, where ``what`` says in a word what they do."""
    for watcher in _watchers:
        watcher(what, done, total)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let a function get all reports meanwhile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
