"""Results that the paper published, for runs whose settings are the paper's (arXiv 2406.16069)."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.decoding import DECODERS, METHODS, DecodingSettings, decoders_using
from fastmem_pl.memory.settings import MemorizationSettings
from fastmem_pl.report.runs import ReportRun, flat_settings

PUBLISHED = Path(__file__).with_name("published.yaml")
_NO_MATTER = ("seed", "optimizer_state")


def published(run: ReportRun, task: str, method: str, score: str) -> float | None:
    """The paper's value, where there is one and the run's settings for this method are the paper's.

    Those are in the packaged configs ``base``, of the task, and of both with the decoder (``xsum+cd``).
    """
    settings, data = run.settings, run.identity["data"]
    name = Path(str(settings.get("source"))).name
    value = _read(PUBLISHED).get(name, {}).get(task, {}).get(score, {}).get(method)
    changed = data.get("limit") is not None or data.get("answer_prefix") or data.get("fields")
    if value is None or method not in METHODS or not run.metrics or changed:
        return None
    wanted = _paper_settings(task, method)
    # What is left open is the decoder's own value.
    own = getattr(DECODERS[METHODS[method].decoder], "defaults", {})
    return value if all(_filled(settings, own, n) == _filled(wanted, own, n) for n in wanted) else None


def _filled(settings: Mapping[str, Any], own: Mapping[str, Any], name: str) -> Any:
    value = settings.get(name)
    return own.get(name) if value is None else value


def _paper_settings(task: str, method: str) -> dict[str, Any]:
    """Settings that a method's answers depend on, as the paper has them."""
    decoder, memory = METHODS[method].decoder, METHODS[method].memory
    used = {"template": True, "template_kwargs": None, "system_prompt": None}
    used |= {"quantization": None, "max_context_tokens": None}
    defaults = {**vars(DecodingSettings()), "stop": []}
    used |= {n: v for n, v in defaults.items() if decoder in (decoders_using(n) or [decoder])}
    used |= vars(MemorizationSettings()) if memory else {}
    for name in _NO_MATTER:
        used.pop(name, None)
    for config in ("base", task, f"{task}+{decoder}" if memory else ""):
        path = packaged_configs().get(config)
        given = flat_settings(_read(path).get("model", {})) if path else {}
        used |= {name: value for name, value in given.items() if name in used}
    return used


@cache
def _read(path: Path) -> Mapping[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
