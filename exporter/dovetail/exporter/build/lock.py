"""Keep a folder to one process at a time."""

from __future__ import annotations

from pathlib import Path
from typing import IO


def lock_file(path: Path) -> IO[str] | None:
    """Lock `path`, made if it is missing, until the returned file is closed or the process ends.

    None on Windows, which has no flock: the user must avoid two runs in one folder. Raises
    BlockingIOError while another process has the lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock
