"""The header of a memory file: every value checked before anything believes or shows it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastmem_pl.memory.settings import POLICIES, MemorizationSettings

_CURVE = {"cross_entropy", "kl", "grad_norm", "kl_coeff"}
_MOST_SHOWN = 300
_NUMBERS = (float, int, type(None))


def checked(header: Mapping[str, str]) -> dict[str, Any]:
    """The values of a header.

    Returns:
        ``fingerprint``, ``form``, ``status``, ``backbone``, ``settings``, ``curve``, ``windows``, ``text``
        and ``context_hash``; ``None`` for what the header may lack.

    Raises:
        ValueError: saying what a memory's header would not hold.
    """
    for name in ("fingerprint", "settings", "curve", "status"):
        if name not in header:
            raise ValueError(f"its header lacks {name!r}")
    if not re.fullmatch(r"[0-9a-f]{8,64}", header["fingerprint"]):
        raise ValueError("its fingerprint is none")
    values: dict[str, Any] = {name: header.get(name) for name in ("fingerprint", "text", "context_hash")}
    for name, default in (("status", "ok"), ("backbone", ""), ("form", "float32")):
        values[name] = header.get(name, default)
        # These are shown to people: one line, and nothing that a terminal would act on.
        if not (values[name].isprintable() and len(values[name]) <= _MOST_SHOWN):
            raise ValueError(f"its {name} is no short line of text")
    values["settings"] = _settings(_parsed(header, "settings"))
    values["curve"] = _curve(_parsed(header, "curve"))
    values["windows"] = _windows(_parsed(header, "windows")) if "windows" in header else None
    return values


def trained_layers(header: Mapping[str, str]) -> int:
    """Layers that a checked header's memory was trained with."""
    return checked(header)["settings"].get("num_layers", MemorizationSettings.num_layers)


def _parsed(header: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(header[name])
    except (ValueError, RecursionError):
        raise ValueError(f"its {name} are no JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"its {name} are no mapping")
    return value


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(MemorizationSettings)}
    for name, value in settings.items():
        # Rows of one batch may have differed.
        each = value if isinstance(value, list) else [value]
        like = defaults.get(name)
        for one in each:
            number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
            if isinstance(like, bool):
                fits = isinstance(one, bool)
            elif isinstance(like, int):
                fits = isinstance(one, int) and number
            elif isinstance(like, float):
                fits = number
            else:
                fits = one is None or number or isinstance(one, bool) or _is_line(one)
            if not fits:
                raise ValueError(f"its setting {name!r} does not fit")
    return settings


def _curve(curve: dict[str, Any]) -> dict[str, list[float | None]]:
    for name, values in curve.items():
        numbers = isinstance(values, list) and all(type(value) in _NUMBERS for value in values)
        if name not in _CURVE or not numbers:
            raise ValueError("its curve is none")
    if not curve.keys() >= {"cross_entropy", "kl", "grad_norm"}:
        raise ValueError("its curve is none")
    return curve


def _windows(windows: dict[str, Any]) -> dict[str, Any]:
    lengths = windows.get("lengths")
    counts = [windows.get(name) for name in ("window", "overlap", "count", "tokens", "updates", "planned")]
    fits = isinstance(lengths, list) and windows.get("policy") in POLICIES
    if not fits or not all(type(n) is int and n >= 0 for n in [*lengths, *counts]):
        raise ValueError("its windows are none")
    return windows


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _MOST_SHOWN
