"""A small file system of a test's own, to fill and to take away."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A small file system of its own, seen at ``here``."""

    def __init__(self, root: Path) -> None:
        self.store, self.here = root / "store", root / "disk"
        for folder in (self.store, self.here):
            folder.mkdir()
        _call("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(self.store))
        self.attach()

    def attach(self) -> None:
        _call("mount", "--bind", str(self.store), str(self.here))

    def detach(self) -> None:
        _call("umount", "-l", str(self.here))

    def fill(self, but: int) -> Path:
        """Leave only ``but`` bytes."""
        state = os.statvfs(self.here)
        filler = self.here / "filler"
        filler.write_bytes(b"x" * (state.f_bavail * state.f_frsize - but))
        return filler


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def own_disk(root: Path) -> Iterator[Disk]:
    """A disk while this lasts; skips the test where none can be had."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounts a file system: needs root on Linux")
    try:
        try:
            found = Disk(root)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no mount here: {error.stderr.decode()}")
        yield found
    finally:
        for place in (root / "disk", root / "store"):
            while os.path.ismount(place):
                _call("umount", "-l", str(place))
