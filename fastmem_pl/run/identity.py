"""What results depend on: the settings by which a run folder recognizes its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from fastmem_pl.data import FastMemDataModule
from fastmem_pl.run.predict import FastMemModule

# What no answer depends on.
_DATA_FREE = {"batch_size", "max_batch_tokens", "path", "_instantiator"}
# Of the model's settings, those that its answers depend on.
_BACKBONE = ("source", "quantization", "revision", "subfolder", "attn_implementation")


def settings_of(model: FastMemModule) -> dict[str, Any]:
    """All settings, nested and plain, as a config file has them."""
    return {
        "backbone": asdict(model.loading),
        "methods": model.given_methods,
        "memorize": _plain(model.memorization),
        "decode": _plain(model.decoding),
        "chat": _plain(model.chat),
        "memories": model.given_memories,
        "strict": model.strict,
        "auto_batch": model.auto_batch,
        **model.metric_models,
        "published_quirks": sorted(model.memory_quirks + model.answer_quirks),
    }


def identity_of(
    model: FastMemModule, datamodule: FastMemDataModule, precision: str, answers: bool
) -> dict[str, Any]:
    """Settings that memories depend on and, with ``answers``, what answers depend on beside them."""
    data = {name: value for name, value in datamodule.hparams.items() if name not in _DATA_FREE}
    data["file_hash"] = datamodule.file_hash()
    if not answers:
        del data["answer_prefix"]
    return {"model": model_identity(model, answers), "data": data, "trainer": {"precision": precision}}


def model_identity(model: FastMemModule, answers: bool) -> dict[str, Any]:
    """The model's part of :func:`identity_of`."""
    settings: dict[str, Any] = {
        "backbone": {name: getattr(model.loading, name) for name in _BACKBONE},
        "memorize": _plain(model.memorization),
        "chat": {"template": model.chat.template, "template_kwargs": model.chat.template_kwargs},
        "published_quirks": model.memory_quirks,
    }
    if answers:
        settings["chat"] = _plain(model.chat)
        settings["decode"] = _plain(model.decoding)
        settings["methods"] = [method.name for method in model.methods]
        settings["memories"] = model.given_memories
        settings["answer_quirks"] = model.answer_quirks
    return settings


def only_of_answers(model: FastMemModule) -> set[str]:
    """Dotted names of the settings that answers depend on and memories do not."""
    both, memories = (flatten({"model": model_identity(model, answers)}) for answers in (True, False))
    return {"data.answer_prefix", *(both.keys() - memories.keys())}


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


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _plain(settings: Any) -> dict[str, Any]:
    """Fields of a settings class, as JSON and YAML know values."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
    }
