"""Runs side by side as one table of answers: which are compared with which, by method and data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data.reader import file_hash
from fastmem_pl.decoding.methods import BASELINE, METHODS
from fastmem_pl.metrics import SCORES, estimate, find_score, paired
from fastmem_pl.report.paper import published
from fastmem_pl.report.runs import ReportRun, find_samples, perplexity, read_run
from fastmem_pl.report.table import Result

# The one score of a data set where there is room for one; the first that the records have.
_PRIMARY = ("accuracy", "factkb", "bert_precision", "rougeL")


class Dataset(NamedTuple):
    """Samples that are scored together: a task of one data file, or all (``""``) of a mixed one."""

    label: str
    task: str
    data_key: str


@dataclass
class Comparison:
    """Runs side by side; numbers of runs and data sets are their places in these lists.

    Attributes:
        datasets: all tasks of a file first, then single tasks, both in the order of the runs.
        answers: one row per answer, those of a mixed file once more in the data set of all its tasks. A
            ``variant`` is a row of the result tables: method and, where there are several, system.
        scores: the same rows, one column per score; NaN where an answer has none.
    """

    runs: list[ReportRun]
    datasets: list[Dataset]
    answers: pd.DataFrame
    scores: pd.DataFrame

    @property
    def tasks(self) -> list[int]:
        """Data sets of one task, which hold each sample once."""
        return [place for place, dataset in enumerate(self.datasets) if dataset.task]

    @cached_property
    def variants(self) -> list[str]:
        """Rows of the result tables."""
        return list(self.answers["variant"].unique())

    @cached_property
    def groups(self) -> list[dict[str, pd.DataFrame]]:
        """Answers by data set and variant."""
        found = dict(list(self.answers.groupby(["dataset", "variant"])))
        return [
            {variant: found[place, variant] for variant in self.variants if (place, variant) in found}
            for place in range(len(self.datasets))
        ]

    @cached_property
    def results(self) -> dict[tuple[int, str, str], Result]:
        """Value, test against zero-shot and published value by data set, variant and score."""
        found = {}
        for place, groups in enumerate(self.groups):
            for variant, answers in groups.items():
                baseline = self.baseline(place, variant)
                run, method = self.runs[answers["run"].iat[0]], answers["method"].iat[0]
                for score in self.scores_of(place):
                    values, against = self.values(place, variant, score), None
                    if values.empty:
                        continue
                    if baseline is not None:
                        pairs = pd.concat([self.values(place, baseline, score), values], axis=1, join="inner")
                        if len(pairs):
                            against = paired(*pairs.to_numpy().T, find_score(score).binary)
                    paper = published(run, self.datasets[place].task, method, score)
                    found[place, variant, score] = Result(estimate(values), against, paper, len(answers))
        return found

    def values(self, dataset: int, variant: str, score: str) -> pd.Series:
        """A score by sample index, of the samples that have it."""
        answers = self.groups[dataset][variant]
        return self.scores.loc[answers.index, score].set_axis(answers["index"]).dropna()

    def scores_of(self, dataset: int) -> list[str]:
        """Scores that answers of a data set have, in the order of tables."""
        found = set(self.scores[self.answers["dataset"] == dataset].dropna(axis=1, how="all"))
        return [*(name for name in SCORES if name in found), *sorted(found - set(SCORES))]

    def primary_score(self, dataset: int) -> str | None:
        """The score that stands for a data set: the paper's, where answers have it."""
        scores = self.scores_of(dataset)
        return next((name for name in (*_PRIMARY, *scores) if name in scores), None)

    def baseline(self, dataset: int, variant: str) -> str | None:
        """Zero-shot to compare with: that of the variant's system, or of another run that asked the same."""
        firsts = {name: rows.iloc[0] for name, rows in self.groups[dataset].items()}
        own = firsts.get(variant)
        if own is None or own["method"] == BASELINE:
            return None
        others = [first for first in firsts.values() if first["method"] == BASELINE]
        same = [other for other in others if other["system"] == own["system"]]
        same += [other for other in others if self.runs[other["run"]].asked == self.runs[own["run"]].asked]
        return same[0]["variant"] if same else None

    @property
    def peak_memory(self) -> pd.DataFrame:
        """Peak GiB by run and phase, of the runs that measured it."""
        peaks = [run.metrics.get("peak_memory_gib") or {} for run in self.runs]
        return pd.DataFrame(peaks).dropna(how="all")

    @cached_property
    def curves(self) -> dict[str, list[Mapping[str, Sequence[float]]]]:
        """Loss curves of all memorized samples by data set, and by system where there are several."""
        # All methods of a system share the memory.
        memories = self.answers[self.answers["memory"]].drop_duplicates(["dataset", "system", "index"])
        found: dict[str, list[Mapping[str, Sequence[float]]]] = {}
        for place in self.tasks:
            label = self.datasets[place].label
            for system, answers in memories[memories["dataset"] == place].groupby("system", sort=False):
                whole = [r["curve"] for r in answers["record"] if r.get("curve") and r.get("status") == "ok"]
                if curves := [curve for curve in whole if curve["cross_entropy"]]:
                    found[f"{label} · {system}" if system else label] = curves
        return found


def collect(paths: Sequence[str | Path], data: str | Path | None = None, contexts: bool = True) -> Comparison:
    """Read run folders, and with ``contexts`` their samples: from ``data``, or where the runs found them.

    Raises:
        FastMemError: for a folder that is no run or holds no answers, and for damaged files.
    """
    resolved = [Path(path).resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise FastMemError(f"{paths[place]} is given twice")
    # Folder names, with as many parents as tell them apart.
    options = (["/".join(path.parts[-depth:]) for path in resolved] for depth in count(1))
    labels = next(labels for labels in options if len(set(labels)) == len(labels))
    runs = [read_run(Path(path), label) for path, label in zip(paths, labels, strict=True)]
    if data is not None and not Path(data).is_file():
        raise FastMemError(f"--data: no such file: {data}")
    if contexts:
        for run in runs:
            find_samples(run, data)
    if data is not None and not any(run.data_hash == file_hash(Path(data)) for run in runs):
        listed = ", ".join(str(run.path) for run in runs)
        raise FastMemError(f"--data: {data} is not the data of {listed} (its content differs)")
    datasets = _datasets(runs)
    answers = _answers(runs, datasets)
    scores = pd.DataFrame([r["scores"] for r in answers["record"]], index=answers.index, dtype=float)
    return Comparison(runs, datasets, answers, scores)


def _systems(runs: Sequence[ReportRun]) -> dict[str, str]:
    """Name of a run's system by its label; empty where there is one system.

    Runs of one model over different data belong together. Models of one name are named by their runs.
    """
    found: list[tuple[Any, set[tuple[str, str]], list[ReportRun]]] = []
    for run in runs:
        key, about = (run.model_key, run.precision), {(run.data_key, task) for task in run.tasks}
        system = next((system for system in found if system[0] == key and not system[1] & about), None)
        if system is None:
            found.append(system := (key, set(), []))
        system[1].update(about)
        system[2].append(run)
    systems = [members for _, _, members in found]
    names = [""] if len(systems) == 1 else [members[0].model for members in systems]
    if len(set(names)) < len(names):
        names = [", ".join(run.label for run in members) for members in systems]
    return {run.label: name for name, members in zip(names, systems, strict=True) for run in members}


def _datasets(runs: Sequence[ReportRun]) -> list[Dataset]:
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        for task in [*run.tasks, *([""] if len(run.tasks) > 1 else [])]:
            found.setdefault((task, run.data_key), run.label)
    tasks, several = [task for task, _ in found], len({data_key for _, data_key in found}) > 1
    datasets = []
    for (task, data_key), label in sorted(found.items(), key=lambda item: item[0][0] != ""):
        # "all" is of one file, not of all that stand in the table.
        named = tasks.count(task) > 1 or (several and not task)
        datasets.append(Dataset(f"{task or 'all'} ({label})" if named else task or "all", task, data_key))
    return datasets


def _answers(runs: Sequence[ReportRun], datasets: Sequence[Dataset]) -> pd.DataFrame:
    places = {(dataset.task, dataset.data_key): place for place, dataset in enumerate(datasets)}
    systems, models = _systems(runs), dict[str, str]()
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        system, whole = systems[run.label], [""] if len(run.tasks) > 1 else []
        # With the run where another model has the name.
        model = f"{run.model} ({run.label})" if run.model in models.values() else run.model
        model = models.setdefault(run.model_key, model)
        for record in run.records:
            method = record["method"]
            row = {
                "run": number,
                "system": system,
                "model": model,
                "method": method,
                "variant": f"{method} · {system}" if system else method,
                "memory": method in METHODS and METHODS[method].memory,
                "index": record["index"],
                "record": record,
                "memorize": record["seconds"].get("memorize", 0.0),
                "decode": record["seconds"].get("decode", 0.0),
                "tokens": len(record.get("token_ids") or ()),
                "output_words": record["output_words"],
                "length": record.get("n_context_tokens"),
                "perplexity": perplexity(record),
            }
            for task in (record["task"], *whole):
                rows.append({"dataset": places[task, run.data_key], **row})
    return pd.DataFrame(rows).astype({"length": float, "perplexity": float})
