"""How Optuna chooses the next trial: a function of seed, trial and history.

Imports Optuna, which is an extra: import this module only where a study is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from fastmem_pl.search.optuna_settings import OptunaSettings


def place_of(trials: Sequence[FrozenTrial], number: int) -> int:
    """Number of a trial among those that did not fail: the same whether or not the search was stopped."""
    return sum(trial.number < number and trial.state != TrialState.FAIL for trial in trials)


class SeededByTrial(optuna.samplers.BaseSampler):
    """A sampler whose choice depends on seed, trial and history alone.

    With a generator that goes on from trial to trial, a search that goes on later would ask for its first
    points once more, and so would a second worker.

    Args:
        settings: which sampler, and its seed.
        space: ranges by name.
    """

    def __init__(self, settings: OptunaSettings, space: dict[str, Any]) -> None:
        self._settings, self._space = settings, space
        self._sampler = self._make(settings.seed)

    def _make(self, seed: int) -> optuna.samplers.BaseSampler:
        if self._settings.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if self._settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # Counts its points in the storage, and needs one seed for all of them.
        return optuna.samplers.QMCSampler(seed=self._settings.seed, scramble=True)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial with a generator of its own."""
        place = place_of(study.get_trials(deepcopy=False), trial.number)
        self._sampler = self._make(
            int(np.random.SeedSequence([self._settings.seed, place]).generate_state(1)[0])
        )
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """The ranges to sample together."""
        if self._settings.sampler == "qmc":
            # It would take its first points from another sampler, for want of finished trials.
            return self._space
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        """Values of these ranges."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, *args: Any) -> Any:
        """A value of a range that is sampled alone."""
        return self._sampler.sample_independent(study, trial, *args)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, *args: Any) -> None:
        """Tell the sampler of a trial's end."""
        self._sampler.after_trial(study, trial, *args)
