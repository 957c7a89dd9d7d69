"""Release pages of mapped weights, so that RAM holds the weights once.

Engines pack the weights for the CPU into memory of their own while the file stays mapped. Looking
up a row of an embedding loads 64 KiB of the file around the row, and these pages stay resident.
Linux lets a process release the pages of a read-only mapping at any time. The next access reads a
released page again from the page cache. No other code of the process may unmap the file meanwhile:
the release would then hit the mapping that takes its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Self

_MAPS = Path("/proc/self/maps")  # Linux only; elsewhere no page is released
_READ_ONLY = "r--"
_MADV_DONTNEED = 4
_INTERVAL = 0.01  # seconds; an engine packs a few MiB in this time
_SMAPS = Path("/proc/self/smaps")
_LOOKUPS = 512  # rows, which load at most 32 MiB; reading the list of mappings takes 1 to 2 ms

Span = tuple[int, int]  # first and end address of a mapping

_opening = Lock()  # mappings that appear while this lock is held belong to its holder


@contextmanager
def releasing_pages(file: Path) -> Iterator[None]:
    """Release the pages of `file`'s read-only mappings while the body runs and at its end."""
    if not _MAPS.exists():
        yield
        return
    done = Event()
    worker = Thread(target=_keep_releasing, args=(str(file.resolve()), done), daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


class LookupMapping:
    """The mapping of a file that an engine opens in the `with` block to look up rows.

    Use this object only while the engine lives and while none of its calls runs. A mapping with a
    write before the end of the block is never released. Later, no code writes to weights.
    """

    def __init__(self, file: Path) -> None:
        self._file = str(file.resolve())
        self._rows = 0
        self._own: set[Span] = set()

    def __enter__(self) -> Self:
        _opening.acquire()
        try:
            self._own = {span for span, _ in _all_mappings(self._file)}
        except BaseException:  # also for KeyboardInterrupt
            _opening.release()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            self._own = {*_unwritten(self._file)} - self._own
        finally:
            _opening.release()

    def add(self, rows: int) -> None:
        """Count `rows` more lookups. After every _LOOKUPS rows all pages are released."""
        self._rows += rows
        if self._own and self._rows >= _LOOKUPS:
            self._rows = 0
            _release(self._own.intersection(span for span, _ in _all_mappings(self._file)))


def _keep_releasing(file: str, done: Event) -> None:
    last = False
    while not last:
        last = done.wait(_INTERVAL)
        _release(span for span, mode in _all_mappings(file) if mode.startswith(_READ_ONLY))


def _release(spans: Iterable[Span]) -> None:
    libc = ctypes.CDLL(None)
    for begin, end in spans:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _all_mappings(file: str) -> Iterator[tuple[Span, str]]:
    """Yield every mapping of `file` with its mode."""
    if not _MAPS.exists():
        return
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        if line.endswith(f" {file}"):
            span, mode, *_ = line.split(maxsplit=2)
            yield _span(span), mode


def _unwritten(file: str) -> Iterator[Span]:
    """Yield every mapping of `file` without a written page, which would be anonymous."""
    here: Span | None = None
    if not _SMAPS.exists():
        return
    for line in _SMAPS.read_text(errors="surrogateescape").splitlines():
        name, *facts = line.split(maxsplit=1)
        if not name.endswith(":"):
            here = _span(name) if line.endswith(f" {file}") else None
        elif here and name == "Anonymous:" and facts == ["0 kB"]:
            yield here


def _span(text: str) -> Span:
    begin, end = text.split("-")
    return int(begin, 16), int(end, 16)
