"""Resolve a user's name for a pair to a folder: a path, a cached pair, or a reference pair.

What is not built yet, the exporter builds in a process of its own. Its memory is free before the
answer, and this package imports no exporter.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import click

from dovetail.runtime.errors import ExportError, InputError, install_extra
from dovetail.runtime.pair.files import cache_dir
from dovetail.runtime.pair.layout import MANIFEST_NAME

DEFAULT_PAIR = "smollm2-135m"
# Names that `dovetail-export pair` builds.
REFERENCE_PAIRS = (DEFAULT_PAIR, "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
EXPORT_EXTRA = ("torch", "transformers", "optimum")
_EXPORTER = (sys.executable, "-m", "dovetail.exporter.cli.main")
# owner/name, by the rule of huggingface_hub, which this package does not import
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def pairs_dir() -> Path:
    """Return the cache folder of named pairs."""
    return cache_dir() / "pairs"


def known_pairs() -> list[str]:
    """Return the names that `--pair` takes: the reference pairs and all pairs in the cache."""
    built = (path.parent.name for path in pairs_dir().glob(f"*/{MANIFEST_NAME}"))
    return sorted({*REFERENCE_PAIRS, *built})


def resolve_pair(named: str | None) -> Path:
    """Return the pair folder for `--pair`. A reference pair is built first if the cache lacks it.

    Raises InputError for an unknown name or missing packages; see build_pair for a failed build.
    """
    if named and (os.sep in named or named in (".", "..") or os.path.isdir(named)):
        return Path(named)
    name = DEFAULT_PAIR if named is None else named
    pair = pairs_dir() / name
    if os.path.isfile(pair / MANIFEST_NAME):  # pathlib raises OSError for a long name
        return pair
    if name not in REFERENCE_PAIRS:
        raise InputError(f"pair {name!r} is unknown: name a pair folder, or one of {', '.join(known_pairs())}")
    build_pair(name, pair)
    return pair


def resolve_draft_model(named: str) -> Path:
    """Return the pair folder for `--draft-model`: a pair, or the export of a model.

    The exporter exports a file, a folder or a Hub id `owner/name` that is no pair into the cache.
    It does so once, and finds the export again by the content of the source.

    Raises InputError for an unknown name or missing packages; see _check_export for a failed export.
    """
    path = Path(named)
    if named and os.path.exists(path):
        if (path / MANIFEST_NAME).exists():
            return path
    elif not is_hub_id(named):
        if named in known_pairs():
            return resolve_pair(named)
        if os.sep in named:
            raise InputError(f"draft model {named!r} does not exist: correct the path, or give OWNER/NAME of the Hub")
        raise InputError(
            f"draft model {named!r} is unknown: name one of the pairs {', '.join(known_pairs())}, or give a model by "
            "its path or as OWNER/NAME"
        )
    if lacking := _lacking():
        raise InputError(
            f"--draft-model {named} is no pair, and its export needs {', '.join(lacking)}: {install_extra('export')}, "
            "or name the folder of a pair"
        )
    done = subprocess.run([*_EXPORTER, "draft-model", named], stdout=subprocess.PIPE, text=True, check=False)
    _check_export(done.returncode, f"exporting the draft model {named}")
    return Path(done.stdout.rstrip("\n"))


def build_pair(name: str, pair: Path) -> None:
    """Build a reference pair. Raises InputError; see _check_export for a failed build."""
    if lacking := _lacking():
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
    command = [*_EXPORTER, "pair", name, str(pair), "--resume"]
    done = subprocess.run(command, stdout=2, check=False)  # on stderr: stdout holds only the answer
    _check_export(done.returncode, f"building the pair {name}")
    if not (pair / MANIFEST_NAME).is_file():
        raise ExportError(f"building the pair {name} left no pair at {pair}: repeat the command to resume")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `owner/name` of a Hub id."""
    return bool(_HUB_ID.fullmatch(text))


def _check_export(code: int, what: str) -> None:
    """Exit with the exit code of a failed exporter, which has printed its reason.

    Raises click's Exit, or ExportError if a signal ended the exporter.
    """
    if code < 0:
        raise ExportError(f"{what} was ended by signal {-code}: free some memory, and repeat the command to resume")
    if code:
        raise click.exceptions.Exit(code)


def _lacking() -> list[str]:
    """Packages that an export needs and that are not installed."""
    return [module for module in ("dovetail.exporter", *EXPORT_EXTRA) if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
