"""Commands killed at random moments go on, do nothing twice, and end as one that was never killed."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from ranks import Forked, assert_same_memories, lines
from ranks import _timeless as timeless
from runs import NQ, QUIET, options, write
from safetensors.torch import load_file

from fastmem_pl.cli import lightning, main, memorize  # noqa: F401 (imported once for all forks)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
KILLS = 20
SEARCH = {"search__grid": {"steps": [1, 2], "kl_coeff": [0.1, 1.0]}}


class Command:
    """A command in forks of this process, which are killed at a given call of a function in Python."""

    def __init__(self, name: str, model: Path, root: Path) -> None:
        self.name, self.root = name, root
        data = write(root / "nq.json", NQ[:3])
        given = {
            "backbone": model,
            "steps": 2,
            "learning_rate": 0.01,
            "max_new_tokens": 4,
            "data__task": "nqswap",
        }
        more = SEARCH if name == "search" else {}
        self.arguments = options(**given, data__path=data, data__batch_size=1, **QUIET, **more)
        if name == "memorize":
            (root / "notes.txt").write_text("The tower stands in Rome. " * 9)
            self.arguments = [str(root / "notes.txt"), "--model", str(model), "--steps", "3", "--force"]

    def run(self, folder: Path, kill_at: int = 0, count: bool = False) -> int:
        """Status, or minus the number of the signal; the calls of a run to its end are written beside it."""
        place = (
            ["--out", str(folder / "m.fastmem")] if self.name == "memorize" else ["--run_dir", str(folder)]
        )
        if self.name == "memorize":
            folder.mkdir(exist_ok=True)

        def work() -> int:
            calls = 0

            def note(frame, event, argument) -> None:
                nonlocal calls
                calls += event == "call"
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            if kill_at or count:
                sys.setprofile(note)
            status = main([self.name, *self.arguments, *place])
            sys.setprofile(None)
            self.root.joinpath("calls").write_text(str(calls))
            return status

        with open(self.root / "output", "wb") as output:
            return Forked(work, dict(os.environ), output.fileno()).wait()


def assert_same(name: str, folder: Path, expected: Path) -> None:
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".partial")}
    assert left == {path.name for path in expected.iterdir()}
    if name == "memorize":
        ours, theirs = (load_file(path / "m.fastmem") for path in (folder, expected))
        assert all(ours[key].equal(tensor) for key, tensor in theirs.items())
    elif name == "fit":
        assert_same_memories(folder, expected)
    else:
        for file in ("predictions.jsonl", *(["metrics.json"] if name == "fit-predict" else ["search.json"])):
            assert timeless(folder / file) == timeless(expected / file)


@pytest.mark.parametrize("name", ["fit-predict", "fit", "search", "memorize"])
def test_a_command_that_is_killed_anywhere_goes_on(tiny_folder, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    command, expected = Command(name, tiny_folder, tmp_path), tmp_path / "whole"
    assert command.run(expected, count=True) == 0, (tmp_path / "output").read_text()
    calls = int((tmp_path / "calls").read_text())
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for number in range(KILLS):
        folder, moment = tmp_path / f"killed{number}", moments.randrange(1, calls)
        assert command.run(folder, moment) in (0, -signal.SIGKILL)
        before = [line for line in lines(folder) if line.endswith(b"\n")] if name == "fit-predict" else []
        assert command.run(folder) == 0, (seed, moment, (tmp_path / "output").read_text())
        assert_same(name, folder, expected)
        after = lines(folder) if name == "fit-predict" else []
        # A sample that all methods had answered is not answered again.
        whole = [line for line in before if sum(line[:11] == other[:11] for other in before) == 3]
        assert set(whole) <= set(after), (seed, moment)
