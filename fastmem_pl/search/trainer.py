"""SearchTrainer: a FastMemTrainer that also searches for settings."""

from __future__ import annotations

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import as_path, is_remote
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.decoding import BASELINE
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.trainer import FastMemTrainer
from fastmem_pl.search.grid import SearchSettings
from fastmem_pl.search.job import SearchJob, SearchResult, search_grid


class SearchTrainer(FastMemTrainer):
    """A :class:`FastMemTrainer` with the command ``search``."""

    def search_settings(
        self,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        search: SearchSettings = SearchSettings(),  # noqa: B008 (jsonargparse shows it)
        run_dir: str | None = None,
    ) -> SearchResult:
        """Answer by every point of a grid of settings, or by trials of Optuna, and rank the points.

        Args:
            model: the settings of all that is no axis of the search.
            datamodule: the samples.
            search: axes, objective and samples of the search.
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        if search.every < 1:
            raise FastMemError(f"search.every: {search.every} is out of range; allowed: at least 1")
        with datamodule.every(search.every):
            search.check(model, datamodule.samples)
            self._check_for_search(model, search)
            model.use_methods([BASELINE, search.chosen_method().name])
            path = as_path(run_dir or f"runs/search-{datamodule.task}")
            if is_remote(path):
                raise FastMemError(f"run_dir: {path} is a URL; a search needs a folder, also a shared one")
            job = SearchJob(self, model, datamodule, search, path)
            if search.optuna is None:
                self.result = search_grid(job)
            else:
                # Imports Optuna, an extra.
                from fastmem_pl.search.trials import search_by_trials

                self.result = search_by_trials(job)
        return self.result

    # LightningCLI calls the attribute named like the subcommand. A method called `search` could not have a
    # parameter `search`: jsonargparse names a group of options after each.
    search = search_settings

    def _check_for_search(self, model: FastMemModule, search: SearchSettings) -> None:
        if self.profile:
            raise FastMemError("trainer.profile: not in a search; allowed with fit-predict, fit and predict")
        if model.loading.tp_plan is not None:
            raise FastMemError("model.backbone.tp_plan: not in a search; allowed: model.backbone.device_map")
        if search.optuna and self.num_devices * self.num_nodes > 1:
            raise FastMemError(
                f"trainer.devices: {self.num_devices} on {self.num_nodes} node(s); a worker of a study is "
                "one process: start one for every device, with one --search.optuna.storage"
            )
