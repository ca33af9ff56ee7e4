"""A data file of short contexts of several lengths, for tests of runs on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path


def write_towers(folder: Path, count: int) -> Path:
    """Write ``data.jsonl``; of the answers, the tiny model gives the second now and then."""
    path = folder / "data.jsonl"
    records = (
        {
            "id": f"q{i}",
            "context": f"Tower {i} stands in Rome. " * (1 + i % 3),
            "question": f"Where is {i}?",
            "answers": ["Rome", "e"],
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
