"""Weights once in memory: engines pack them anew for the CPU while the file stays mapped beside the copy.

What is looked up there row by row, an embedding, comes into memory 64 KiB around each row, and would stay.

Pages of a file that is mapped for reading can be given back at any time; whoever still needs one reads it again
from the page cache.  Whoever else in the process maps the same file must not unmap it in the meantime: what took its
place would be given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

_MAPS = Path("/proc/self/maps")  # Linux; elsewhere nothing is given back
_READ_ONLY = "r--"
_MADV_DONTNEED = 4
_INTERVAL = 0.01  # seconds; a few MiB are packed in one
_SMAPS = Path("/proc/self/smaps")
_LOOKUPS = 512  # rows, which bring at most 32 MiB; looking at the mappings takes a millisecond or two

Span = tuple[int, int]  # addresses of a mapping's begin and end

_opening = Lock()  # mappings that appear meanwhile belong to who holds it


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


class LookedUp:
    """The mapping of a file of which rows are looked up, made in the `with` block by whoever looks them up.

    It must be used no longer than that one lives, and while none of its calls runs: its mapping alone is given back.
    One to which it has written by the end of the block is left alone; later nobody writes to weights.
    """

    def __init__(self, file: Path) -> None:
        self._file = str(file.resolve())
        self._rows = 0
        self._own: set[Span] = set()

    def __enter__(self) -> Self:
        _opening.acquire()
        try:
            self._own = {span for span, _ in _all_mappings(self._file)}
        except BaseException:  # an interrupt too
            _opening.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._own = {*_unwritten(self._file)} - self._own
        finally:
            _opening.release()

    def add(self, rows: int) -> None:
        """So many more were looked up; from time to time all pages are given back."""
        self._rows += rows
        if self._own and self._rows >= _LOOKUPS:
            self._rows = 0
            _give_back(self._own.intersection(span for span, _ in _all_mappings(self._file)))


def _keep_giving_back(file: str, done: Event) -> None:
    last = False
    while not last:
        last = done.wait(_INTERVAL)
        _give_back(_mappings(file))


def _give_back(spans: Iterable[Span]) -> None:
    libc = ctypes.CDLL(None)
    for begin, end in spans:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _mappings(file: str) -> Iterator[Span]:
    """Every mapping of `file` that nobody can have written to."""
    return (span for span, mode in _all_mappings(file) if mode.startswith(_READ_ONLY))


def _all_mappings(file: str) -> Iterator[tuple[Span, str]]:
    """Every mapping of `file`, with its mode."""
    if not _MAPS.exists():
        return
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        if line.endswith(f" {file}"):
            span, mode, *_ = line.split(maxsplit=2)
            yield _span(span), mode


def _unwritten(file: str) -> Iterator[Span]:
    """Every mapping of `file` of which no page was written to: private ones then have pages of their own."""
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
