"""Exports a model once as a draft model: a pair without a drafter, in the cache."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path

from dovetail.exporter.build.stages import PairBuild
from dovetail.exporter.drafter.sources import read_remote
from dovetail.exporter.hub import is_hub_id
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, build_target, describe_target, tokenizer_digest
from dovetail.exporter.target.sources import Source, resolve_source
from dovetail.runtime.errors import PairError, SourceError
from dovetail.runtime.pair.check import read_sound
from dovetail.runtime.pair.files import cache_dir
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system.progress import Progress, silent


def resolve_draft_source(location: str, revision: str | None = None) -> Source:
    """Return the source of a draft model; see resolve_source. Raises SourceError.

    The error says so if a drafter's checkpoint is at `location`.
    """
    try:
        return resolve_source(location, revision)
    except SourceError as error:
        if error.__cause__ is None:  # the Hub, if it was asked, has answered
            path = Path(os.path.expanduser(location))
            check_no_drafter(location, revision, path if path.exists() else None)
        raise


def check_no_drafter(location: str, revision: str | None, path: Path | None) -> None:
    """Raise SourceError if `location` holds a drafter, also of a kind that Dovetail does not read.

    path: its files on this machine; None asks the Hub for their headers.
    """
    from dovetail.models.formats.refused import RefusedDrafter  # torch, which --help does without
    from dovetail.models.formats.registry import find_checkpoint, recognised

    try:
        if path is not None:
            found = find_checkpoint(path)
        elif is_hub_id(location):
            found = recognised(read_remote(location, revision))
        else:
            return
    except RefusedDrafter:
        raise
    except SourceError:  # no drafter: the caller knows what it is, or why it is unusable
        return
    if found.format.reads_tokens:  # a model that can draft too
        return
    raise SourceError(
        f"{location} is a drafter ({found.description}) and no model: dovetail-export drafter PAIR --checkpoint "
        f"{location} adds it to a pair"
    )


def draft_model_folder(source: Source, weight_format: str) -> Path:
    """The folder of the cache for the export of `source`: another content has another folder."""
    identity = [
        source.identity,
        weight_format,
        tokenizer_digest(source.path if source.kind == "gguf" else source.folder),
    ]
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "draft-models" / f"{_name(source)}-{digest}"


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds a pair that this version of Dovetail can use."""
    try:
        read_sound(folder)
    except PairError:  # none yet, a damaged one, or one of another version: all are exported again
        return False
    return True


def export_draft_model(source: Source, folder: Path, weight_format: str, progress: Progress = silent) -> Manifest:
    """Export `source` as a pair at `folder`; an IR keeps its format.

    Raises SourceError, InputError or ExportError, and leaves `folder` unchanged.
    """
    fallback = "adjust" if weight_format == "int4" else None  # widths that 128 does not divide
    weights = WeightOptions() if source.kind == "ir" else WeightOptions(weight_format, group_size_fallback=fallback)
    options = TargetOptions(weights)
    with PairBuild(folder, resume=True, force=True, progress=progress) as build:
        facts = build_target(build, source, options)
        provenance = {"target": describe_target(build, source, options)}
        return build.finish(Manifest(_name(source), facts, None, {}, provenance=provenance))


def _name(source: Source) -> str:
    """A name for people: of the repository, the file or the folder."""
    own = source.path.stem if source.kind == "gguf" else source.path.resolve().name
    return re.sub(r"[^\w.-]", "-", source.repo.split("/")[-1] if source.repo else own)[:60]
