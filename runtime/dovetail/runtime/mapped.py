"""Weights once in memory: engines pack them anew for the CPU while the file stays mapped beside the copy.

Pages of a file that is mapped for reading can be given back at any time; whoever still needs one reads it again
from the page cache.  Whoever else in the process maps the same file must not unmap it in the meantime: what took its
place would be given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

_MAPS = Path("/proc/self/maps")  # Linux; elsewhere nothing is given back
_READ_ONLY = "r--"
_MADV_DONTNEED = 4
_INTERVAL = 0.01  # seconds; a few MiB are packed in one


@contextmanager
def giving_back(file: Path) -> Iterator[None]:
    """While the body runs, and at its end, give back what is resident of `file`'s read-only mappings."""
    if not _MAPS.exists():
        yield
        return
    done = Event()
    worker = Thread(target=_keep_giving_back, args=(str(file.resolve()), done), daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


def _keep_giving_back(file: str, done: Event) -> None:
    libc = ctypes.CDLL(None)
    last = False
    while not last:
        last = done.wait(_INTERVAL)
        for begin, end in _mappings(file):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _mappings(file: str) -> Iterator[tuple[int, int]]:
    """Begin and end of every mapping of `file` that nobody can have written to."""
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        span, mode, *_ = line.split(maxsplit=2)
        if mode.startswith(_READ_ONLY) and line.endswith(f" {file}"):
            begin, end = span.split("-")
            yield int(begin, 16), int(end, 16)
