"""The reference pair, which the tests of this folder share."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from dovetail.runtime.pair.files import cache_dir
from dovetail.runtime.pair.known import resolve_pair


@pytest.fixture(scope="session")
def pair() -> Path:
    """The reference pair, built as a user builds it; a cache that was built before is used again.

    Tests may run in several processes, and a second build beside the first is refused.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "e2e.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return resolve_pair(None)
