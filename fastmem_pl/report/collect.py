"""Runs side by side: which answers are compared with which, by method and data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding.methods import BASELINE, METHODS
from fastmem_pl.report.runs import ReportRun, find_samples, hash_of, read_run
from fastmem_pl.run.records import Record


@dataclass(frozen=True)
class Dataset:
    """Samples that are scored together: one task of one data file, or all tasks of a mixed one.

    Attributes:
        label: the task (or ``all``), and the run where two files have the same task.
        task: name of the task; empty for all tasks of a file.
        data_key: of the runs that answered about it (:attr:`ReportRun.data_key`).
    """

    label: str
    task: str
    data_key: str

    def holds(self, run: ReportRun) -> bool:
        """Whether a run has answered about it."""
        # Two tasks may read the same file: their samples are as many, and ask otherwise.
        answered = self.task in run.tasks if self.task else len(run.tasks) > 1
        return run.data_key == self.data_key and answered


@dataclass
class Variant:
    """A method of one system: a row of the tables.

    Attributes:
        label: the method, and what tells its system from others.
        method: its name.
        system: number of the system; runs over different data make one where their model is the same.
        records: by data set (its place) and index.
    """

    label: str
    method: str
    system: int
    records: dict[int, dict[int, Record]] = field(default_factory=dict)

    @property
    def memory(self) -> bool:
        """Whether the method memorizes."""
        return self.method in METHODS and METHODS[self.method].memory


@dataclass
class Comparison:
    """Runs side by side.

    Attributes:
        runs: as given.
        datasets: in the order of the runs; those of all tasks of a file come last.
        variants: rows.
        results: what was computed for the cells, as tables and charts show the same ones.
    """

    runs: list[ReportRun]
    datasets: list[Dataset]
    variants: list[Variant]
    results: dict[tuple[int, str, int, str], Any] = field(default_factory=dict, repr=False)

    @property
    def tasks(self) -> list[int]:
        """Places of the data sets of one task, which hold each sample once."""
        return [place for place, dataset in enumerate(self.datasets) if dataset.task]

    @property
    def order(self) -> list[int]:
        """Places of all data sets, those of all tasks of a file first."""
        return sorted(range(len(self.datasets)), key=lambda place: bool(self.datasets[place].task))

    def baseline(self, variant: Variant, dataset: int) -> dict[int, Record]:
        """Zero-shot records to compare with: of the variant's system, or of the same model elsewhere."""
        own, others = [], []
        asked = [run.asked for run in self.runs_of(variant, dataset)]
        for candidate in self.variants:
            records = candidate.records.get(dataset)
            if candidate.method != BASELINE or not records:
                continue
            if candidate.system == variant.system:
                own.append(records)
            elif any(run.asked in asked for run in self.runs_of(candidate, dataset)):
                others.append(records)
        return next(iter([*own, *others]), {})

    def runs_of(self, variant: Variant, dataset: int) -> Iterator[ReportRun]:
        """The run that a variant's records of a data set are from."""
        wanted = self.datasets[dataset]
        for run, system in zip(self.runs, self._systems, strict=True):
            if system == variant.system and wanted.holds(run):
                yield run

    def models(self, variants: Sequence[Variant]) -> dict[str, list[Variant]]:
        """These variants by name of their model; models of one name are told apart by their runs."""
        first = {}
        for run, system in zip(self.runs, self._systems, strict=True):
            first.setdefault(system, run)
        names: dict[str, str] = {}
        found: dict[str, list[Variant]] = {}
        for variant in variants:
            run = first[variant.system]
            name = f"{run.model} ({run.label})" if run.model in names.values() else run.model
            found.setdefault(names.setdefault(run.model_key, name), []).append(variant)
        return found

    @cached_property
    def _systems(self) -> list[int]:
        return _systems(self.runs)


def collect(paths: Sequence[str | Path], data: str | Path | None = None, contexts: bool = True) -> Comparison:
    """Read run folders.

    Args:
        paths: of the folders.
        data: file that holds the samples, where it is not where the runs found it.
        contexts: read the data, too.

    Raises:
        FastMemError: for a folder that is no run or holds no answers, and for damaged files.
    """
    given = [Path(path) for path in paths]
    resolved = [path.resolve() for path in given]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise FastMemError(f"{given[place]} is given twice")
    runs = [read_run(path, label) for path, label in zip(given, _labels(resolved), strict=True)]
    if data is not None and not Path(data).is_file():
        raise FastMemError(f"--data: no such file: {data}")
    for run in runs if contexts else ():
        find_samples(run, data)
    if data is not None and not any(run.data_hash == hash_of(Path(data)) for run in runs):
        raise FastMemError(f"--data: {data} is not the data of {_listed(runs)} (its content differs)")
    datasets = _datasets(runs)
    return Comparison(runs, datasets, _variants(runs, datasets))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _systems(runs: Sequence[ReportRun]) -> list[int]:
    """Number of each run's system: runs of one model over different data belong together."""
    seen: list[tuple[Any, set[tuple[str, str]]]] = []
    numbers = []
    for run in runs:
        key = run.model_key, run.identity.get("trainer", {}).get("precision")
        data = {(task, run.data_key) for task in run.tasks}
        number = next((i for i, (k, d) in enumerate(seen) if k == key and not d & data), len(seen))
        if number == len(seen):
            seen.append((key, set()))
        seen[number][1].update(data)
        numbers.append(number)
    return numbers


def _system_labels(runs: Sequence[ReportRun], numbers: Sequence[int]) -> dict[int, str]:
    """What tells systems apart: nothing where there is one, the model, or the runs."""
    of = {n: [run for run, number in zip(runs, numbers, strict=True) if number == n] for n in numbers}
    if len(of) == 1:
        return {n: "" for n in of}
    models = {n: found[0].model for n, found in of.items()}
    if len(set(models.values())) == len(models):
        return models
    return {n: ", ".join(run.label for run in found) for n, found in of.items()}


def _datasets(runs: Sequence[ReportRun]) -> list[Dataset]:
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        for task in run.tasks:
            found.setdefault((task, run.data_key), run.label)
    for run in runs:
        if len(run.tasks) > 1:
            found.setdefault(("", run.data_key), run.label)
    tasks, several = [task for task, _ in found], len({data_key for _, data_key in found}) > 1
    datasets = []
    for (task, data_key), label in found.items():
        # "all" is of one file, not of all that stand in the table.
        named = tasks.count(task) > 1 or (several and not task)
        datasets.append(Dataset(f"{task or 'all'} ({label})" if named else task or "all", task, data_key))
    return datasets


def _variants(runs: Sequence[ReportRun], datasets: Sequence[Dataset]) -> list[Variant]:
    numbers = _systems(runs)
    labels = _system_labels(runs, numbers)
    places = {(dataset.task, dataset.data_key): place for place, dataset in enumerate(datasets)}
    variants: dict[tuple[int, str], Variant] = {}
    for run, number in zip(runs, numbers, strict=True):
        for method in run.methods:
            label = f"{method} · {labels[number]}" if labels[number] else method
            variants.setdefault((number, method), Variant(label, method, number))
        whole = [""] if len(run.tasks) > 1 else []
        for record in run.records:
            records = variants[number, record["method"]].records
            for task in (record["task"], *whole):
                records.setdefault(places[task, run.data_key], {})[record["index"]] = record
    return [variant for variant in variants.values() if variant.records]


def _listed(runs: Sequence[ReportRun]) -> str:
    return ", ".join(str(run.path) for run in runs)
