"""Reference page of what ``import fastmem_pl`` offers, from signatures and docstrings."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import docstring_parser


def page() -> str:
    """The whole page."""
    import fastmem_pl

    parts = [
        "# Python",
        "What `fastmem_pl` exports. Everything else may change without notice, but for the parts that "
        "[Extending](../extending.md) names. The signatures show the defaults.",
    ]
    exports = {name: getattr(fastmem_pl, name) for name in fastmem_pl.__all__}
    for title, test, make in (
        ("Classes", inspect.isclass, _class),
        ("Functions", inspect.isroutine, _function),
    ):
        parts.append(f"## {title}")
        for name, item in exports.items():
            if test(item):
                parts += [f"### `{name}` {{ #{name} }}", *make(name, item)]
    return "\n\n".join(parts) + "\n"


def _class(name: str, item: type) -> list[str]:
    parts = [] if issubclass(item, Exception) else [_signature(name, item)]
    parts += _documentation(item)
    for member, raw in sorted(vars(item).items()):
        text = None if member.startswith("_") else _member(f"{name}.{member}", raw)
        if text:
            parts += [f"#### `{name}.{member}` {{ #{name}.{member} }}", *text]
    return parts


def _member(name: str, raw: Any) -> list[str] | None:
    """A documented method or property; ``None`` for anything else."""
    if isinstance(raw, (property, functools.cached_property)):
        what = raw.fget if isinstance(raw, property) else raw.func
        return ["property\n{ .facts }", *_documentation(what)] if inspect.getdoc(what) else None
    function = getattr(raw, "__func__", raw)
    if not (inspect.isfunction(function) and inspect.getdoc(function)):
        return None
    # The first parameter is the object or its class.
    return _function(name, function, bound=not isinstance(raw, staticmethod))


def _function(name: str, item: Any, bound: bool = False) -> list[str]:
    return [_signature(name, item, bound), *_documentation(item)]


def _signature(name: str, item: Any, bound: bool = False) -> str:
    """The signature as code, a parameter a line where it is long."""
    signature = inspect.signature(item)
    values = list(signature.parameters.values())[bound:]
    texts: list[str] = []
    for value in values:
        if value.kind is value.KEYWORD_ONLY and not any(text.startswith("*") for text in texts):
            texts.append("*")
        texts.append(_parameter(value))
    returns = signature.return_annotation
    arrow = "" if inspect.isclass(item) or returns is signature.empty else f" -> {_annotation(returns)}"
    line = f"{name}({', '.join(texts)}){arrow}"
    if len(line) > 88:
        line = f"{name}(\n{''.join(f'    {text},' + chr(10) for text in texts)}){arrow}"
    return f"```python\n{line}\n```"


def _parameter(value: inspect.Parameter) -> str:
    stars = {value.VAR_POSITIONAL: "*", value.VAR_KEYWORD: "**"}.get(value.kind, "")
    kind = "" if value.annotation is value.empty else f": {_annotation(value.annotation)}"
    if value.default is value.empty:
        return f"{stars}{value.name}{kind}"
    # Dataclasses show a default that is made anew as an object of their own.
    default = "..." if "factory" in repr(value.default) else repr(value.default)
    return f"{value.name}{kind} = {default}" if kind else f"{value.name}={default}"


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def _documentation(item: Any) -> list[str]:
    doc = docstring_parser.parse(inspect.getdoc(item) or "", docstring_parser.DocstringStyle.GOOGLE)
    texts = [doc.short_description, doc.long_description]
    parts = [markdown(text) for text in texts if text]
    for title, kind in (("Arguments", "param"), ("Attributes", "attribute")):
        entries = [p for p in doc.params if p.args[0] == kind]
        if entries:
            parts.append(f"**{title}**")
            parts.append("\n".join(f"`{p.arg_name}`\n:   {_entry(p.description)}\n" for p in entries))
    if doc.returns and doc.returns.args[0] in ("returns", "return", "yields"):
        parts.append(f"**Returns** {_typed(doc.returns)}")
    parts += [f"**Raises** `{error.type_name}` {_entry(error.description)}" for error in doc.raises]
    return parts


def _typed(returns: Any) -> str:
    # The parser takes what stands before a colon for a type.
    text = f"{returns.type_name}: {returns.description}" if returns.type_name else returns.description
    return _entry(text)


def _entry(text: str | None) -> str:
    return markdown(" ".join((text or "").split()))


def parameters(item: Any) -> dict[str, str]:
    """Texts of an object's documented arguments, by name, as Markdown."""
    doc = docstring_parser.parse(inspect.getdoc(item) or "", docstring_parser.DocstringStyle.GOOGLE)
    texts = {p.arg_name: _entry(p.description) for p in doc.params}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def markdown(text: str) -> str:
    """Docstring markup as Markdown: roles, literals, doctests."""
    text = re.sub(r":\w+:`(~?)([^`]+)`", lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"((?:^>>> .*\n?(?:^(?!$).*\n?)*)+)", r"```pycon\n\1\n```\n", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    # Angle brackets outside code would be taken for HTML.
    return re.sub(
        r"(```.*?```|`[^`\n]*`)|<(?=\w)", lambda m: m[1] or "&lt;", text, flags=re.DOTALL | re.MULTILINE
    )
