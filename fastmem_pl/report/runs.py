"""One run folder as a report reads it: its records, its settings, and the data it answered about."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.outside import as_text, fit, parse_yaml, read_bytes, read_json
from fastmem_pl.data import ContextSample, read_samples
from fastmem_pl.data.reader import data_file, file_hash
from fastmem_pl.metrics import count_of
from fastmem_pl.report.table import profile_table
from fastmem_pl.run.folder import RunFolder, read_manifest
from fastmem_pl.run.profile import FILE, FOLDER
from fastmem_pl.run.records import Record

_ZERO_SHOT = (
    *("fingerprint", "quantization", "attn_implementation", "max_context_tokens"),
    *("template", "template_kwargs", "system_prompt"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
    "answer_quirks",
)


@dataclass
class ReportRun:
    """One run folder as a report sees it.

    Attributes:
        identity: nested settings that the results depend on (``run.json``).
        records: answers to the samples that all methods have answered, in the order of the data.
        metrics: content of ``metrics.json``; empty while the run is not complete.
        samples: the data by index, where the file was found unchanged.
    """

    path: Path
    label: str
    identity: dict[str, Any]
    records: list[Record]
    metrics: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, ContextSample] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        data, self.settings = self.identity["data"], flat_settings(self.identity["model"])
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))
        self.answered = len({record["index"] for record in self.records})
        self.data_hash = str(data.get("file_hash"))
        # The samples: the file, and the fields of it that were read.
        self.data_key = f"{self.data_hash} {json.dumps(data.get('fields') or '', sort_keys=True)}"
        source, quantization = str(self.settings.get("source", "model")), self.settings.get("quantization")
        name = "SmolLM2-135M-Instruct" if source == "demo" else Path(source).name
        self.model = f"{name} ({quantization})" if quantization else name
        self.model_key = str(self.settings.get("fingerprint") or source)
        self.precision = str(self.identity.get("trainer", {}).get("precision") or "")
        # What zero-shot answers depend on beside the sample: runs that agree in it have the same ones.
        self.asked = [self.model_key, self.precision, self.data_key]
        self.asked += [data.get("task"), data.get("answer_prefix"), *map(self.settings.get, _ZERO_SHOT)]


def flat_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model without their groups: ``memorize.steps`` as ``steps``."""
    flat: dict[str, Any] = {}
    for name, value in model.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat


def read_run(path: Path, label: str = "") -> ReportRun:
    """Read one run folder; of a run that was stopped, the samples that all methods have answered.

    Raises:
        FastMemError: when it is no run, holds no answers, or a file of it is damaged.
    """
    if not (path / "run.json").exists():
        wrong = f"{path} is no run folder (it holds no run.json)"
        raise FastMemError(wrong if path.is_dir() else f"no such run folder: {path}")
    identity = read_manifest(path).identity
    if not identity.keys() >= {"model", "data"}:
        raise FastMemError(f"{path / 'run.json'} is damaged (no settings in it)")
    if "search" in identity or (path / "search.json").is_file():
        raise FastMemError(f"{path} is a search; its report is {path / 'search.md'}")
    methods = fit(identity["model"].get("methods") or [], list[str], f"{path / 'run.json'}: methods")
    folder = RunFolder(path, identity, methods)
    folder.check()
    records = folder.records()
    if not records:
        saved = (path / "memories").is_dir()
        why = "memories, not answers; `fastmem predict` answers with them" if saved else "no answers yet"
        raise FastMemError(f"{path} holds {why}")
    metrics = folder.metrics()
    run = ReportRun(path, label or path.resolve().name, identity, records, metrics, read_profile(path))
    lines = notices_of(records, metrics.get("num_samples"))
    if not metrics:
        lines.insert(0, f"the run is not complete; {count_of(run.answered, 'sample')} so far")
    run.notices = [f"{run.label}: {line}" for line in lines]
    return run


def read_profile(run: Path) -> dict[str, Any]:
    """The profile of a run's last session; empty where there is none.

    Raises:
        FastMemError: for a file of which no table can be made.
    """
    path = run / FOLDER / FILE
    if not path.is_file():
        return {}
    profile = read_json(path, dict[str, Any])
    try:
        profile_table(profile)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastMemError(f"{path} is damaged; remove it, or run again with --profile") from error
    return profile


def notices_of(records: Sequence[Record], total: int | None) -> list[str]:
    """What a reader should know of answers, where ``total`` samples were to be answered."""
    answered = {record["index"] for record in records}
    failed = {record["index"] for record in records if record.get("status", "ok") != "ok"}
    cut = {record["index"] for record in records if record.get("n_truncated_tokens")}
    lines = []
    if total and len(answered) < total:
        lines.append(f"only {len(answered)} of {total} samples are answered so far")
    for what, samples in (
        ("could not be memorized; the base model answered (see 'status')", failed),
        ("had a context over the limit, which was cut off", cut),
    ):
        if samples:
            lines.append(f"{count_of(len(samples), 'sample')} {what}")
    return lines


def find_samples(run: ReportRun, given: str | Path | None) -> None:
    """Read the data again, if the file is there as the run found it (or is ``given``); else, a notice."""
    names = [str(given)] if given is not None else []
    with suppress(FastMemError, KeyError, TypeError):
        config = run.path / "config.yaml"
        names.append(str(parse_yaml(as_text(read_bytes(config), config), config)["data"]["path"]))
    # From here, or from a folder above the run's.
    places = [folder / data_file(name) for name in names for folder in (Path(), *run.path.resolve().parents)]
    path = next((p for p in places if p.is_file() and file_hash(p) == run.data_hash), None)
    if path is None:
        named = f" ({', '.join(names)})" if names else ""
        run.notices.append(
            f"{run.label}: contexts and prompts are missing: the data file{named} is not there or has "
            "changed; give it with --data FILE"
        )
        return
    data = run.identity["data"]
    prefix, limit = data.get("answer_prefix", ""), data.get("limit")
    run.samples = dict(enumerate(read_samples(path, data["task"], data.get("fields"), prefix, limit)))


def perplexity(record: Mapping[str, Any]) -> float | None:
    """Perplexity of the context under the base model: ``exp`` of the loss before any update."""
    losses = (record.get("curve") or {}).get("cross_entropy") or []
    return math.exp(min(losses[0], 50.0)) if losses and isinstance(losses[0], (int, float)) else None
