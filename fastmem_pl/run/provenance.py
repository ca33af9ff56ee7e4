"""By what model, with what settings, and where results were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmem_pl.base.environment import environment
from fastmem_pl.run.predict import FastMemModule


@dataclass
class Provenance:
    """What is kept with every result: the ``model``, the ``environment``, and ``peaks`` in GiB by phase.

    Not frozen: Lightning's half-precision plugins copy the dataclasses of a batch field by field.
    """

    model: dict[str, Any]
    environment: dict[str, Any]
    peaks: dict[str, float]

    @classmethod
    def of(cls, module: FastMemModule) -> Provenance:
        """That of a module whose model is loaded."""
        backbone = module.backbone
        model = {
            "backbone": backbone.name,
            "class": type(backbone.model).__name__,
            "fingerprint": backbone.fingerprint(),
            "precision": backbone.precision,
        }
        return cls(model, environment(backbone.device), module.meter.peak_gib())

    @classmethod
    def joined(cls, several: Sequence[Provenance | None]) -> Provenance | None:
        """That of several processes: the first's, with the highest peaks; ``None`` of those with no model."""
        several = [one for one in several if one is not None]
        if not several:
            return None
        names = dict.fromkeys(name for one in several for name in one.peaks)
        peaks = {name: max(one.peaks.get(name, 0.0) for one in several) for name in names}
        return cls(several[0].model, several[0].environment, peaks)

    def describe(self, identity: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
        """Entries of ``metrics.json``, with the settings that the results depend on."""
        return {
            "model": self.model,
            "peak_memory_gib": self.peaks,
            "environment": {**self.environment, "processes": processes},
            "settings": identity,
        }
