"""A named collection that suggests the nearest name when one is not found."""

from typing import Generic, NoReturn, TypeVar

from fastmem_pl.base.errors import FastMemError, unknown

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Maps names to objects; ``field`` is the setting that holds such a name.

    >>> colors = Registry("model.color")
    >>> colors.register("red", 1)
    1
    >>> colors["rad"]
    Traceback (most recent call last):
    fastmem_pl.base.errors.FastMemError: model.color: 'rad' is unknown; allowed: red; did you mean 'red'?
    """

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name``.

        Raises:
            FastMemError: when the name is taken.
        """
        if name in self:
            raise FastMemError(f"{self.field}: {name!r} is registered already")
        self[name] = item
        return item

    def __missing__(self, name: str) -> NoReturn:
        raise unknown(self.field, name, self)
