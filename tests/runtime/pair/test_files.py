"""Digests, and the cache folder that remembers them."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.files import cache_dir, sha256_file
from dovetail.runtime.pair.manifest import FileEntry, file_entry, read_manifest


def test_unchanged_file_is_hashed_once(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = sha256_file(path)
    note = next((own_cache / "digests").iterdir())
    note.write_text(note.read_text().replace(first, "f" * 64))
    assert sha256_file(path) == "f" * 64  # the note was believed
    assert sha256_file(path, remember=False) == first  # and can be refused
    note.write_text("{")
    assert sha256_file(path) == first  # a damaged note is no note
    path.write_bytes(b"two")
    assert sha256_file(path) != first


def test_unwritable_cache_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    monkeypatch.setenv("DOVETAIL_CACHE", str(path / "not-a-folder"))
    assert file_entry(path) == FileEntry(3, sha256_file(path))


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("DOVETAIL_CACHE")
    assert cache_dir() == Path("/b/dovetail")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "dovetail"


def test_a_user_without_a_home_works_without_a_cache(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("DOVETAIL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert not cache_dir().exists()
    with pytest.raises(OSError):
        cache_dir().mkdir(parents=True)
    verify_files(pair, read_manifest(pair))


def test_a_cache_of_an_unknown_user_is_a_path_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", "~no-such-user/cache")
    assert cache_dir() == Path("~no-such-user/cache")
