"""Replaces one folder by another in one step, and hard-links files instead of copying them."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.runtime.errors import ExportError


def exchange(new: Path, out: Path, aside: Path) -> None:
    """Put the folder `new` at `out` in one step; the old folder ends up at `new` or `aside`.

    A system that cannot exchange two folders renames twice. After a kill between the two renames,
    `PairBuild` restores the old folder at its next start. Raises OSError.
    """
    if not out.exists() or not any(out.iterdir()):
        os.replace(new, out)
    elif not _renameat2_exchange(new, out):
        os.replace(out, aside)
        os.replace(new, out)


def _renameat2_exchange(first: Path, second: Path) -> bool:
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    folders = (at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second))
    return call is not None and call(*folders, rename_exchange) == 0


def link_tree(source: Path, destination: Path) -> None:
    """Hard-link a file or folder; copy the files that no link can reach. Raises OSError."""
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=link_file, dirs_exist_ok=True)
    else:
        link_file(source, destination)


def link_file(source: str | Path, destination: str | Path) -> None:
    """Hard-link one file, or copy it across file systems. Raises OSError."""
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copy2(source, destination)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make `tempfile` use `folder`: libraries fill /tmp, and a kill leaves their files there."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError into an ExportError that says `what` failed and how to go on."""
    try:
        yield
    except OSError as error:
        remedy = "repeat the command (with --resume, if the command has it)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"{what}: the disk is full; free some space and {remedy}") from error
        place = f" ({error.filename})" if error.filename else ""
        raise ExportError(f"{what}: {error.strerror or error}{place}; correct this and {remedy}") from error
