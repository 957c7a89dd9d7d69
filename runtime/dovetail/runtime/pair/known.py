"""Resolve a user's name for a pair to a folder: a path, a cached pair, or a reference pair."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click

from dovetail.runtime.errors import ExportError, InputError, install_extra
from dovetail.runtime.pair.files import cache_dir
from dovetail.runtime.pair.layout import MANIFEST_NAME

DEFAULT_PAIR = "smollm2-135m"
REFERENCE_PAIRS = (DEFAULT_PAIR, "qwen2.5-coder-0.5b")  # names that `dovetail-export pair` builds
EXPORT_EXTRA = ("torch", "transformers", "optimum")


def pairs_dir() -> Path:
    """Return the cache folder of named pairs."""
    return cache_dir() / "pairs"


def known_pairs() -> list[str]:
    """Return the names that `--pair` takes: the reference pairs and all pairs in the cache."""
    built = (path.parent.name for path in pairs_dir().glob(f"*/{MANIFEST_NAME}"))
    return sorted({*REFERENCE_PAIRS, *built})


def resolve_pair(named: str | None) -> Path:
    """Return the pair folder for `--pair`. A reference pair is built first if the cache lacks it.

    Raises InputError for an unknown name or missing packages, ExportError for a failed build.
    """
    if named and (os.sep in named or named in (".", "..") or Path(named).is_dir()):
        return Path(named)
    name = DEFAULT_PAIR if named is None else named
    pair = pairs_dir() / name
    if (pair / MANIFEST_NAME).is_file():
        return pair
    if name not in REFERENCE_PAIRS:
        raise InputError(f"pair {name!r} is unknown: name a pair folder, or one of {', '.join(known_pairs())}")
    build_pair(name, pair)
    return pair


def build_pair(name: str, pair: Path) -> None:
    """Build a reference pair in a process of its own, which frees its memory before the answer."""
    lacking = [module for module in ("dovetail.exporter", *EXPORT_EXTRA) if not _installed(module)]
    if lacking:
        raise InputError(
            f"pair {name} is not built yet, and the build needs {', '.join(lacking)}: "
            f"{install_extra('export')}, or copy a built pair to {pair}"
        )
    try:
        pair.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(
            f"{pair.parent} cannot be made ({err.strerror}): set DOVETAIL_CACHE to a writable folder, or give --pair"
        ) from None
    click.echo(f"Building the pair {name} in {pair}. This happens once and takes a few minutes.", err=True)
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "pair", name, str(pair), "--resume"]
    done = subprocess.run(command, stdout=2, check=False)  # on stderr: stdout holds only the answer
    if done.returncode != 0 or not (pair / MANIFEST_NAME).is_file():
        raise ExportError(
            f"building the pair {name} failed (exit {done.returncode}): see the reason above, run again to resume"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
