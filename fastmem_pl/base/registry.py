"""A named collection that suggests the nearest name when one is not found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from fastmem_pl.base.errors import FastMemError, unknown

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to objects; ``field`` is the setting that holds such a name.

    >>> colors = Registry("model.color")
    >>> colors.register("red", 1)
    1
    >>> colors["rad"]
    Traceback (most recent call last):
    fastmem_pl.base.errors.FastMemError: model.color: 'rad' is unknown; allowed: red; did you mean 'red'?
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name``.

        Raises:
            FastMemError: when the name is taken.
        """
        if name in self._items:
            raise FastMemError(f"{self.field}: {name!r} is registered already")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise unknown(self.field, name, self._items) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
