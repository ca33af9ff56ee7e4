"""Profiles of runs: where the time of a session went, and how much memory each phase took.

``RUN/profile/profile.json`` holds the profile of the last session that answered something, of all processes
together; elastic workers write one each, ``profile-<worker>.json``. What earlier sessions left goes when a
session writes its own. Phases do not overlap: their seconds and ``other`` add up to those of the session.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.base.files import write_atomic

if TYPE_CHECKING:
    from fastmem_pl.base.phases import PhaseCall

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ProfileKind = Literal["phases", "trace", "memory"]
KINDS: tuple[str, ...] = get_args(ProfileKind)
"""What a run can be asked for: seconds and memory by phase, a trace of its operators, a history of the
allocator of a GPU."""

PHASES = {
    "load": "the model's weights, from disk to the device",
    "trunk": "the contexts' pass through the blocks below the trained ones, once",
    "memorize": "the steps, without the trunk's pass",
    "prefill": "the prompts' pass, which the methods share",
    "decode": "token by token, by method",
    "memories": "reading saved memories (predict) or writing them (fit)",
    "scoring": "scores of the answers, those by metric models included",
    "trace": "starting torch.profiler, and writing what it saw",
    "other": "tokenizing, planning batches, writing records, waiting for other processes, attempts that ran "
    "out of memory",
}
"""Phases in the order of a run."""

_FOLDER, _FILE = "profile", "profile.json"
# Of phases with one call, or of no time.
_MAY_BE_NONE = ("median_seconds", "tokens_per_second", "ms_per_token")


def check_kinds(kinds: Sequence[str] | str | None, option: str = "trainer.profile") -> list[str]:
    """What is asked for, ``phases`` first, each once; empty for ``None``.

    Args:
        kinds: names; in one string with commas between.
        option: that they were given with, for the message.

    >>> check_kinds("trace")
    ['phases', 'trace']

    Raises:
        FastMemError: for a name that is none.
    """
    if isinstance(kinds, str):
        kinds = [name.strip() for name in kinds.strip("[]").split(",")]
    for kind in kinds or ():
        if kind not in KINDS:
            raise unknown(option, kind, KINDS)
    return [kind for kind in KINDS if kind == "phases" or kind in kinds] if kinds else []


class Profiler:
    """Collects what a process measures in a session.

    Args:
        kinds: that were asked for.
        start: of the session, by :func:`time.perf_counter`.

    Attributes:
        calls: filled by the meters that it is given to (:class:`~fastmem_pl.base.phases.PhaseMeter`).
        files: names of the traces that were written.
        traced_batches: batches that torch.profiler watched, which slows them.
    """

    def __init__(self, kinds: Sequence[str], start: float) -> None:
        self.kinds = list(kinds)
        self.calls: list[PhaseCall] = []
        self.files: list[str] = []
        self.traced_batches = 0
        self._start = start

    def part(self, name: str) -> dict[str, Any]:
        """What this process did until now, as one of the ``processes`` of a profile."""
        wall = time.perf_counter() - self._start
        phases = {}
        for phase in PHASES:
            calls = [call for call in self.calls if call.phase == phase]
            if calls:
                phases[phase] = _numbers(calls)
                if phase == "decode":
                    methods = dict.fromkeys(call.part for call in calls)
                    phases[phase]["methods"] = {
                        method: _numbers([call for call in calls if call.part == method])
                        for method in methods
                    }
        phases["other"] = {"seconds": max(0.0, wall - sum(call.seconds for call in self.calls))}
        return {
            "name": name,
            "wall_seconds": wall,
            "phases": phases,
            "batch_sizes": _batch_sizes(self.calls),
            "traced_batches": self.traced_batches,
            "files": self.files,
        }


def merge(parts: Sequence[Mapping[str, Any]], shared: bool = True) -> dict[str, Any]:
    """The numbers of several processes as those of a run.

    Seconds, shares and the seconds of calls are those of the process that was busy longest, for which the
    others wait. Calls, samples, tokens and steps are added up, and so are tokens per second; peaks are the
    highest of all.

    Args:
        parts: of the processes (:meth:`Profiler.part`).
        shared: whether they shared out the samples. Those that hold one model together do the same work,
            which counts once.
    """
    slowest = max(parts, key=lambda part: part["wall_seconds"] - part["phases"]["other"]["seconds"])
    counted = parts if shared else [slowest]
    phases = {}
    for phase in PHASES:
        every = [part["phases"][phase] for part in parts if phase in part["phases"]]
        if every:
            numbers = _merged(slowest["phases"].get(phase), every, shared)
            # Of a session, so that they add up to 1.
            phases[phase] = {**numbers, "share": numbers["seconds"] / slowest["wall_seconds"]}
    sizes: Counter[str] = Counter()
    for part in counted:
        sizes.update(part["batch_sizes"])
    return {
        "wall_seconds": slowest["wall_seconds"],
        "phases": phases,
        "batch_sizes": {size: sizes[size] for size in sorted(sizes, key=int)},
        "traced_batches": sum(part["traced_batches"] for part in counted),
        "files": sorted(name for part in parts for name in part["files"]),
        "processes": list(parts),
    }


def profile_path(run: str | Path, worker: str | None = None) -> Path:
    """File of a run's profile, or of that of one of its elastic workers."""
    return Path(run) / _FOLDER / (_FILE if worker is None else f"profile-{worker}.json")


def read_profile(run: str | Path) -> dict[str, Any] | None:
    """The profile of a run's last session; that of elastic workers is merged; ``None`` where there is none.

    Raises:
        FastMemError: for a damaged file.
    """
    paths = _paths(run)
    if not paths:
        return None
    # A session that was killed between writing its own and removing the earlier ones leaves both.
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    first = _read(newest)
    if newest == profile_path(run):
        return first
    others = [_read(path) for path in paths if path != newest and _session(path) == first.get("session")]
    profiles = [first, *others]
    merged = merge([part for profile in profiles for part in profile["processes"]])
    return {
        **first,
        **merged,
        "num_samples": sum(profile["num_samples"] for profile in profiles),
        "environment": {**first["environment"], "processes": len(merged["processes"])},
    }


def has_earlier_profile(run: str | Path, session: str | None) -> bool:
    """Whether a session other than this one left a profile.

    Args:
        run: the folder.
        session: what the elastic workers of this session have in common; ``None`` for another session.
    """
    return any(session is None or _session(path) != session for path in _paths(run))


def write_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Write a profile at once, and remove those of earlier sessions.

    What cannot be written is said in one line, as the run's results are there.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(profile, indent=2, ensure_ascii=False) + "\n")
        session = profile.get("session")
        for other in _paths(path.parent.parent):
            if other != path and (session is None or _session(other) != session):
                other.unlink(missing_ok=True)
    except OSError as error:
        log.warning("profile: cannot write %s: %s; the results are kept", path, error.strerror or error)


def _paths(run: str | Path) -> list[Path]:
    """Files of profiles, that of a run without elastic workers first."""
    path = profile_path(run)
    return [path] * path.is_file() + sorted(path.parent.glob("profile-*.json"))


def _session(path: Path) -> str | None:
    """What the elastic workers of a session have in common; ``None`` where the file does not say."""
    try:
        return json.loads(path.read_text()).get("session")
    except (OSError, ValueError, AttributeError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        profile = json.loads(path.read_text())
        _check(profile)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastMemError(f"{path} is damaged; remove it, or run again with --profile") from error
    return profile


def _check(profile: Mapping[str, Any]) -> None:
    """Use all that is used of a profile, so that what is missing or no number shows here."""
    device, settings = profile["environment"]["device"], profile["settings"]
    profile["mode"], device["name"], settings["model"]["backbone"], settings["trainer"]["precision"]
    if device["type"] == "cpu":
        device["threads"]
    ", ".join(profile["files"])
    sum([profile["wall_seconds"], profile["num_samples"], profile["traced_batches"]])
    for part in (profile, *profile["processes"]):
        part["phases"]["other"]
        for numbers in part["phases"].values():
            for own in (numbers, *numbers.get("methods", {}).values()):
                own["seconds"]
                sum(v for k, v in own.items() if k != "methods" and not (v is None and k in _MAY_BE_NONE))
    merge(profile["processes"])


def _numbers(calls: Sequence[PhaseCall]) -> dict[str, Any]:
    """What is told of the calls of one phase."""
    seconds = sum(call.seconds for call in calls)
    tokens, steps = sum(call.tokens for call in calls), sum(call.steps for call in calls)
    numbers: dict[str, Any] = {
        "seconds": seconds,
        "calls": len(calls),
        "first_seconds": calls[0].seconds,
        "median_seconds": median(call.seconds for call in calls[1:]) if len(calls) > 1 else None,
        "samples": sum(call.samples for call in calls),
        "peak_memory_gib": round(max(call.peak_bytes for call in calls) / 2**30, 3),
    }
    if tokens:
        numbers |= {"tokens": tokens, "tokens_per_second": tokens / seconds if seconds else None}
    if steps:
        numbers |= {"steps": steps, "ms_per_step": 1000 * seconds / steps}
        if calls[0].phase == "decode":
            numbers["ms_per_token"] = 1000 * seconds / tokens if tokens else None
    return numbers


def _merged(
    slowest: Mapping[str, Any] | None, every: Sequence[Mapping[str, Any]], shared: bool
) -> dict[str, Any]:
    """The numbers of one phase; where the slowest process has none of it, it took none of its time."""
    numbers = {**every[0], "seconds": 0.0} if slowest is None else dict(slowest)
    if "peak_memory_gib" in numbers:
        numbers["peak_memory_gib"] = max(one["peak_memory_gib"] for one in every)
    if shared:
        for name in ("calls", "samples", "tokens", "steps", "tokens_per_second"):
            if name in numbers:
                numbers[name] = sum(one.get(name) or 0 for one in every)
    methods = dict.fromkeys(method for one in every for method in one.get("methods", ()))
    if methods:
        numbers["methods"] = {
            method: _merged(
                slowest and slowest["methods"].get(method),
                [one["methods"][method] for one in every if method in one["methods"]],
                shared,
            )
            for method in methods
        }
    return numbers


def _batch_sizes(calls: Sequence[PhaseCall]) -> dict[str, int]:
    """How often there were batches of each size; the keys are text as in JSON."""
    for phase in ("memorize", "memories", "decode"):
        first = next((call.part for call in calls if call.phase == phase), None)
        if first is not None:
            sizes = Counter(call.samples for call in calls if (call.phase, call.part) == (phase, first))
            return {str(size): sizes[size] for size in sorted(sizes)}
    return {}
