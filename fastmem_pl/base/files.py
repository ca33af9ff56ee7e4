"""Writing to where the user said: refused early, whole or not at all, and nothing foreign replaced."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.base.outside import read_json

MANIFEST = "export.json"
"""File of an exported folder that lists, under ``files``, what the export wrote."""


def check_target(path: Path, force: bool, folder: bool = False) -> None:
    """Refuse what cannot or must not be written, before anything is computed.

    ``force`` allows to replace a file, or a ``folder`` that holds an export and nothing else.
    """
    try:
        _check_existing(path, force, folder)
        if not path.absolute().parent.is_dir():
            raise FastMemError(f"there is no folder {path.absolute().parent} to write {path.name} into")
        if not path.exists():
            # Only trying shows that the name and the place will do.
            path.touch(exist_ok=False)
            path.unlink()
    except OSError as error:
        raise FastMemError(f"cannot write {path}: {error.strerror}") from error


def _check_existing(path: Path, force: bool, folder: bool) -> None:
    if path.is_symlink():
        raise FastMemError(f"{path} is a link; give the place itself as --out")
    if not path.exists():
        return
    if not force:
        raise FastMemError(f"{path} exists; give --force to replace it, or another --out")
    if path.is_dir() != folder:
        kind = "folder" if path.is_dir() else "file"
        raise FastMemError(f"{path} is a {kind}, which --force does not replace; give another --out")
    if folder:
        if path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise FastMemError(f"{path} is the folder you are in, or one around it; give another --out")
        try:
            own = {*read_json(path / MANIFEST, dict[str, Any])["files"], MANIFEST}
        except (FastMemError, KeyError, TypeError):
            own = set()
        for part in sorted(path.iterdir()):
            if part.name not in own or not part.is_file():
                raise FastMemError(
                    f"{path} holds {part.name}, which fastmem export did not write; give another --out"
                )


@contextmanager
def new_folder(path: Path, bytes_needed: int) -> Iterator[Path]:
    """A folder to write to that takes its place when all is written, and is removed when it is not."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free < bytes_needed:
        raise FastMemError(
            f"cannot write {path}: it takes {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some disk or give another --out"
        )
    partial, earlier = _beside(path), _beside(path)
    try:
        partial.mkdir()
        yield partial
        # What is replaced stays until the new one is in its place.
        if path.exists():
            path.rename(earlier)
        try:
            partial.rename(path)
        except BaseException:
            if earlier.exists():
                earlier.rename(path)
            raise
    except OSError as error:
        raise FastMemError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes its place when it is whole, and is removed when it is not."""
    partial = _beside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(setting: str, path: Path, error: OSError) -> FastMemError:
    """The error for what cannot be written; with more room on the disk, the same command may do."""
    message = f"{setting}cannot write {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunStoppedError(f"{message}; free some disk, and the same command goes on from there")
    return FastMemError(message)


def as_path(place: str | Path) -> Path:
    """A path; of a URL of a store that fsspec knows, such as ``s3://bucket/runs``, one with the same methods.

    Raises:
        FastMemError: without the packages that the URL needs.
    """
    if not isinstance(place, str):
        return place
    if "\0" in place:
        raise FastMemError(f"{place}: no file has a NUL in its name")
    if "://" not in place:
        return Path(os.path.expanduser(place))
    if place.startswith("file://"):
        return Path(url2pathname(urlsplit(place).path))
    try:
        from upath import UPath

        # Others write there as well.
        path = UPath(place, use_listings_cache=False)
        path.fs  # noqa: B018 (imports what the protocol needs)
    except ImportError as error:
        needed = 'pip install "fastmem-pl[ray]"' if error.name == "upath" else " ".join(str(error).split())
        raise FastMemError(f"{place}: {needed}") from error
    except ValueError as error:
        raise FastMemError(f"{place}: {error}") from error
    return path


def is_remote(path: Path) -> bool:
    """Whether a path is that of a URL."""
    return not isinstance(path, Path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, finds the old content or the new."""
    if is_remote(path):
        # A store shows objects when they are whole.
        path.write_bytes(to_bytes(content))
        return
    with whole_file(path) as partial, open(partial, "wb") as file:
        file.write(to_bytes(content))
        file.flush()
        os.fsync(file.fileno())


def free_name(path: Path) -> Path:
    """The path, or the next that is free: ``notes-2.fastmem``."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(tried for tried in chain([path], numbered) if not tried.exists())


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def to_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; half of a character, which a model or a program may give, as its escape in JSON."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def _beside(path: Path) -> Path:
    return path.absolute().parent / f".fastmem-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
