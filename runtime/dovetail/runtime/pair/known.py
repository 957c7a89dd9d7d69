"""From what the user names to a pair folder: a path, a name in the cache, or the reference pair built on first use."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click

from dovetail.runtime.errors import ExportError, InputError
from dovetail.runtime.pair.manifest import MANIFEST_NAME, cache_dir

DEFAULT_PAIR = "smollm2-135m"
REFERENCE_PAIRS = (DEFAULT_PAIR, "qwen2.5-coder-0.5b")  # names that `dovetail-export pair` builds
EXPORT_EXTRA = ("torch", "transformers", "optimum")


def pairs_dir() -> Path:
    """Where pairs that are known by name live."""
    return cache_dir() / "pairs"


def known_pairs() -> list[str]:
    """The names that `--pair` takes: reference pairs, and whatever was built into the cache."""
    built = (path.parent.name for path in pairs_dir().glob(f"*/{MANIFEST_NAME}"))
    return sorted({*REFERENCE_PAIRS, *built})


def resolve_pair(named: str | None) -> Path:
    """The pair folder for `--pair`; a reference pair that is not built yet is built, with progress on stderr.

    Raises InputError for an unknown name or a missing export stack, ExportError for a build that failed.
    """
    if named == "":
        raise InputError(f"pair '' is unknown: name a pair folder, or one of {', '.join(known_pairs())}")
    if named is not None and (os.sep in named or named in (".", "..") or Path(named).is_dir()):
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
    """Build a reference pair into `pair` through the exporter, which resumes what an earlier try left.

    In a process of its own: the memory and threads of the export stack are gone when the answer starts.
    """
    lacking = [module for module in ("dovetail.exporter", *EXPORT_EXTRA) if not _installed(module)]
    if lacking:
        raise InputError(
            f"pair {name} is not built yet and building it needs {', '.join(lacking)}: "
            f'pip install "dovetail-spec[export]", or copy a built pair to {pair}'
        )
    try:
        pair.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(
            f"{pair.parent} cannot be made ({err.strerror}): set DOVETAIL_CACHE to a folder of yours, or give --pair"
        ) from None
    click.echo(f"Building the pair {name} in {pair}: once, a few minutes.", err=True)
    stderr = 2  # stdout is for the answer alone
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "pair", name, str(pair), "--resume"]
    done = subprocess.run(command, stdout=stderr, check=False)
    if done.returncode != 0 or not (pair / MANIFEST_NAME).is_file():
        raise ExportError(
            f"building the pair {name} failed (exit {done.returncode}): the reason is above, run again to resume"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
