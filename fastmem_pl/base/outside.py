"""The one door for what comes from outside: files are read, parsed and held against a schema here.

Whatever is wrong with them, the error is one line that names file, place, what was found and what is allowed.
"""

import json
import re
import stat
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar

import msgspec
import yaml

from fastmem_pl.base.errors import FastMemError, one_line

T = TypeVar("T")

# No settings that anybody wrote are larger; aliases make some out of a few lines that are without end.
_MOST_VALUES, _DEEPEST = 20_000, 50
_HALF = re.compile("[\ud800-\udfff]")
# How msgspec names JSON's types, in Python's words.
_WORDS = {"object": "a mapping", "array": "a list", "str": "text", "null": "nothing", "bool": "true or false"}


class _Loader(yaml.SafeLoader):
    """YAML as configs have it: 1e-4 is a number, for PyYAML alone a text, and a date is a text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_bytes(path: str | Path, pipe: bool = False) -> bytes:
    """Content of a file, or of a ``pipe`` where one will do: others wait for somebody to write to it."""
    path = Path(path) if isinstance(path, str) else path
    try:
        if not pipe:
            require_file(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        # A ValueError where there is a NUL in the name.
        raise FastMemError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def require_file(path: Path) -> None:
    """Raise an ``OSError`` for a pipe or a device: nobody may ever write to it, or end."""
    kind = path.stat().st_mode if isinstance(path, Path) else stat.S_IFREG
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(None, "it is a pipe or a device; give a file")


def as_text(content: bytes, name: object) -> str:
    """Content of a file as text."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastMemError(
            f"cannot read {name}: it is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def parse_json(text: str | bytes, name: object) -> Any:
    """The value of JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FastMemError(f"{name}: not valid JSON: {one_line(error)}") from None


def parse_yaml(text: str, name: object) -> Any:
    """The value of YAML that JSON could hold as well, of a size that people write."""
    depth = 0
    try:
        # Event by event first: what is nested deeply would take seconds to compose.
        for event in yaml.parse(text, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"it is nested over {_DEEPEST} levels deep")
        value = yaml.load(text, _Loader)  # a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FastMemError(f"cannot read {name}: {one_line(error)}") from None
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if isinstance(one, (dict, list)):
            waiting += [*one, *one.values()] if isinstance(one, dict) else one
        if seen > _MOST_VALUES:
            wrong = f"over {_MOST_VALUES} values, aliases counted"
        elif isinstance(one, str) and _HALF.search(one):
            wrong = "half of a character (a lone surrogate)"
        elif not isinstance(one, (dict, list, str, int, float, NoneType)):
            wrong = f"a value of type {type(one).__name__}"
        elif isinstance(one, int) and abs(one) >> 64:
            wrong = "a number of over 20 digits"
        else:
            continue
        raise FastMemError(f"cannot read {name}: it holds {wrong}; allowed: settings as people write them")
    return value


def fit(value: Any, schema: type[T], name: object) -> T:
    """The value as the schema's type; an error says where it does not fit."""
    try:
        return msgspec.convert(value, schema)
    except UnicodeEncodeError:
        raise FastMemError(f"{name}: it holds half of a character (a lone surrogate)") from None
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at ")
        said = re.sub("`(.*?)`", lambda m: " or ".join(_WORDS.get(w, w) for w in m[1].split(" | ")), said)
        said = re.sub("matching regex .*", "of another form", said)
        place = place.strip("`").replace("$.", "").replace("$", "the whole")
        said = f"{said[:1].lower()}{said[1:]}".replace(", got ", ", found ")
        raise FastMemError(f"{name}: {place + ': ' if place else ''}{said}") from error


def read_json(path: str | Path, schema: type[T]) -> T:
    """What a JSON file holds, as the schema's type."""
    return fit(parse_json(as_text(read_bytes(path), path), path), schema, path)
