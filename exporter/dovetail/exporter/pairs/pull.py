"""Pulls a pair from the Hub: the files of its manifest, checked, and in place only as a whole."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from dovetail.exporter.build.stages import PairBuild
from dovetail.exporter.hub import TIMEOUT_S, check_room, hub_errors, show_bars
from dovetail.runtime.errors import ExportError, IntegrityError, PairError, SourceError
from dovetail.runtime.pair.check import check_listed, check_pair, verify_files
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.system.progress import Progress, silent


def pull_pair(
    repo: str, out: Path, *, revision: str | None = None, force: bool = False, progress: Progress = silent
) -> Manifest:
    """Download the pair at the Hub id `repo` to the folder `out`, check it and return its manifest.

    A later call continues an interrupted download. force: replace a pair at `out`. Raises
    ExportError (`out` holds something, full disk), SourceError (the Hub), PairError (a pair that
    cannot be used); `out` is then unchanged.
    """
    with PairBuild(out, resume=True, force=force, progress=progress) as build:
        if build.finished and not force:
            raise ExportError(
                f"{build.out} already holds the finished pair {build.finished.name!r}: use --force to replace it, or "
                "name another folder"
            )
        folder = build.continued()
        progress(f"looking at {repo}")
        with hub_errors(repo, revision):
            manifest = _download(repo, revision, folder, build)
        progress("checking every file")
        try:
            verify_files(folder, manifest, remember=False)
        except IntegrityError as error:
            build.keep_after_failure(False)  # or the next call would find the same file
            reason = str(error).partition(": ")[0].replace(f"{folder}/", "")
            raise IntegrityError(f"{repo} holds a damaged pair: {reason}: pull again, or ask its owner") from error
        build.place(manifest)
        return manifest


def _download(repo: str, revision: str | None, folder: Path, build: PairBuild) -> Manifest:
    """Download the manifest, check it, download its files; nothing else stays in `folder`."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    show_bars()
    info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if MANIFEST_NAME not in names:
        raise SourceError(f"{repo} is no pair, it has no {MANIFEST_NAME}: dovetail-export target exports a model")
    hf_hub_download(repo, MANIFEST_NAME, revision=info.sha, local_dir=folder)
    try:
        manifest = read_manifest(folder)
        check_pair(manifest)
        check_listed(manifest)
    except PairError as error:
        raise type(error)(f"{repo} holds no usable pair: {str(error).replace(f'{folder}/', '')}") from error
    if missing := sorted(manifest.files.keys() - names):
        raise IntegrityError(f"{repo} lacks {missing[0]}, which its manifest lists: ask its owner to push it again")
    size = sum(entry.size for entry in manifest.files.values())
    check_room(repo, size - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), folder)
    build.progress(f"downloading {len(manifest.files)} files, {size / 1e9:.2f} GB")
    build.keep_after_failure(True)
    wanted = [glob.escape(name) for name in manifest.files]
    snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=wanted)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes about the download
    for file in [file for file in folder.rglob("*") if not file.is_dir()]:
        if file.relative_to(folder).as_posix() not in {*manifest.files, MANIFEST_NAME}:
            file.unlink()
    return manifest
