"""One search, by a grid or by trials: its folder, its answers, and the files at the end."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer

from fastmem_pl.base.errors import RunStoppedError
from fastmem_pl.base.files import write_atomic
from fastmem_pl.data import BatchLimits, FastMemDataModule
from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import METRIC_MODELS, format_score
from fastmem_pl.run.callbacks import PredictionWriter, SampleProgress
from fastmem_pl.run.folder import SCHEMA_VERSION
from fastmem_pl.run.identity import identity_of
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.records import Record
from fastmem_pl.run.scoring import score_records
from fastmem_pl.run.trainer import FastMemTrainer
from fastmem_pl.search.evaluate import SearchModule
from fastmem_pl.search.grid import AXES, MEMORY_AXES, SearchSettings, Todo, missing
from fastmem_pl.search.ranking import Ranking, rank
from fastmem_pl.search.summary import heat_map, markdown

log = logging.getLogger(__name__)

RESULTS = ("search.json", "search.md", "heatmap.svg", "best.yaml")
_MEASURED = ("model", "seconds_of_last_session", "peak_memory_gib", "environment", "settings")


@dataclass
class SearchResult:
    """What a search leaves: ``num_new`` answers are of this session, ``files`` show the result."""

    path: Path
    ranking: Ranking
    num_samples: int
    num_new: int
    files: tuple[str, ...]


class SearchJob:
    """One search, from its settings to its files; making one refuses what needs no model to be refused."""

    def __init__(
        self,
        trainer: FastMemTrainer,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        settings: SearchSettings,
        path: Path,
    ) -> None:
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.settings, self.path = settings, path
        self.samples = datamodule.samples
        self.run = trainer.prepare_run(path, self._identity(), [], model)
        self.num_new, self._start = 0, time.perf_counter()

    def _identity(self) -> dict[str, Any]:
        """What records depend on; a folder may hold the points of several grids, but of one study only."""
        settings, identity = (
            self.settings,
            identity_of(self.model, self.datamodule, str(self.trainer.precision), True),
        )
        axes = settings.optuna.space if settings.optuna else {*MEMORY_AXES, *settings.grid}
        for name in axes:
            del identity["model"][AXES[name].group][name]
        identity["search"] = {"axes": sorted(axes)}
        if settings.optuna:
            late = settings.objective in METRIC_MODELS
            identity["search"] |= {
                "objective": settings.objective,
                "metric_models": self.model.metric_models if late else None,
                "every": settings.every,
                "samples": len(self.samples),
                "space": {name: [AXES[name].tidy(end) for end in ends] for name, ends in axes.items()},
            }
        return identity

    def answer(
        self,
        look: Callable[[], Todo],
        callback: Callback | None = None,
        trials: Mapping[Any, int] | None = None,
    ) -> None:
        """Run Lightning's predict loop, one sample a batch.

        ``look`` returns what is missing once the model is loaded, the same in all processes.
        """
        model, data, ranks = self.model, self.datamodule, self.trainer.ranks
        search = self.search = SearchModule(model, self.settings.chosen_method(), trials)

        def plan() -> None:
            search.todo = look()
            new, there = sum(map(len, search.todo.values())), self.run.count_lines()
            data.skip({sample.index for sample in self.samples} - search.todo.keys())
            left, lengths = len(data.remaining), model.context_lengths(data.remaining)
            data.use_plan(ranks.first(lambda: data.plan(lengths, BatchLimits(1))))
            self.num_new += new
            if self.trainer.pool is not None:
                self.trainer.pool.plan(data, not (self.path / "search.json").is_file(), BatchLimits(1))

            def count() -> int:
                return len(self.samples) - left + (self.run.count_lines() - there) * left // max(1, new)

            for bar in (c for c in self.trainer.callbacks if isinstance(c, SampleProgress)):
                bar.count = count if ranks.count > 1 else None

        callbacks = [PredictionWriter(self.run), *([callback] if callback else [])]
        with self.trainer.looping(model, search, data, self.run, plan, callbacks) as step:
            Trainer.predict(self.trainer, step, datamodule=data, return_predictions=False)
        if model.is_loaded:
            model.graphs.clear()

    def scored_records(self) -> list[Record]:
        """Records of the samples that are searched on, with the scores that need a model of their own."""
        score_records(self.run, self.model, self.datamodule, self.trainer.device_of(self.model))
        wanted = {sample.index for sample in self.samples}
        return [record for record in self.run.records() if record["index"] in wanted]

    def finish(
        self, ranking: Ranking, study: Mapping[str, Any] | None = None, plots: Sequence[str] = ()
    ) -> SearchResult:
        """Write ``search.json``, ``search.md``, ``best.yaml`` and, but for trials, ``heatmap.svg``."""
        summary = self.path / "search.json"
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "num_samples": len(self.samples),
            "num_points": len(ranking.points),
            "method": self.settings.chosen_method().name,
            "ranking": ranking.as_dict(),
            **({"study": study} if study else {}),
        }
        if provenance := self.trainer.provenance(self.model):
            content |= provenance.describe(self.run.identity)
        if self.num_new:
            content["seconds_of_last_session"] = round(time.perf_counter() - self._start, 2)
        elif summary.is_file():
            # Nothing was left to do, so what was measured while there was stays.
            kept = json.loads(summary.read_text())
            content |= {name: kept[name] for name in _MEASURED if name in kept}
        config = self.trainer.config_of(self.model, self.datamodule, self.path)
        try:
            write_atomic(summary, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            if study is None:
                heat_map(ranking, self.path / "heatmap.svg")
            write_atomic(self.path / "search.md", markdown(ranking, plots))
            write_atomic(self.path / "best.yaml", best_config(config, ranking, self.settings, self.path))
        except OSError as error:
            raise RunStoppedError(
                f"cannot write {self.path}: {error.strerror}; answers stay, and the same command goes on"
            ) from error
        files = ("search.md", *(plots if study else ["heatmap.svg"]), "search.json")
        return SearchResult(self.path, ranking, len(self.samples), self.num_new, files)


def search_grid(job: SearchJob) -> SearchResult:
    """Answer what is missing of every point of the grid, and rank the points."""
    points, run, ranks = job.settings.points(job.model), job.run, job.trainer.ranks

    def look() -> Todo:
        records = run.records()
        todo = missing(points, job.samples, records)
        if todo:
            # They would be stale, should this session be killed.
            for name in RESULTS:
                (job.path / name).unlink(missing_ok=True)
        if records and todo:
            total, left = len(job.samples) * (len(points) + 1), sum(map(len, todo.values()))
            log.warning("going on in %s: %d of %d answers are there", job.path, total - left, total)
        return todo

    def open_and_look() -> Todo:
        job.trainer.open_run(run, job.model, job.datamodule)
        return ranks.first(look)

    def finish() -> SearchResult:
        run.merge_parts()
        return job.finish(rank(job.scored_records(), job.settings.objective, points))

    try:
        job.answer(open_and_look)
        ranks.gather(None)  # all are done
        return ranks.first(finish)
    finally:
        run.close()


def best_config(config_text: str, ranking: Ranking, settings: SearchSettings, path: Path) -> str:
    """The configuration of a search as one that ``fit-predict`` takes, with the values of the best point."""
    config, best = yaml.safe_load(config_text), ranking.best
    config.pop("search", None)
    for name, value in best.point.items():
        config["model"].setdefault(AXES[name].group, {})[name] = value
    config["model"]["methods"] = [BASELINE, settings.chosen_method().name]
    config["run_dir"] = str(path / "best")
    # The limit was for the search; who judges its result wants all of a file.
    config["data"]["limit"] = None
    score = format_score(ranking.objective, best.value, best.standard_error)
    return (
        f"# The best of {len(ranking.points)} points on {best.n} samples: {ranking.objective} {score}.\n"
        f"# run:   fastmem fit-predict --config {shlex.quote(str(path / 'best.yaml'))}\n"
        "# It was chosen on those samples, so give it others to judge it by (--data.path).\n"
        + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    )
