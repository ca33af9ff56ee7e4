"""Aggregation of scores over samples, fed batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import SCORES, McNemar, SampleMean

ALL = "all"
# Scores that are 0 or 1, so that methods can be compared sample by sample with McNemar's test.
_PAIRED = ("accuracy", "contained", "exact_match", "format_failure", "original")


class MetricAggregation(Callback):
    """Feeds torchmetrics by group (all samples, and each task of a mixed file) and method."""

    def __init__(self) -> None:
        self.means: dict[tuple[str, str, str], SampleMean] = defaultdict(SampleMean)
        self.tests: dict[tuple[str, str, str], McNemar] = defaultdict(McNemar)
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
            values = dict(record["scores"])
            values["output_words"] = record["output_words"]
            values["seconds_memorize"] = record["seconds"]["memorize"]
            values["seconds_decode"] = record["seconds"]["decode"]
            values["seconds"] = values["seconds_memorize"] + values["seconds_decode"]
            values["failed"] = float(record["status"] != "ok")
            values["truncated"] = float(record["n_truncated_tokens"] > 0)
            for group in (ALL, record["task"]):
                for name, value in values.items():
                    self.means[group, record["method"], name].update([value])
                if record["method"] == BASELINE or record["index"] not in baselines:
                    continue
                baseline = baselines[record["index"]]
                for name in set(_PAIRED) & record["scores"].keys() & baseline.keys():
                    self.tests[group, record["method"], name].update(
                        [baseline[name]], [record["scores"][name]]
                    )

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
            count = int(mean.count)
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
