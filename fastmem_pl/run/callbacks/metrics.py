"""Aggregation of scores over samples, fed batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import SCORES, estimate, paired

ALL = "all"


class MetricAggregation(Callback):
    """Collects values by group (all samples, and each task of a mixed file), method and score."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self.pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        self.tasks: dict[str, set[int]] = defaultdict(set)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Feed the records of a batch."""
        self.feed(outputs)

    def feed(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records; all methods of one sample must come together."""
        baselines = {r["index"]: r["scores"] for r in records if r["method"] == BASELINE}
        for record in records:
            self.tasks[record["task"]].add(record["index"])
            baseline = baselines.get(record["index"], {}) if record["method"] != BASELINE else {}
            for group in (ALL, record["task"]):
                for name, value in _values(record).items():
                    self.values[group, record["method"], name].append(value)
                for name in (name for name in SCORES if SCORES[name].binary):
                    if name in baseline and name in record["scores"]:
                        pair = (baseline[name], record["scores"][name])
                        self.pairs[group, record["method"], name].append(pair)

    def compute(self) -> dict[str, dict[str, Any]]:
        """Values with standard errors and paired tests, by group and method."""
        groups: dict[str, dict[str, Any]] = {}
        for (group, method, name), values in self.values.items():
            if group != ALL and len(self.tasks) == 1:
                continue
            entry = groups.setdefault(group, {}).setdefault(
                method, {"n": 0, "metrics": {}, "against_zero_shot": {}}
            )
            found = estimate(values)
            entry["n"] = max(entry["n"], found.n)
            # Seconds are shares of a batch, not independent values.
            error = None if name.startswith("seconds") else found.error
            entry["metrics"][name] = {"value": found.value, "standard_error": error, "n": found.n}
        for (group, method, name), pairs in self.pairs.items():
            if group in groups:
                test = paired(*zip(*pairs, strict=True), binary=True)
                groups[group][method]["against_zero_shot"][name] = {
                    "gained": test.gained,
                    "lost": test.lost,
                    "p_value": test.p_value,
                    "test": test.test,
                }
        for entry in (entry for methods in groups.values() for entry in methods.values()):
            order = [*SCORES, *entry["metrics"]]
            entry["metrics"] = dict(sorted(entry["metrics"].items(), key=lambda item: order.index(item[0])))
        return groups


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a record that are averaged."""
    seconds = record["seconds"]
    return {
        **record["scores"],
        "output_words": record["output_words"],
        "seconds_memorize": seconds["memorize"],
        "seconds_decode": seconds["decode"],
        "seconds": seconds["memorize"] + seconds["decode"],
        "failed": float(record["status"] != "ok"),
        "truncated": float(record["n_truncated_tokens"] > 0),
    }
