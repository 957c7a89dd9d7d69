"""Files: digests, writes that are whole or absent, and the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from dovetail.runtime.system.files import open_regular, parse_json, read_bytes


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers see the old file or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: Path, *, remember: bool = True) -> str:
    """Return the digest of a file's content. Raises OSError.

    remember: do not read a file again whose path, size, inode and times are those of the last call.
    """
    resolved = Path(path).resolve()
    identity = _identity(resolved)
    memory = cache_file("digests", str(resolved))
    if remember and (known := _recall(memory, identity)):
        return known
    with open_regular(resolved) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _identity(resolved) == identity:
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(OSError):
            write_cache(memory, json.dumps({"file": identity, "sha256": digest}))
    return digest


def cache_dir() -> Path:
    """Return $DOVETAIL_CACHE, $XDG_CACHE_HOME/dovetail or ~/.cache/dovetail.

    For a user without a home this is a folder that cannot be made.
    """
    if own := os.environ.get("DOVETAIL_CACHE"):
        return Path(os.path.expanduser(own))
    home = os.path.expanduser("~")  # stays "~" without a home
    base = os.environ.get("XDG_CACHE_HOME") or (os.devnull if home == "~" else os.path.join(home, ".cache"))
    return Path(os.path.expanduser(base)) / "dovetail"


def cache_file(kind: str, key: str) -> Path:
    """Return the file of the cache that keeps what belongs to `key`. kind: its folder."""
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def write_cache(file: Path, text: str) -> None:
    """Write a file of the cache, and its folder if that is missing. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def _identity(path: Path) -> list[int | str]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _recall(memory: Path, identity: list[int | str]) -> str | None:
    try:
        note = parse_json(read_bytes(memory))
        return str(note["sha256"]) if note["file"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):  # no note, or a damaged one
        return None
