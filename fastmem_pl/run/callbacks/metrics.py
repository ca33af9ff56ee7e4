"""Aggregation of scores over samples, fed batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import SCORES, McNemar, SampleMean

ALL = "all"
_ALONE = {"sync_on_compute": False}


class MetricAggregation(Callback):
    """Feeds torchmetrics by group (all samples, and each task of a mixed file) and method."""

    def __init__(self) -> None:
        # Fed with the records of all processes, by one of them: nothing is left to exchange.
        self.means: dict[tuple[str, str, str], SampleMean] = defaultdict(partial(SampleMean, **_ALONE))
        self.tests: dict[tuple[str, str, str], McNemar] = defaultdict(partial(McNemar, **_ALONE))
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
        values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        for record in records:
            self.tasks[record["task"]].add(record["index"])
            baseline = baselines.get(record["index"]) if record["method"] != BASELINE else None
            for group in (ALL, record["task"]):
                for name, value in _values(record).items():
                    values[group, record["method"], name].append(value)
                both = record["scores"].keys() & (baseline or {}).keys()
                for name in (name for name in SCORES if SCORES[name].binary and name in both):
                    pair = (baseline[name], record["scores"][name])
                    pairs[group, record["method"], name].append(pair)
        for key, several in values.items():
            self.means[key].update(several)
        for key, both in pairs.items():
            self.tests[key].update(*zip(*both, strict=True))

    def compute(self) -> dict[str, dict[str, Any]]:
        """Values with standard errors and paired tests, by group and method."""
        groups: dict[str, dict[str, Any]] = {}
        single = len(self.tasks) == 1
        for (group, method, name), mean in self.means.items():
            if single and group != ALL:
                continue
            entry = groups.setdefault(group, {}).setdefault(
                method, {"n": 0, "metrics": {}, "against_zero_shot": {}}
            )
            count = mean.count
            entry["n"] = max(entry["n"], count)
            # Seconds are shares of a batch, not independent values.
            error = float("nan") if name.startswith("seconds") else mean.standard_error().item()
            entry["metrics"][name] = {
                "value": mean.compute().item(),
                "standard_error": error if error == error else None,
                "n": count,
            }
        for (group, method, name), test in self.tests.items():
            if group in groups:
                groups[group][method]["against_zero_shot"][name] = {
                    "gained": int(test.gained),
                    "lost": int(test.lost),
                    "p_value": test.compute().item(),
                    "test": "exact McNemar",
                }
        for methods in groups.values():
            for entry in methods.values():
                order = [*SCORES, *entry["metrics"]]
                entry["metrics"] = dict(
                    sorted(entry["metrics"].items(), key=lambda item: order.index(item[0]))
                )
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
