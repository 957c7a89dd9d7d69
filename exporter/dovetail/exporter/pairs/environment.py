"""Makes a virtual environment for an architecture that the installed transformers cannot convert.

The environment holds the newest transformers with which optimum-intel converts the architecture,
and the other packages in the versions installed here. Its `optimum-cli` writes an IR, which
`dovetail-export target` takes.
"""

from __future__ import annotations

import shutil
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from dovetail.exporter.pairs.reference import run
from dovetail.exporter.target.architectures import ARCHITECTURES
from dovetail.runtime.errors import ExportError, InputError, install_extra
from dovetail.runtime.system.progress import Progress, silent

# optimum-intel requires torchvision, but text models never import it. A torchvision built for
# another torch breaks `import transformers`. pip installs the other packages with transformers and
# torch.
_LEFT_OUT = {"torchvision", "transformers", "huggingface-hub", "tokenizers", "torch"}
_ROOTS = ("optimum-intel", "accelerate")


def make_environment(folder: Path, architecture: str, progress: Progress = silent) -> str:
    """Make the environment, return its version of transformers. Raises InputError, ExportError."""
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"--for {architecture} is no architecture that optimum-intel exports: give the model_type of a config.json"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: name a new folder")
    wanted = ARCHITECTURES[architecture].newest
    pinned = _pins(*_ROOTS)
    try:
        progress("making a virtual environment")
        venv.create(folder, with_pip=True, symlinks=True)
        progress(f"installing {len(pinned)} packages in the versions of this environment")
        _pip(folder, "--no-deps", *pinned)
        progress(f"installing transformers {wanted}, and torch")
        _pip(folder, f"transformers=={wanted}", f"torch=={_version('torch')}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return wanted


def _pins(*roots: str) -> list[str]:
    """`name==version` of the roots and of the installed packages that the roots need."""
    found: dict[str, str] = {}
    pending = [*roots]
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in found or name in _LEFT_OUT:
            continue
        found[name] = _version(name)
        requirements = map(Requirement, metadata.requires(name) or ())
        pending += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return sorted(f"{name}=={version}" for name, version in found.items())


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]  # every build of a release is good enough
    except metadata.PackageNotFoundError as error:
        raise ExportError(f"{name} is not installed: {install_extra('export')}") from error


def _pip(folder: Path, *arguments: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    if problem := run(command):
        raise ExportError(f"pip could not install into {folder}: {problem}")
