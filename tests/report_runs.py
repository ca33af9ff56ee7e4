"""Run folders written by hand: the report reads files only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

DATA = [
    {
        "context": f"The tower of town {i} was built by Ada{i} in {1800 + i}.",
        "question": f"who built tower {i}",
    }
    for i in range(12)
]

RunMaker = Callable[..., Path]


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Makes a record as a run writes it."""
    return _record


def _record(index: int, method: str, scores: Mapping[str, float], **further: Any) -> dict[str, Any]:
    curve = {"cross_entropy": [3.0, 2.0], "kl": [0.0, 0.1], "grad_norm": [1.0, 0.5]}
    made = {
        "index": index,
        "id": str(index),
        "task": "qa",
        "method": method,
        "question": DATA[index % len(DATA)]["question"],
        "prediction": f"The answer is: Ada{index}",
        "token_ids": [1, 2, 3],
        "references": [f"Ada{index}"],
        "originals": [],
        "scores": dict(scores),
        "output_words": 2,
        "n_context_tokens": 20 + index,
        "n_truncated_tokens": 0,
        "n_prompt_tokens": 50,
        "seconds": {"memorize": 0.5 if "fastmem" in method else 0.0, "decode": 0.25},
        "curve": curve if "fastmem" in method else None,
        "status": "ok",
    }
    return made | further


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Writes a data file and a run folder over it; ``settings`` are of the model."""

    def make(
        name: str,
        records: Sequence[Mapping[str, Any]],
        methods: Sequence[str] = ("zero-shot", "fastmem"),
        data: str = "data.jsonl",
        task: str = "qa",
        complete: bool = True,
        fingerprint: str = "f" * 16,
        limit: int | None = None,
        **settings: Any,
    ) -> Path:
        file = tmp_path / data
        if not file.exists():
            file.write_text("".join(json.dumps({**row, "answers": [data]}) + "\n" for row in DATA))
        run = tmp_path / name
        run.mkdir(parents=True)
        model = {"backbone": "tiny", "methods": list(methods), "fingerprint": fingerprint, **settings}
        identity = {
            "model": model,
            "data": {
                "task": task,
                "limit": limit,
                "answer_prefix": "",
                "fields": None,
                "file_hash": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
            },
            "trainer": {"precision": "32-true"},
        }
        (run / "run.json").write_text(json.dumps({"schema_version": 1, "id": "0" * 16, "identity": identity}))
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(file)}}))
        (run / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if complete:
            count = len({r["index"] for r in records})
            metrics = {
                "groups": {},
                "num_samples": count,
                "peak_memory_gib": {"memorize": 2.0, "decode": 1.5},
            }
            (run / "metrics.json").write_text(json.dumps(metrics))
        return run

    return make


@pytest.fixture
def two_methods() -> list[dict[str, Any]]:
    """Twelve samples: zero-shot has the even ones, fastmem all but the first."""
    return [
        made
        for index in range(12)
        for made in (
            _record(index, "zero-shot", {"accuracy": float(index % 2 == 0), "f1": 0.25 * (index % 3)}),
            _record(index, "fastmem", {"accuracy": float(index > 0), "f1": 0.5}),
        )
    ]
