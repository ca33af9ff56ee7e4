"""Optuna's own plots of a study, as pictures in the run folder.

Imports Optuna, which is an extra: import this module only where a study is asked for.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
from matplotlib import style
from optuna.trial import TrialState
from optuna.visualization import matplotlib as optuna_plots

from fastmem_pl.base.files import write_atomic

log = logging.getLogger(__name__)

_PLOTS: dict[str, Callable] = {
    "history": lambda study, name: optuna_plots.plot_optimization_history(study, target_name=name),
    "slice": lambda study, name: optuna_plots.plot_slice(study, target_name=name),
    "parallel": lambda study, name: optuna_plots.plot_parallel_coordinate(study, target_name=name),
    "importances": lambda study, name: optuna_plots.plot_param_importances(study, target_name=name),
}


def plot_study(study: optuna.Study, folder: Path, objective: str) -> list[str]:
    """Write the plots; returns the files' names. One that fails is left out with a line in the log.

    Args:
        study: without a complete trial there is nothing to draw.
        folder: of the files.
        objective: name of what the trials are judged by.
    """
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        return []
    names = []
    for plot, draw in _PLOTS.items():
        name = f"optuna-{plot}.svg"
        # Optuna sets a style of its own for the whole process, and keeps its figures open.
        opened = set(plt.get_fignums())
        try:
            with style.context(["default", {"svg.hashsalt": "fastmem", "svg.fonttype": "none"}]):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    draw(study, objective)
                    figure, buffer = plt.gcf(), io.BytesIO()
                    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
            write_atomic(folder / name, buffer.getvalue())
            names.append(name)
        except Exception as error:  # a picture less is no reason to lose the result
            log.warning("%s could not be drawn: %s", name, " ".join(str(error).split()))
        finally:
            for number in set(plt.get_fignums()) - opened:
                plt.close(number)
    return names
