"""A search from start to end: what is left to do, the loop over samples, and the files at the end."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.base.files import write_atomic
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import format_score
from fastmem_pl.run.folder import SCHEMA_VERSION, RunFolder
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.provenance import describe_run
from fastmem_pl.run.scoring import score_records
from fastmem_pl.search.grid import MEMORY_AXES, Point, SearchSettings, check_every
from fastmem_pl.search.progress import AnswerProgress, answer_loop
from fastmem_pl.search.ranking import Ranking, rank
from fastmem_pl.search.search_module import SearchModule

if TYPE_CHECKING:
    from fastmem_pl.run.trainer import FastMemTrainer

log = logging.getLogger(__name__)


@dataclass
class SearchResult:
    """What a search leaves.

    Attributes:
        path: the run folder.
        ranking: all points, best first.
        num_samples: that were searched on.
        num_new: answers that were not there before this session.
        files: of the run folder that show the result.
    """

    path: Path
    ranking: Ranking
    num_samples: int
    num_new: int
    mode: str = "search"
    files: tuple[str, ...] = ("search.md", "heatmap.svg", "search.json")


def run_search(
    trainer: FastMemTrainer,
    model: FastMemModule,
    datamodule: FastMemDataModule,
    settings: SearchSettings,
    run_dir: str | None = None,
) -> SearchResult:
    """Evaluate every point, or trial, on every fifth (or as set) sample, and rank the points.

    Args:
        trainer: whose loop runs.
        model: settings of all that is no axis.
        datamodule: the samples.
        settings: of the search.
        run_dir: folder of the results; the same command goes on in it after a stop.

    Raises:
        FastMemError: for a mistake in the settings, before anything is written.
    """
    check_every(settings.every)
    with datamodule.every(settings.every):
        return _run(trainer, model, datamodule, settings, run_dir)


def _run(
    trainer: FastMemTrainer,
    model: FastMemModule,
    datamodule: FastMemDataModule,
    settings: SearchSettings,
    run_dir: str | None,
) -> SearchResult:
    start = time.perf_counter()
    samples = datamodule.samples
    settings.check(model, samples)
    method = settings.chosen_method()
    model.use_methods([BASELINE, method.name])
    path = Path(run_dir or Path("runs") / f"search-{datamodule.task}")
    identity = _identity(trainer, model, datamodule, settings)
    if trainer.elastic:
        raise FastMemError(
            "trainer.elastic: a grid is shared out over processes with --trainer.devices N; trials of "
            "Optuna, which come and go, with --search.optuna.storage"
        )
    if model.loading.tp_plan is not None:
        raise FastMemError(
            "model.backbone.tp_plan: a search chooses its batches by the memory of one process; allowed: "
            "model.backbone.device_map or model.backbone.quantization for a model too large for one device"
        )
    if settings.optuna:
        # Imports Optuna, an extra.
        from fastmem_pl.search.optimize import run_trials

        return run_trials(trainer, model, datamodule, settings, path, identity)
    run = trainer.open_run(path, identity, [], model, datamodule)
    processes = trainer.processes
    try:
        points = settings.points(model)

        def look() -> tuple[dict[int, list[Point | None]], bool]:
            records = run.records()
            todo = missing(points, [sample.index for sample in samples], records)
            if todo:
                # They would be stale, should this session be killed.
                for name in _RESULTS:
                    (path / name).unlink(missing_ok=True)
            return todo, bool(records)

        todo, begun = processes.first(look)
        new, total = sum(map(len, todo.values())), len(samples) * (len(points) + 1)
        if new:
            if begun and processes.rank == 0:
                log.warning("going on in %s: %d of %d answers are there", path, total - new, total)
            search = SearchModule(model, method, todo, settings.exact)
            bar = AnswerProgress(total, count=run.count_lines if processes.count > 1 else None)
            processes.each(lambda: answer_loop(trainer, search, model, datamodule, run, bar))

        def finish() -> Ranking:
            run.gather()
            score_records(run, model, datamodule)
            wanted = {sample.index for sample in samples}
            records = [record for record in run.records() if record["index"] in wanted]
            axes = {name: [point[name] for point in points] for name in points[0]}
            ranking = rank(records, settings.objective, axes)
            begin = start if new else None
            write_results(trainer, model, datamodule, run, settings, ranking, records, begin)
            return ranking

        return SearchResult(path, processes.first(finish), len(samples), new)
    finally:
        run.close()


def _identity(
    trainer: FastMemTrainer, model: FastMemModule, datamodule: FastMemDataModule, settings: SearchSettings
) -> dict[str, Any]:
    """What the records depend on beside their points: a folder may hold the points of several grids."""
    identity = trainer.identity(model, datamodule, answers=True)
    for name in {*MEMORY_AXES, *settings.axes}:
        identity["model"].pop(name, None)
    identity["search"] = {"exact": settings.exact, "axes": sorted({*MEMORY_AXES, *settings.axes})}
    return identity


def missing(
    points: Sequence[Point], indices: Sequence[int], records: Sequence[Mapping[str, Any]]
) -> dict[int, list[Point | None]]:
    """Points that have no record yet, by index of the sample; ``None`` stands for zero-shot."""
    done: dict[int, set[Any]] = defaultdict(set)
    for record in records:
        done[record["index"]].add(key_of(record["point"]))
    todo = {
        index: [point for point in (None, *points) if key_of(point) not in done[index]] for index in indices
    }
    return {index: left for index, left in todo.items() if left}


def key_of(point: Point | None) -> Any:
    """A point as a key of dictionaries; ``None`` for zero-shot."""
    return point and tuple(sorted(point.items()))


def write_results(
    trainer: FastMemTrainer,
    model: FastMemModule,
    datamodule: FastMemDataModule,
    run: RunFolder,
    settings: SearchSettings,
    ranking: Ranking,
    records: Sequence[Mapping[str, Any]],
    start: float | None,
    study: Mapping[str, Any] | None = None,
    plots: Sequence[str] = (),
) -> None:
    """Write ``search.json``, ``search.md``, ``best.yaml`` and, but for trials, ``heatmap.svg``.

    Where nothing was left to do, ``search.json`` keeps what was measured while there was.
    """
    # Reports read rankings, so they cannot be imported before this package is.
    from fastmem_pl.search.summary import heat_map, markdown

    summary = run.path / "search.json"
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "num_samples": len(datamodule.samples),
        "num_points": len(ranking.points),
        "method": settings.chosen_method().name,
        "largest_loss_error": max(
            (r["loss_error"] for r in records if r["loss_error"] is not None), default=None
        ),
        "ranking": ranking.as_dict(),
        **({"study": study} if study else {}),
        **describe_run(model, run.identity),
    }
    if start is None and summary.is_file():
        kept = json.loads(summary.read_text())
        content |= {name: kept[name] for name in _MEASURED if name in kept}
    elif start is not None:
        content["seconds_of_last_session"] = round(time.perf_counter() - start, 2)
    config = trainer.config_text or trainer.resolved_config(model, datamodule, run.path)
    try:
        write_atomic(summary, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if study is None:
            heat_map(ranking, run.path / "heatmap.svg")
        write_atomic(run.path / "search.md", markdown(ranking, picture=True, plots=plots))
        write_atomic(run.path / "best.yaml", best_config(config, ranking, settings, run.path))
    except OSError as error:
        raise RunStoppedError(
            f"cannot write {run.path}: {error.strerror}; the answers are kept, and the same command "
            "writes the results"
        ) from error


_RESULTS = ("search.json", "search.md", "heatmap.svg", "best.yaml")
_MEASURED = ("seconds_of_last_session", "peak_memory_gib", "environment")


def best_config(config_text: str, ranking: Ranking, settings: SearchSettings, path: Path) -> str:
    """The configuration of a search as one that ``fit-predict`` takes, with the values of the best point."""
    config = yaml.safe_load(config_text)
    config.pop("search", None)
    config["model"].update(ranking.best.point)
    config["model"]["methods"] = [BASELINE, settings.chosen_method().name]
    config["run_dir"] = str(path / "best")
    # The limit was for the search; who judges its result wants all of a file.
    config["data"]["limit"] = None
    best = ranking.best
    score = format_score(ranking.objective, best.value, best.standard_error)
    return (
        f"# The best of {len(ranking.points)} points on {best.n} samples: {ranking.objective} {score}.\n"
        f"# run:   fastmem fit-predict --config {shlex.quote(str(path / 'best.yaml'))}\n"
        "# It was chosen on those samples, so give it others to judge it by (--data.path).\n"
        + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    )
