"""What the results of a run depend on, compared between two runs: nested settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], optional: Collection[str]) -> list[str]:
    """List ``name: there X, here Y`` of every setting that differs; a raised limit is no difference."""
    there, here = flatten(found), flatten(wanted)
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name in optional and not (name in there and name in here):
            continue
        old, new = there.get(name), here.get(name)
        grown = name == "data.limit" and old is not None and (new is None or new >= old)
        if old != new and not grown:
            if name == "data.file_hash":
                lines.append("data.path: another file, or its content has changed")
            elif name == "data.limit":
                lines.append(f"{name}: there {old or 'all'}, here {new or 'all'}; it may be raised")
            else:
                lines.append(f"{name}: there {old!r}, here {new!r}")
    return lines


def merged(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Wanted settings, and those that only the earlier run stated."""
    merged = {key: dict(value) for key, value in found.items()}
    for key, value in wanted.items():
        merged.setdefault(key, {}).update(value)
    return merged


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
