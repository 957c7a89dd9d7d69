"""An environment of its own, with another transformers, for an architecture that the installed one cannot convert.

It holds what converts a checkpoint (optimum-intel, torch, nncf, OpenVINO) in the versions installed here, and the
newest transformers with which optimum-intel converts the architecture. `optimum-cli` there writes an IR, which
`dovetail-export target` takes.
"""

from __future__ import annotations

import shutil
import subprocess
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from dovetail.exporter.build.stages import Progress, silent
from dovetail.exporter.target.architectures import ARCHITECTURES
from dovetail.runtime.errors import ExportError, InputError

# torchvision: optimum-intel declares it, text models never import it, and one that was not built for the installed
# torch breaks `import transformers`. The others come with the transformers and the torch that pip is asked for.
_LEFT_OUT = {"torchvision", "transformers", "huggingface-hub", "tokenizers", "torch"}
_ROOTS = ("optimum-intel", "accelerate")


def make_environment(folder: Path, architecture: str, progress: Progress = silent) -> str:
    """Make the environment at `folder`; returns its version of transformers.

    Raises InputError (an unknown architecture, a folder that is not empty) or ExportError (pip failed).
    """
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
    """`name==version` of the installed packages that the roots need, themselves included."""
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
        return metadata.version(name).partition("+")[0]  # any build of a release will do
    except metadata.PackageNotFoundError as error:
        raise ExportError(f"{name} is not installed: pip install 'dovetail-spec[export]'") from error


def _pip(folder: Path, *arguments: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ExportError(f"pip could not fill {folder}: {lines[-1] if lines else done.returncode}")
