"""Black-box checks of runs over several processes, of elastic runs, and of what faults leave behind."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_issue5_blackbox import words
from test_issue_blackbox import FASTMEM, assert_same_curves, files, read, write
from transformers.utils import logging

from fastmem_pl.cli import main

pytestmark = pytest.mark.timeout(120)

PREFIX = "The answer is: Rome, as"
METHODS = 3
# Lengths of contexts differ, some are cut off, and the prefix is right for every third sample.
DATA = [
    {
        "input": f"what is {i}",
        "context": words(9, 100 + i),
        "answer": words(4, 200 + i),
        "sub_context": words(20 + 9 * (i % 4), i),
        "sub_answer": words(4, 300 + i) if i % 3 else "Rome",
    }
    for i in range(14)
]
FAST = {
    "model.memorize.steps": 3,
    "model.memorize.learning_rate": 0.01,
    "model.decode.max_new_tokens": 6,
    "model.memorize.max_context_tokens": 40,
    "data.task": "nqswap",
    "data.batch_size": 2,
    "data.answer_prefix": PREFIX,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
}
# Batches of about half a second, so that a signal finds one in work.
SLOW = {**FAST, "model.memorize.steps": 150, "model.memorize.learning_rate": 0.0005}
GRID = {
    "search.grid": "{learning_rate: [1e-3, 1e-2], steps: [2, 4], kl_coeff: [0.1, 1.0]}",
    "search.every": 2,
}
# Imported once, then forked.
IMPORTS = [
    "fastmem_pl.cli.lightning",
    "fastmem_pl.report.terminal",
    "transformers.models.llama.modeling_llama",
]


def elastic(chunk: int = 2, stale: float = 300, **more: object) -> dict[str, object]:
    return {"trainer.elastic": "true", "trainer.chunk_samples": chunk, "trainer.stale_after": stale, **more}


# What a launcher sets; a job sees only what its test gives it.
LAUNCHERS = re.compile(
    r"SLURM_|TORCHELASTIC_|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|NODE_RANK|PL_|FASTMEM_"
)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


class Job:
    """A command at work, in a forked process that has imported all or in one of its own."""

    def __init__(self, process: Any, out: Path) -> None:
        self.process, self.out = process, out
        self.pid: int = process.pid

    @property
    def status(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def said(self) -> Ran:
        texts = [self.out.with_suffix(suffix).read_text("utf-8", "replace") for suffix in (".out", ".err")]
        return Ran(self.status if self.status is not None else -1000, *texts)

    def send(self, number: signal.Signals) -> None:
        assert self.status is None, f"ended before it was sent {number.name}: {self.said()}"
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> Ran:
        end = time.monotonic() + timeout
        while self.status is None and time.monotonic() < end:
            time.sleep(0.02)
        if self.status is None:
            said = self.said()
            self.end()
            pytest.fail(f"no end within {timeout} s: {said.out}{said.err}")
        return self.said()

    def end(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGKILL)
        while self.status is None:
            time.sleep(0.02)


def _forked(arguments: list[str], variables: dict[str, str], cwd: str, out: str) -> None:
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # as the installed command does
    sys.argv = ["fastmem", *arguments]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Jobs:
    """Starts commands on the tiny model in a folder of its own, and ends what is left of them."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.cache = root / "cache"
        self.started: list[Job] = []
        self._numbers = itertools.count()
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload([__name__, *IMPORTS])
        # Before Python 3.13 the server does not get the parent's path, and skips what it cannot import.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()

    def variables(self, **more: object) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
        return {
            **kept,
            "OMP_NUM_THREADS": "1",
            "FASTMEM_CACHE": str(self.cache),
            **{name: str(value) for name, value in more.items()},
        }

    def arguments(
        self, run_dir: object, options: dict[str, object], command: str = "fit-predict"
    ) -> list[str]:
        data = self.root / "data.jsonl"
        if not data.exists():
            write(data, DATA)
        given = {"model.backbone": self.model, "data.path": data, **FAST, **options}
        if run_dir is not None:
            given["run_dir"] = run_dir
        return [command, *(str(p) for name, value in given.items() for p in (f"--{name}", value))]

    def start(
        self,
        run_dir: object,
        options: dict[str, object] | None = None,
        command: str = "fit-predict",
        variables: dict[str, object] | None = None,
        launch: list[str] | None = None,
    ) -> Job:
        """Start a command; with `launch` (a program and its options) in a new process, else forked."""
        arguments = self.arguments(run_dir, options or {}, command)
        out = self.root / f"job{next(self._numbers)}"
        environment = self.variables(**(variables or {}))
        process: Any
        for suffix in (".out", ".err"):
            out.with_suffix(suffix).touch()
        if launch is None:
            process = self._server.Process(
                target=_forked, args=(arguments, environment, str(self.root), str(out))
            )
            process.start()
        else:
            with open(f"{out}.out", "wb") as stdout, open(f"{out}.err", "wb") as stderr:
                process = subprocess.Popen(
                    [*launch, *arguments], cwd=self.root, env=environment, stdout=stdout, stderr=stderr
                )
        self.started.append(Job(process, out))
        return self.started[-1]

    def run(
        self, run_dir: object, options: dict[str, object] | None = None, expect: int = 0, **more: Any
    ) -> Ran:
        ran = self.start(run_dir, options, **more).wait()
        assert ran.status == expect, ran.err
        return ran

    def ranks(
        self,
        world: int,
        run_dir: object,
        options: dict[str, object] | None = None,
        command: str = "fit-predict",
        launcher: str = "torchrun",
        nodes: int = 1,
    ) -> list[Job]:
        """Start the processes of one run as torchrun or srun does."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
        local = world // nodes
        options = {"trainer.devices": local, "trainer.num_nodes": nodes, **(options or {})}
        jobs = []
        for rank in range(world):
            torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank % local,
                "GROUP_RANK": rank // local,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": local,
                "TORCHELASTIC_RUN_ID": "none",
            }
            slurm = {
                "SLURM_JOB_ID": 1234,
                "SLURM_JOB_NAME": "fastmem",
                "SLURM_NTASKS": world,
                "SLURM_NTASKS_PER_NODE": local,
                "SLURM_NNODES": nodes,
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank % local,
                "SLURM_NODEID": rank // local,
                "SLURM_NODELIST": "127.0.0.1",
            }
            given = address | (torchrun if launcher == "torchrun" else slurm)
            jobs.append(self.start(run_dir, options, command, given))
        return jobs

    def end(self) -> None:
        for job in self.started:
            job.end()


def finish(jobs: Iterable[Job], expect: int | None = 0, timeout: float = 60) -> list[Ran]:
    ran = [job.wait(timeout) for job in jobs]
    for one in ran:
        assert expect is None or one.status == expect, [(other.status, other.err) for other in ran]
    return ran


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    found = Jobs(tmp_path_factory.mktemp("shared"), tiny_folder)
    yield found
    found.end()


@pytest.fixture
def jobs(tiny_folder: Path, tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path, tiny_folder)
    yield found
    found.end()


@pytest.fixture(scope="module")
def single(shared: Jobs) -> Callable[..., Path]:
    """Run folder of a single process with these options; made once, not to be written to."""
    made: dict[str, Path] = {}

    def run(options: dict[str, object] | None = None, command: str = "fit-predict") -> Path:
        key = json.dumps([command, options], sort_keys=True)
        if key not in made:
            folder = shared.root / f"single{len(made)}"
            ran = shared.run(folder, options, command=command)
            (folder.with_suffix(".table")).write_text(ran.out)
            made[key] = folder
        return made[key]

    return run


# --- what is compared


def lines(folder: Path) -> list[bytes]:
    """All whole lines on disk, merged or not."""
    paths = [folder / "predictions.jsonl", *sorted((folder / "parts").glob("*.jsonl"))]
    found = []
    for path in paths:
        try:
            found += path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:  # merged in between
            continue
    return found


def kept(folder: Path) -> dict[int, list[bytes]]:
    """Lines of every sample that was answered by all methods; fails where one is there twice."""
    samples: dict[int, list[bytes]] = {}
    for line in lines(folder):
        samples.setdefault(json.loads(line)["index"], []).append(line)
    assert all(len(found) <= METHODS for found in samples.values()), "answered twice"
    return {index: found for index, found in samples.items() if len(found) == METHODS}


def assert_kept(before: dict[int, list[bytes]], folder: Path) -> None:
    """What was answered stands there unchanged, seconds included: it was not answered again."""
    after = (folder / "predictions.jsonl").read_bytes().splitlines()
    found = Counter(after)
    for index, sample in before.items():
        for line in sample:
            assert found[line] == 1, f"sample {index} was answered again"


def timeless(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def measured(folder: Path, name: str = "metrics.json") -> dict:
    """A summary without what the number of processes may change."""

    def without_seconds(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_seconds(v) for k, v in value.items() if not k.startswith("seconds")}
        return [without_seconds(one) for one in value] if isinstance(value, list) else value

    found = without_seconds(json.loads((folder / name).read_text()))
    del found["peak_memory_gib"]
    del found["environment"]["processes"]
    return found


def assert_same_records(folder: Path, expected: Path, rounding: bool = True) -> None:
    """In the order of the data, and to the last bit.

    With `rounding` losses may differ by it: after a stop or in chunks, batches are of other samples.
    """
    found = [timeless(read(one)) for one in (folder, expected)]
    if rounding:
        assert_same_curves(folder, expected)
        found = [[{**record, "curve": None} for record in records] for records in found]
    assert found[0] == found[1]


def assert_same(folder: Path, expected: Path, rounding: bool = True) -> None:
    """Records and metrics are those of the single process, and nothing is left beside them."""
    assert_same_records(folder, expected, rounding)
    assert measured(folder) == measured(expected)
    for left in ("parts", "work"):
        assert not (folder / left).exists(), f"{left}/ is left: {files(folder / left)}"


def memories(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.name: load_file(p) for p in sorted((folder / "memories").glob("*.safetensors"))}


def assert_same_memories(folder: Path, expected: Path) -> None:
    ours, theirs = memories(folder), memories(expected)
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, tensors in theirs.items():
        assert ours[name].keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(ours[name][key], value, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
    left = {path.name for path in (folder / "memories").iterdir()}
    assert left == {path.name for path in (expected / "memories").iterdir()}


NOISE = re.compile(r"Failed to load .*torchao|torch/utils/_pytree")
COMPLETE = "this run was complete already; nothing was left to do"


def table(out: str) -> list[str]:
    """The printed table and what follows, without seconds a sample, the run folder and the note to latecomers."""
    rows = [re.sub(r"│ +[\d.]+ │$", "│", line).rstrip() for line in out.splitlines()]
    return [row for row in rows if row and not row.startswith("run folder") and row != COMPLETE]


def until(condition: Callable[[], Any], *jobs: Job, timeout: float = 60) -> None:
    """Wait for a state on disk; fails when a job ends before."""
    end = time.monotonic() + timeout
    while not condition():
        for job in jobs:
            assert job.status is None, f"ended too early: {job.said()}"
        assert time.monotonic() < end, f"not reached within {timeout} s: {[job.said() for job in jobs]}"
        time.sleep(0.02)


def one_line(err: str) -> str:
    # What loading an optional package says is a matter of `test_real_launches`.
    err = "".join(line for line in err.splitlines(keepends=True) if not NOISE.search(line))
    assert err.count("\n") == 1, f"not one line: {err!r}"
    assert err.endswith("\n")
    assert err.startswith("fastmem: "), err
    return err


def answered(folder: Path) -> int:
    return len(kept(folder))


# --- data parallel


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (3, {"data.limit": 13}),
        (3, {"data.limit": 2}),
        (2, {"data.limit": 1}),
        (3, {"data.limit": 7, "model.decode.temperature": 0.8, "model.decode.seed": 3}),
        (2, {"data.batch_size": 32, "model.methods": "[fastmem+cad, zero-shot, dola]"}),
    ],
    ids=str,
)
def test_processes_give_the_results_of_one(jobs: Jobs, single, world: int, options: dict) -> None:
    expected = single(options)
    ran = finish(jobs.ranks(world, "run", options))
    assert_same(jobs.root / "run", expected, rounding="data.batch_size" in options)
    assert table(ran[0].out) == table(expected.with_suffix(".table").read_text())
    assert all(other.out == "" for other in ran[1:]), "the table is printed by several processes"
    assert all(one.err == "" for one in ran), [one.err for one in ran]
    metrics = json.loads((jobs.root / "run" / "metrics.json").read_text())
    assert metrics["environment"]["processes"] == world


def test_metrics_move_so_that_the_others_can_fail(single) -> None:
    methods = json.loads((single({}) / "metrics.json").read_text())["groups"]["all"]
    for name in ("contained", "output_words", "f1", "truncated"):
        values = {method["metrics"][name]["value"] for method in methods.values()}
        assert values != {0.0}, name
    assert len({r["prediction"] for r in read(single({}))}) > 20


@pytest.mark.parametrize(("launcher", "nodes"), [("slurm", 1), ("slurm", 2), ("torchrun", 2)])
def test_under_slurm_and_on_two_nodes(jobs: Jobs, single, launcher: str, nodes: int) -> None:
    finish(jobs.ranks(2, "run", {"trainer.strategy": "ddp"}, launcher=launcher, nodes=nodes))
    assert_same(jobs.root / "run", single({}), rounding=False)


def test_goes_on_with_other_numbers_of_processes_and_more_data(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    finish(jobs.ranks(2, "run", {"data.limit": 3}))
    before = kept(folder)
    finish(jobs.ranks(3, "run", {"data.limit": 10}))
    assert_kept(before, folder)
    assert sorted(before) == [0, 1, 2]
    before = kept(folder)
    assert sorted(before) == list(range(10))
    jobs.run("run", {"data.limit": 12})
    assert_kept(before, folder)
    before = kept(folder)
    finish(jobs.ranks(2, "run"))
    assert_kept(before, folder)
    assert_same(folder, single({}))
    content = (folder / "predictions.jsonl").read_bytes()
    finish(jobs.ranks(3, "run"))
    assert (folder / "predictions.jsonl").read_bytes() == content
    assert_same(folder, single({}))


def test_fit_then_predict_with_other_numbers_of_processes(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    finish(jobs.ranks(3, "run", command="fit"))
    assert_same_memories(folder, single({}, "fit"))
    finish(jobs.ranks(2, "run", command="predict"))
    jobs.run("alone", {"model.memories": folder / "memories"}, command="predict")
    alone = read(jobs.root / "alone")
    assert timeless(read(folder)) == timeless(alone)
    together = {(r["index"], r["method"]): r["token_ids"] for r in read(single({}))}
    assert {(r["index"], r["method"]): r["token_ids"] for r in alone} == together
    assert not (folder / "parts").exists()


def test_a_search_over_processes_is_that_of_one(jobs: Jobs, single) -> None:
    expected, folder = single(GRID, "search"), jobs.root / "run"
    ran = finish(jobs.ranks(3, "run", GRID, command="search"))
    assert timeless(read(folder)) == timeless(read(expected))
    found, other = (measured(f, "search.json") for f in (folder, expected))
    assert found == other
    best = [yaml.safe_load((f / "best.yaml").read_text()) for f in (folder, expected)]
    assert best[0]["model"] == best[1]["model"]
    assert not (folder / "parts").exists()
    assert all(other.out == "" for other in ran[1:])


@pytest.fixture(scope="module")
def launched(shared: Jobs) -> dict[str, tuple[Path, Ran]]:
    """Runs of two real processes, by the command, torchrun and a script."""
    script = shared.root / "script.py"
    script.write_text(
        "import sys\n"
        "from fastmem_pl import FastMemDataModule, FastMemModule, FastMemTrainer\n"
        "model, path, folder = sys.argv[1:4]\n"
        "trainer = FastMemTrainer(accelerator='cpu', devices=2, enable_progress_bar=False)\n"
        "module = FastMemModule(backbone=model, steps=3, learning_rate=0.01, max_new_tokens=6, max_context_tokens=40)\n"
        f"data = FastMemDataModule(task='nqswap', path=path, batch_size=2, answer_prefix={PREFIX!r})\n"
        "trainer.fit_predict(module, data, run_dir=folder)\n"
    )
    two = {"trainer.devices": 2}
    program = [sys.executable, "-m", "fastmem_pl"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for name, launch in {"command": program, "torchrun": [*torchrun, "--no-python", FASTMEM]}.items():
        folder = shared.root / name
        found[name] = folder, shared.start(folder, two, launch=launch).wait(100)
    folder = shared.root / "script"
    arguments = [sys.executable, str(script), str(shared.model), str(shared.root / "data.jsonl"), str(folder)]
    done = subprocess.run(
        arguments, cwd=shared.root, env=shared.variables(), timeout=100, capture_output=True, text=True
    )
    found["script"] = folder, Ran(done.returncode, done.stdout, done.stderr)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["command", "torchrun", "script"])
def test_real_launches(launched, single, name: str) -> None:
    folder, ran = launched[name]
    assert ran.status == 0, ran.err
    assert_same(folder, single({}))
    expected = table(single({}).with_suffix(".table").read_text())
    if name != "script":
        assert table(ran.out) == expected, "not one table"
        said = [line for line in ran.err.splitlines() if "OMP_NUM_THREADS" not in line and line.strip("* ")]
        assert not [line for line in said if not line.startswith(("W", "[W"))], ran.err


def test_a_mistake_of_several_processes_is_said_once(jobs: Jobs) -> None:
    before = files(jobs.root)
    launch = [sys.executable, "-m", "fastmem_pl"]
    job = jobs.start("run", {"trainer.devices": 2, "data.path": "none.jsonl"}, launch=launch)
    status, out, err = job.wait(90)
    assert status == 2
    assert out == ""
    assert one_line(err).count("none.jsonl") == 1
    assert_nothing_written(jobs, before)


def assert_nothing_written(jobs: Jobs, before: dict[str, bytes | None]) -> None:
    left = {name for name in files(jobs.root).keys() - before.keys() if not name.startswith("job")}
    assert left <= {"data.jsonl", "cache"}, f"written: {left}"


@pytest.mark.parametrize(
    ("world", "command", "options", "named"),
    [
        (2, "fit-predict", {"data.path": "none.jsonl"}, "none.jsonl"),
        (2, "fit-predict", {"trainer.devices": 1}, "devices"),
        (2, "fit-predict", {"model.memorize.steps": -1}, "steps"),
        (2, "fit-predict", {"model.backbone": "no-such-folder/x"}, "no-such-folder"),
        (2, "fit-predict", {"trainer.elastic": "true"}, "elastic"),
        (1, "fit-predict", {"trainer.devices": 2, "trainer.strategy": "ddp_spawn"}, "trainer.strategy"),
        (1, "fit-predict", {"trainer.devices": 2, "trainer.strategy": "ddp_fork"}, "trainer.strategy"),
        (1, "fit-predict", {"trainer.devices": 2, "trainer.strategy": "fsdp"}, "fsdp"),
        (1, "fit-predict", {"trainer.devices": 0}, "devices"),
        (1, "fit-predict", {"trainer.devices": 2, "trainer.elastic": "true"}, "elastic"),
        (1, "fit", {"trainer.num_nodes": 2, "trainer.elastic": "true"}, "elastic"),
        (1, "search", {"trainer.elastic": "true"}, "elastic"),
        (1, "fit-predict", {"trainer.elastic": "true", "trainer.chunk_samples": 0}, "chunk_samples"),
        (1, "fit-predict", {"trainer.elastic": "true", "trainer.stale_after": 0.5}, "stale_after"),
        (1, "fit-predict", {"model.backbone.tp_plan": "auto"}, "tp_plan"),
        (1, "fit-predict", {"model.backbone.tp_plan": "colwise"}, "tp_plan"),
        (1, "fit-predict", {"model.backbone.quantization": "bnb-4bits"}, "bnb-4bit"),
        (1, "fit-predict", {"model.backbone.device_map": "blanced"}, "balanced"),
    ],
    ids=str,
)
def test_mistakes_are_refused_in_one_line(
    jobs: Jobs, world: int, command: str, options: dict, named: str
) -> None:
    before = files(jobs.root)
    if world > 1:
        started = jobs.ranks(world, "run", options, command)
    else:
        started = [jobs.start("run", {**(GRID if command == "search" else {}), **options}, command)]
    ran = finish(started, 2)
    assert "".join(one.out for one in ran) == ""
    assert named in one_line("".join(one.err for one in ran))
    assert_nothing_written(jobs, before)


# --- processes that die or are told to end


@pytest.mark.parametrize("world", [2, 3])
def test_a_killed_process_leaves_the_others_work(jobs: Jobs, single, world: int) -> None:
    folder = jobs.root / "run"
    started = jobs.ranks(world, "run", SLOW)
    until(lambda: answered(folder) >= 2, *started)
    started[-1].send(signal.SIGKILL)
    at_kill = kept(folder)
    ran = finish(started[:-1], 75)
    line = one_line("".join(one.err for one in ran))
    assert "same command" in line, line
    assert "process" in line
    assert not (folder / "metrics.json").exists()
    before = kept(folder)
    assert at_kill.items() <= before.items()
    # The others have answered their share, not only the batch in work.
    assert len(DATA) - -(-len(DATA) // world) <= len(before) < len(DATA)
    finish(jobs.ranks(5 - world, "run", SLOW))
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


def test_a_killed_first_process_ends_the_others(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    started = jobs.ranks(3, "run", SLOW)
    until(lambda: answered(folder) >= 2, *started)
    started[0].send(signal.SIGKILL)
    ran = finish(started[1:], None, timeout=40)
    assert all(one.status not in (0, 2) for one in ran), [one.status for one in ran]
    assert all(one.err.count("\n") <= 1 and "Traceback" not in one.err for one in ran), [
        one.err for one in ran
    ]
    assert any("same command" in one.err for one in ran), [one.err for one in ran]
    before = kept(folder)
    assert before
    jobs.run("run", SLOW)
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [0, 1])
def test_kills_among_processes_that_the_command_started(jobs: Jobs, single, victim: int) -> None:
    folder = jobs.root / "run"
    job = jobs.start("run", {**SLOW, "trainer.devices": 2}, launch=[sys.executable, "-m", "fastmem_pl"])
    until(lambda: answered(folder) >= 2, job, timeout=90)
    (child,) = children(job.pid)
    os.kill(child if victim else job.pid, signal.SIGKILL)
    status, _, err = job.wait(60)
    if victim:
        assert status == 75, err
        # At once, so that nobody waits for hours to hear of it; and once more at the end.
        early, _, last = err.partition("\n")
        assert "ended by signal 9; the others finish" in early
        assert "same command" in one_line(last)
    else:
        end = time.monotonic() + 40
        while running(child) and time.monotonic() < end:
            time.sleep(0.05)
        try:
            assert not running(child), "outlives the first process"
        finally:
            if running(child):
                os.kill(child, signal.SIGKILL)
    before = kept(folder)
    finish(jobs.ranks(2, "run", SLOW))
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"fit-predict" in command:
            found.append(int(entry.name))
    return found


def running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def stop(
    jobs: list[Job], to: list[Job], folder: Path, number: signal.Signals
) -> tuple[dict, dict, list[Ran]]:
    """Send a signal in the middle of a batch; gives what was there then and at the end."""
    until(lambda: answered(folder) >= 2, *jobs)
    time.sleep(0.15)  # out of the writing and into the next batch
    at_signal = kept(folder)
    for job in to:
        job.send(number)
    ran = finish(jobs, STOPS[number], timeout=30)
    return at_signal, kept(folder), ran


@pytest.mark.parametrize("options", [{}, elastic(4)], ids=str)
def test_sigterm_finishes_the_batch(jobs: Jobs, single, options: dict) -> None:
    folder = jobs.root / "run"
    job = jobs.start("run", {**SLOW, **options})
    at_signal, before, (ran,) = stop([job], [job], folder, signal.SIGTERM)
    assert len(before) in (len(at_signal) + 2, len(at_signal) + 4), "the batch in work was not finished"
    assert at_signal.items() <= before.items()
    assert len(lines(folder)) == METHODS * len(before), "a sample is there by halves"
    line = one_line(ran.err)
    assert "same command" in line, line
    assert "SIGTERM" in line, line
    assert not (folder / "metrics.json").exists()
    jobs.run("run", {**SLOW, **options})
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


@pytest.mark.parametrize(
    ("number", "everyone", "launcher"),
    [
        (signal.SIGTERM, False, "torchrun"),
        (signal.SIGTERM, True, "torchrun"),
        (signal.SIGTERM, True, "slurm"),
        (signal.SIGINT, True, "torchrun"),
    ],
)
def test_signals_to_several_processes(
    jobs: Jobs, single, number: signal.Signals, everyone: bool, launcher: str
) -> None:
    folder = jobs.root / "run"
    started = jobs.ranks(2, "run", SLOW, launcher=launcher)
    at_signal, before, ran = stop(started, started if everyone else started[:1], folder, number)
    assert at_signal.items() <= before.items()
    assert len(before) < len(DATA)
    if number is signal.SIGTERM:
        assert len(before) >= len(at_signal) + 2, "the batch in work was not finished"
        assert len(lines(folder)) == METHODS * len(before), "a sample is there by halves"
    assert "same command" in one_line("".join(one.err for one in ran))
    jobs.run("run", SLOW)
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


@pytest.mark.parametrize("wait", [0.01, 0.015, 0.02])
def test_sigterm_before_the_first_batch_is_not_lost(jobs: Jobs, single, wait: float) -> None:
    folder = jobs.root / "run"
    started = jobs.ranks(2, "run", SLOW)
    until((folder / "parts").exists, *started)
    time.sleep(wait)
    for job in started:
        job.send(signal.SIGTERM)
    ran = finish(started, None, timeout=30)
    # Before the command has set up anything, the signal itself may end it.
    assert all(one.status in (143, -signal.SIGTERM) for one in ran), [(one.status, one.err) for one in ran]
    before = kept(folder)
    assert len(before) <= 8
    finish(jobs.ranks(2, "run", SLOW))
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


@pytest.mark.timeout(240)
def test_sigterm_to_the_command_that_started_two(jobs: Jobs) -> None:
    folder = jobs.root / "run"
    launch = [sys.executable, "-m", "fastmem_pl"]
    job = jobs.start("run", {**SLOW, "trainer.devices": 2}, launch=launch)
    until(lambda: answered(folder) >= 2, job, timeout=90)
    started = children(job.pid)
    at_signal = kept(folder)
    job.send(signal.SIGTERM)
    status, _, err = job.wait(30)
    assert status == 143, err
    one_line(err)
    assert not [pid for pid in started if running(pid)], "a process is left"
    assert at_signal.items() <= kept(folder).items()
    assert len(lines(folder)) == METHODS * answered(folder)


@pytest.mark.parametrize("command", ["fit", "search", "predict"])
def test_sigterm_to_the_other_commands(jobs: Jobs, single, command: str) -> None:
    folder, options = jobs.root / "run", dict(SLOW)
    if command == "search":
        options |= {"search.grid": "{learning_rate: [1e-3], steps: [60, 120]}", "search.every": 1}
    if command == "predict":
        options |= {"model.decode.max_new_tokens": 40, "model.methods": "[zero-shot, cad, dola]"}
    job = jobs.start("run", options, command)
    until(lambda: len(memories(folder) if command == "fit" else lines(folder)), job)
    job.send(signal.SIGTERM)
    ran = job.wait(30)
    assert ran.status == 143, ran.err
    one_line(ran.err)
    before = files(folder / "memories") if command == "fit" else set(lines(folder))
    jobs.run("run", options, command=command)
    if command == "fit":
        after = files(folder / "memories")
        assert {n: after[n] for n in before if n.endswith("safetensors")} == {
            n: v for n, v in before.items() if n.endswith("safetensors")
        }
        assert_same_memories(folder, single(options, "fit"))
    else:
        assert before <= set(lines(folder)), "answered again"
        assert timeless(read(folder)) == timeless(read(single(options, command)))


# --- disks and file systems


class Disk:
    """A small file system of its own, seen at `here`."""

    def __init__(self, root: Path, size: str) -> None:
        self.store, self.here = root / "store", root / "disk"
        self.store.mkdir()
        self.here.mkdir()
        call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.store))
        self.attach()

    def attach(self) -> None:
        call("mount", "--bind", str(self.store), str(self.here))

    def detach(self) -> None:
        call("umount", "-l", str(self.here))

    def resize(self, size: str) -> None:
        call("mount", "-o", f"remount,size={size}", str(self.store))

    def free(self) -> int:
        state = os.statvfs(self.here)
        return state.f_bavail * state.f_frsize

    def fill(self, but: int) -> Path:
        """Leave only `but` bytes."""
        filler = self.here / "filler"
        for _ in range(20):
            try:
                filler.write_bytes(b"x" * (self.free() - but))
                break
            except OSError:
                # The run, which writes its log too, took some of it meanwhile.
                filler.unlink(missing_ok=True)
        return filler


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounts a file system: needs root on Linux")
    try:
        found = Disk(tmp_path, "4m")
    except subprocess.CalledProcessError as error:
        subprocess.run(["umount", "-l", str(tmp_path / "store")], capture_output=True)
        pytest.skip(f"no mount here: {error.stderr.decode()}")
    yield found
    for place in (found.here, found.store):
        while os.path.ismount(place):
            call("umount", "-l", str(place))


def rescued(jobs: Jobs) -> list[Path]:
    return [path for path in (jobs.cache / "rescued").rglob("*") if path.is_file()]


def rescued_records(jobs: Jobs) -> list[dict]:
    text = "".join(path.read_text() for path in rescued(jobs))
    return [json.loads(line) for line in text.splitlines() if '"prediction"' in line]


def assert_taken_in(records: list[dict], folder: Path) -> None:
    """Rescued records stand in the results with their seconds: they were not answered again."""
    found = {(r["index"], r["method"]): r for r in read(folder)}
    for record in records:
        assert found[record["index"], record["method"]] == record


@pytest.mark.parametrize(("way", "left"), [("one", 4096), ("ranks", 4096), ("elastic", 4096), ("elastic", 0)])
def test_a_full_disk_loses_nothing(jobs: Jobs, single, disk: Disk, way: str, left: int) -> None:
    folder = disk.here / "run"
    options = elastic(4, **SLOW) if way == "elastic" else SLOW
    started = jobs.ranks(2, folder, options) if way == "ranks" else [jobs.start(folder, options)]
    until(lambda: answered(folder) >= 2, *started)
    filler = disk.fill(but=left)
    ran = finish(started, 75)
    for one in ran:
        said = one_line(one.err)
        assert "No space left on device" in said, said
        assert str(folder) in said, said
        assert "same command" in said, said
    before, saved = kept(folder), rescued_records(jobs)
    assert saved, f"nothing was rescued: {files(jobs.cache)}"
    assert len(saved) % METHODS == 0
    assert not {r["index"] for r in saved} & before.keys(), "both rescued and written"
    filler.unlink()
    jobs.run(folder, options)
    assert_kept(before, folder)
    assert_taken_in(saved, folder)
    assert_same(folder, single(SLOW))
    assert not rescued(jobs), "rescued batches are left"


def test_a_disk_that_stays_full_says_so_again_and_loses_nothing(jobs: Jobs, single, disk: Disk) -> None:
    folder = disk.here / "run"
    job = jobs.start(folder, SLOW)
    until(lambda: answered(folder) >= 2, job)
    filler = disk.fill(but=0)
    assert job.wait().status == 75
    before, saved = kept(folder), rescued_records(jobs)
    for _ in range(2):
        again = jobs.start(folder, SLOW).wait()
        assert again.status in (2, 75), again.err
        assert "No space left on device" in one_line(again.err)
    assert kept(folder).items() >= before.items()
    later = {(r["index"], r["method"]): r for r in rescued_records(jobs)}
    assert all(later[r["index"], r["method"]] == r for r in saved), "a rescued batch is gone"
    filler.unlink()
    finish(jobs.ranks(2, folder, SLOW))
    assert_kept(before, folder)
    assert_taken_in(saved, folder)
    assert_same(folder, single(SLOW))


def test_a_rescue_that_is_not_possible_is_said(jobs: Jobs, single, disk: Disk) -> None:
    folder, jobs.cache = disk.here / "run", disk.here / "cache"
    job = jobs.start(folder, SLOW)
    until(lambda: answered(folder) >= 2, job)
    filler = disk.fill(but=0)
    ran = job.wait()
    assert ran.status == 75, ran.err
    assert "same command" in one_line(ran.err)
    before = kept(folder)
    filler.unlink()
    jobs.run(folder, SLOW)
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


def test_a_full_disk_while_memories_are_saved(jobs: Jobs, single, disk: Disk) -> None:
    folder = disk.here / "run"
    job = jobs.start(folder, SLOW, "fit")
    until(lambda: memories(folder), job)
    filler = disk.fill(but=8192)
    ran = job.wait()
    assert ran.status == 75, ran.err
    assert "No space left on device" in one_line(ran.err)
    assert "same command" in one_line(ran.err)
    filler.unlink()
    jobs.run(folder, SLOW, command="fit")
    assert_same_memories(folder, single(SLOW, "fit"))


@pytest.mark.parametrize("shared_out", [False, True])
def test_a_file_system_that_goes_and_comes_back(jobs: Jobs, single, disk: Disk, shared_out: bool) -> None:
    folder = disk.here / "run"
    # The claim cannot be given back to a file system that is gone.
    options = elastic(4, 2, **SLOW) if shared_out else SLOW
    job = jobs.start(folder, options)
    until(lambda: answered(folder) >= 2, job)
    disk.detach()
    ran = job.wait()
    assert ran.status == 75, ran.err
    line = one_line(ran.err)
    assert str(folder) in line
    assert "same command" in line, line
    assert not list(disk.here.iterdir()), "written to the place where the file system was"
    disk.attach()
    before, saved = kept(folder), rescued_records(jobs)
    assert before
    jobs.run(folder, options)
    assert_kept(before, folder)
    assert_taken_in(saved, folder)
    assert_same(folder, single(SLOW))
    assert not rescued(jobs), "rescued batches are left"


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_folder_that_is_removed_in_the_middle(jobs: Jobs, single, world: int) -> None:
    folder, moved = jobs.root / "run", jobs.root / "moved"
    started = jobs.ranks(world, "run", SLOW) if world > 1 else [jobs.start("run", SLOW)]
    until(lambda: answered(folder) >= 2, *started)
    folder.rename(moved)
    ran = finish(started, 75)
    for one in ran:
        assert "same command" in one_line(one.err)
    before, saved = kept(moved), rescued_records(jobs)
    assert len(before) + len(saved) // METHODS > 2
    assert not folder.exists() or not lines(folder)
    shutil.rmtree(folder, ignore_errors=True)
    moved.rename(folder)
    jobs.run("run", SLOW)
    assert_kept(before, folder)
    assert_taken_in(saved, folder)
    assert_same(folder, single(SLOW))


# --- elastic


def claims(folder: Path) -> int:
    return len([path for path in (folder / "work").rglob("*") if path.is_file()])


@pytest.mark.parametrize(
    ("workers", "chunk", "limit"), [(1, 5, 13), (2, 3, 14), (4, 1, 14), (3, 100, 14), (2, 2, 1)]
)
def test_workers_give_the_results_of_one(jobs: Jobs, single, workers: int, chunk: int, limit: int) -> None:
    expected = single({"data.limit": limit})
    ran = finish([jobs.start("run", elastic(chunk, **{"data.limit": limit})) for _ in range(workers)])
    assert_same(jobs.root / "run", expected)
    for one in ran:
        assert table(one.out) == table(expected.with_suffix(".table").read_text())
        assert "Traceback" not in one.err


def test_a_late_worker_finds_all_done(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    first = jobs.run("run", elastic(4))
    content = (folder / "predictions.jsonl").read_bytes()
    late = jobs.run("run", elastic(3))
    assert table(late.out) == table(first.out)
    assert (folder / "predictions.jsonl").read_bytes() == content
    assert_same(folder, single({}))


def test_workers_with_chunks_of_their_own(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    first = jobs.start("run", elastic(4, **SLOW))
    until(lambda: answered(folder) >= 2, first)
    second = jobs.start("run", elastic(3, **SLOW)).wait()
    assert second.status in (0, 2), second.err
    if second.status:
        assert "chunk_samples" in one_line(second.err)
    finish([first])
    assert_same(folder, single(SLOW))


def test_a_killed_workers_chunk_is_taken_over(jobs: Jobs, single) -> None:
    folder, options = jobs.root / "run", elastic(6, 2, **SLOW)
    victim = jobs.start("run", options)
    until(lambda: answered(folder) >= 2, victim)
    second = jobs.start("run", options)
    until(lambda: answered(folder) >= 6, victim, second)
    victim.send(signal.SIGKILL)
    until(lambda: victim.status is not None)
    before = kept(folder)
    third = jobs.start("run", options)
    ran = finish([second, third])
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))
    assert table(ran[0].out) == table(ran[1].out)


def test_a_live_workers_chunk_is_not_taken_over(jobs: Jobs, single) -> None:
    """A batch of several times `stale_after`: the claim of one who works is kept alive."""
    folder = jobs.root / "run"
    options = elastic(7, 1, **{**SLOW, "model.memorize.steps": 600, "data.batch_size": 7})
    started = [jobs.start("run", options) for _ in range(3)]
    finish(started)
    records = read(folder)
    assert len(records) == METHODS * len(DATA)
    memorized = {(r["index"], r["seconds"]["memorize"]) for r in records if r["seconds"]["memorize"]}
    assert len(memorized) == len(DATA)
    assert not (folder / "parts").exists()
    assert not (folder / "work").exists()


def test_a_worker_that_was_suspended_does_no_harm(jobs: Jobs, single) -> None:
    folder, options = jobs.root / "run", elastic(4, 1, **SLOW)
    sleeper = jobs.start("run", options)
    until(lambda: answered(folder) >= 2, sleeper)
    time.sleep(0.1)
    sleeper.send(signal.SIGSTOP)
    before = kept(folder)
    finish([jobs.start("run", options)])
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))
    content = (folder / "predictions.jsonl").read_bytes()
    os.kill(sleeper.pid, signal.SIGCONT)
    ran = sleeper.wait()
    assert "Traceback" not in ran.err
    assert (folder / "predictions.jsonl").read_bytes() == content, "changed after the end"
    assert_same(folder, single(SLOW))
    jobs.run("run", options)
    assert (folder / "predictions.jsonl").read_bytes() == content


@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_worker_gives_its_claim_back(jobs: Jobs, single, number: signal.Signals) -> None:
    folder, options = jobs.root / "run", elastic(7, 300, **SLOW)
    leaver = jobs.start("run", options)
    until(lambda: answered(folder) >= 2, leaver)
    stayer = jobs.start("run", options)
    until(lambda: answered(folder) >= 4, leaver, stayer)
    leaver.send(number)
    ran = leaver.wait(30)
    assert ran.status == STOPS[number], ran.err
    assert "same command" in one_line(ran.err)
    before = kept(folder)
    # Far less than stale_after.
    finish([stayer], timeout=40)
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


def test_a_worker_that_waits_for_others_can_be_stopped(jobs: Jobs) -> None:
    folder, options = jobs.root / "run", elastic(14, 300, **{**SLOW, "model.memorize.steps": 400})
    first = jobs.start("run", options)
    until(lambda: answered(folder) >= 2, first)
    waiting = jobs.start("run", options)
    time.sleep(3)
    assert first.status is None
    waiting.send(signal.SIGTERM)
    ran = waiting.wait(10)
    assert ran.status == 143, ran.err
    one_line(ran.err)
    finish([first])
    assert len(kept(folder)) == len(DATA)


def test_a_worker_of_other_settings_is_refused(jobs: Jobs) -> None:
    folder = jobs.root / "run"
    first = jobs.start("run", elastic(4, **SLOW))
    until(lambda: answered(folder) >= 2, first)
    for options, named in (
        (elastic(4, **{**SLOW, "model.memorize.steps": 149}), "model.memorize.steps"),
        (SLOW, "another process is writing"),
    ):
        refused = jobs.run("run", options, expect=2)
        assert refused.out == ""
        assert named in one_line(refused.err)
    finish([first])
    assert len(kept(folder)) == len(DATA)


def test_a_worker_is_refused_where_an_ordinary_run_is_alive(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    first = jobs.start("run", SLOW)
    until(lambda: answered(folder) >= 2, first)
    said = jobs.run("run", elastic(4, **SLOW), expect=2).err
    assert "another process is writing" in one_line(said)
    several = finish(jobs.ranks(2, "run", SLOW), 2)
    assert "another process is writing" in one_line("".join(one.err for one in several))
    finish([first])
    assert_same(folder, single(SLOW))


def test_workers_fit_and_others_predict(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    ran = finish([jobs.start("run", elastic(3), "fit") for _ in range(2)])
    assert_same_memories(folder, single({}, "fit"))
    assert not (folder / "work").exists()
    assert all("Traceback" not in one.err for one in ran)
    finish([jobs.start("run", elastic(4), "predict") for _ in range(2)])
    jobs.run("alone", {"model.memories": single({}, "fit") / "memories"}, command="predict")
    assert_same_records(folder, jobs.root / "alone")
    assert not (folder / "work").exists()


def test_workers_go_on_after_an_ordinary_run(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    started = jobs.ranks(2, "run", SLOW)
    until(lambda: answered(folder) >= 4, *started)
    for job in started:
        job.send(signal.SIGKILL)
        until(lambda job=job: job.status is not None)
    before = kept(folder)
    finish([jobs.start("run", elastic(3, **SLOW)) for _ in range(2)])
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ordinary_run_goes_on_after_workers(jobs: Jobs, single, number: signal.Signals) -> None:
    folder = jobs.root / "run"
    started = [jobs.start("run", elastic(4, 300, **SLOW)) for _ in range(2)]
    until(lambda: answered(folder) >= 4, *started)
    for job in started:
        job.send(number)
    for job in started:
        until(lambda job=job: job.status is not None)
    before = kept(folder)
    finish(jobs.ranks(2, "run", SLOW) if number is signal.SIGTERM else [jobs.start("run", SLOW)])
    assert_kept(before, folder)
    assert_same(folder, single(SLOW))


def test_workers_take_more_data(jobs: Jobs, single) -> None:
    folder = jobs.root / "run"
    jobs.run("run", elastic(2, **{"data.limit": 5}))
    before = kept(folder)
    assert sorted(before) == list(range(5))
    finish([jobs.start("run", elastic(3)) for _ in range(2)])
    assert_kept(before, folder)
    assert_same(folder, single({}))
    smaller = jobs.run("run", elastic(3, **{"data.limit": 5}), expect=2)
    assert "data.limit" in one_line(smaller.err)


def test_work_holds_claims_only_while_the_run_lasts(jobs: Jobs) -> None:
    folder = jobs.root / "run"
    job = jobs.start("run", elastic(4, **SLOW))
    until(lambda: answered(folder) >= 2, job)
    assert claims(folder)
    finish([job])
    assert not (folder / "work").exists()
    content = (folder / "predictions.jsonl").read_text()
    assert "worker" not in content
    assert socket.gethostname() not in content.replace(PREFIX, "")
