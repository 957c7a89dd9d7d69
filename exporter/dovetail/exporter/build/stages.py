"""Build stages. After a kill, each output is the old output or the new output as a whole.

`PairBuild` builds a pair in a hidden sibling of the pair's folder and exchanges the two at the end:

    parent/pair/               the finished pair, untouched until the exchange
    parent/.pair.build/
      lock                     one export at a time
      temporary/               the stage in progress; removed at the next start after a kill
      records/<stage>.json     inputs, facts and output digests of every finished stage
      pair/<stage>/            outputs of the finished stages; dovetail.json comes last

`resume` skips each stage with equal inputs and unchanged output, in a finished pair as well.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from dovetail.exporter.build.exchange import disk_errors, exchange, link_tree, scratch_folder
from dovetail.exporter.build.lock import lock_file
from dovetail.runtime.errors import ExportError, ManifestError, PairError
from dovetail.runtime.pair.files import sha256_file, write_atomically
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import FileEntry, Manifest, parse_record, read_manifest, write_manifest
from dovetail.runtime.system.files import check_text, read_json
from dovetail.runtime.system.progress import Progress, silent


@dataclass(frozen=True)
class Stage:
    """One folder of the pair and the function that builds it.

    inputs: JSON of everything that decides the output: digests, options, versions.
    build: fills the given empty folder and returns facts (JSON) for later stages.
    intermediate: the output is no part of the pair; an unfinished export keeps it for --resume.
    """

    name: str
    inputs: Mapping[str, Any]
    build: Callable[[Path], Mapping[str, Any]]
    intermediate: bool = False


@dataclass(frozen=True)
class StageRecord:
    """The stored record of a finished stage. files: path inside the pair -> size and digest."""

    inputs: dict[str, Any]
    facts: dict[str, Any]
    files: dict[str, FileEntry]


class PairBuild:
    """One export into the pair folder `out`: a context manager that runs stages.

    Raises ExportError: `out` holds a finished pair (without `resume` and `force`) or something
    else; another export writes to `out`; the disk is full.
    """

    def __init__(self, out: Path, *, resume: bool = False, force: bool = False, progress: Progress = silent):
        check_text("folder", str(out), ExportError)
        self.out = Path(os.path.abspath(out)) if not out.is_symlink() else out.resolve()
        self.resume, self.force, self.progress = resume, force, progress
        self.work = self.out.parent / f".{self.out.name}.build"
        self.finished: Manifest | None = None  # the pair already at `out`
        self.records: dict[str, StageRecord] = {}  # stages of this build, in order
        self._kept: set[str] = set()  # stages whose output is already in `out`
        self._intermediate: set[str] = set()
        self._lock: IO[str] | None = None

    def __enter__(self) -> PairBuild:
        try:
            with disk_errors(f"cannot write beside {self.out}"):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._acquire_lock()
                if (self.work / "old").is_dir() and not self.out.exists():
                    os.rename(self.work / "old", self.out)  # after a kill between the two renames of an exchange
                self._check_out()
                for name in ("temporary", "old", *(() if self.resume else ("records", "pair"))):
                    shutil.rmtree(self.work / name, ignore_errors=True)
        except BaseException:
            if self._lock and not any((self.work / name).exists() for name in ("records", "old")):
                shutil.rmtree(self.work, ignore_errors=True)
            self._release_lock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        unfinished = kind is not None and (self.work / "records").exists()
        shutil.rmtree(self.work / "temporary" if unfinished else self.work, ignore_errors=True)
        self._release_lock()

    def run(self, stage: Stage) -> dict[str, Any]:
        """Build a stage, or skip a finished stage when resuming; return the facts of the stage."""
        if stage.intermediate:
            self._intermediate.add(stage.name)
        inputs = json.loads(json.dumps(stage.inputs))  # tuples become lists, as in a stored record
        if self.resume and (record := self._standing(stage.name, inputs)):
            self.progress(f"{stage.name}: up to date")
        else:
            record = self._build(stage, inputs)
        self.records[stage.name] = record
        return record.facts

    def keep(self, name: str) -> None:
        """Keep the folder `name` of the finished pair. Raises ExportError for a damaged folder."""
        if self.finished is None:
            raise ExportError(f"{self.out} holds no finished pair: export its target first")
        record = _record_of(self.finished, name)
        if not record.files or not _files_hold(self.out, record.files):
            raise ExportError(f"{self.out / name} is missing or altered: export the target again with --resume")
        self.records[name] = record
        self._kept.add(name)

    def provenance_of(self, name: str) -> dict[str, Any] | None:
        """The finished pair's provenance of the stage `name`; None if the stage was built again."""
        return self.finished.provenance.get(name) if self.finished and name in self._kept else None

    def folder(self, name: str) -> Path:
        return (self.out if name in self._kept else self.work / "pair") / name

    def finish(self, manifest: Manifest) -> Manifest:
        """Add files and stages to `manifest`, write it, put the pair in place; return the manifest.

        An identical finished pair stays untouched, and `finish` returns the manifest of that pair.
        """
        parts = {name: record for name, record in self.records.items() if name not in self._intermediate}
        files = {path: entry for record in parts.values() for path, entry in record.files.items()}
        stages = {name: {"inputs": record.inputs, "facts": record.facts} for name, record in parts.items()}
        manifest = replace(manifest, files=files, provenance={**manifest.provenance, "stages": stages})
        old = self.finished if set(parts) <= self._kept else None
        if old and replace(manifest, provenance={}) == replace(old, provenance={}):  # provenance holds dates
            self.progress("nothing to do: the pair is up to date")
            return old
        with disk_errors(f"{self.out} could not be put in place"):
            self._carry_over(set(parts))
            write_manifest(self.work / "pair", manifest)
            exchange(self.work / "pair", self.out, self.work / "old")
        return manifest

    def continued(self) -> Path:
        """Return a folder for a whole pair that `place` puts in place; see `keep_after_failure`."""
        folder = self.work / "pair"
        folder.mkdir(exist_ok=True)
        return folder

    def keep_after_failure(self, keep: bool) -> None:
        """Say whether the folder from `continued` outlives a failure, so that a later call continues it."""
        if keep:
            (self.work / "records").mkdir(exist_ok=True)
        else:
            shutil.rmtree(self.work / "records", ignore_errors=True)

    def place(self, manifest: Manifest) -> None:
        """Put the folder from `continued`, which holds the pair of `manifest`, in place of `out`."""
        with disk_errors(f"{self.out} could not be put in place"):
            self._carry_over({path.partition("/")[0] for path in (*manifest.files, MANIFEST_NAME)})
            exchange(self.work / "pair", self.out, self.work / "old")

    def _standing(self, name: str, inputs: dict[str, Any]) -> StageRecord | None:
        """The record of a finished output, from the work folder or the finished pair; or None."""
        record = _read_record(self.work / "records" / f"{name}.json")
        if record and record.inputs == inputs and _files_hold(self.work / "pair", record.files):
            return record
        if self.finished is None or name not in self.finished.provenance.get("stages", {}):
            return None
        record = _record_of(self.finished, name)
        if record.inputs != inputs:
            if self.force:
                return None
            changed = sorted(k for k in {*inputs, *record.inputs} if inputs.get(k) != record.inputs.get(k))
            raise ExportError(
                f"{self.out} holds a finished pair whose {name} was built with another {', '.join(changed)}: "
                "use --force to replace it, or name another folder"
            )
        if not _files_hold(self.out, record.files):
            return None
        self._kept.add(name)
        return record

    def _build(self, stage: Stage, inputs: dict[str, Any]) -> StageRecord:
        temporary, final = self.work / "temporary" / stage.name, self.work / "pair" / stage.name
        memory = self.work / "records" / f"{stage.name}.json"
        scratch = self.work / "temporary" / f"scratch-{stage.name}"
        self.progress(stage.name)
        try:
            with disk_errors(f"stage {stage.name!r} failed"), scratch_folder(scratch):
                temporary.mkdir(parents=True)
                facts = json.loads(json.dumps(stage.build(temporary)))
                record = StageRecord(inputs, facts, _digest_folder(temporary, stage.name))
                memory.unlink(missing_ok=True)
                shutil.rmtree(final, ignore_errors=True)
                final.parent.mkdir(exist_ok=True)
                os.replace(temporary, final)
                memory.parent.mkdir(exist_ok=True)
                write_atomically(memory, json.dumps(asdict(record)).encode())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return record

    def _carry_over(self, parts: set[str]) -> None:
        """Link kept stages and the user's own files from the old folder into the new folder."""
        new = self.work / "pair"
        new.mkdir(exist_ok=True)
        for name in {entry.name for entry in new.iterdir()} - (parts - self._kept):  # intermediate or replaced
            shutil.rmtree(new / name, ignore_errors=True)
        if self.finished is None:
            return
        ours = {*self.finished.provenance.get("stages", {}), "target", "drafter", MANIFEST_NAME} - self._kept
        for entry in self.out.iterdir():
            if entry.name not in ours and not (new / entry.name).exists():
                link_tree(entry, new / entry.name)

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir() or os.path.ismount(self.out):
            what = "a mount point" if self.out.is_dir() else "a file"
            raise ExportError(f"{self.out} is {what}: name a folder, such as {self.out / 'pair'}")
        if not any(self.out.iterdir()):
            return
        if not (self.out / MANIFEST_NAME).exists():
            raise ExportError(f"{self.out} is not empty and holds no pair: name another folder")
        try:
            self.finished = read_manifest(self.out)
        except PairError as error:
            if not self.force:
                raise ExportError(f"{error}; --force replaces the pair at {self.out}") from error
            return
        if not (self.resume or self.force):
            raise ExportError(
                f"{self.out} already holds the finished pair {self.finished.name!r}: "
                "use --force to replace it, --resume to complete or repair it, or name another folder"
            )

    def _acquire_lock(self) -> None:
        while True:
            self.work.mkdir(exist_ok=True)
            path = self.work / "lock"
            with suppress(FileNotFoundError):  # the export with the lock has just removed its work folder
                try:
                    lock = lock_file(path)
                except BlockingIOError:
                    raise ExportError(f"another export is writing to {self.out}: wait for it to finish") from None
                if lock is None:
                    return
                try:
                    if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                        self._lock = lock  # from here on the work folder is this export's to remove
                        return
                finally:
                    if self._lock is None:
                        lock.close()

    def _release_lock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


def _digest_folder(folder: Path, prefix: str) -> dict[str, FileEntry]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        relative = f"{prefix}/{path.relative_to(folder).as_posix()}"
        files[relative] = FileEntry(path.stat().st_size, sha256_file(path, remember=False))
    return files


def _files_hold(root: Path, files: Mapping[str, FileEntry]) -> bool:
    try:
        return all(
            (root / path).stat().st_size == entry.size and sha256_file(root / path) == entry.sha256
            for path, entry in files.items()
        )
    except OSError:
        return False


def _read_record(path: Path) -> StageRecord | None:
    try:
        return parse_record(StageRecord, read_json(path, ManifestError, ""), path.stem)
    except (OSError, ManifestError):  # no usable record: the stage runs again
        return None


def _record_of(manifest: Manifest, name: str) -> StageRecord:
    stage = manifest.provenance.get("stages", {}).get(name, {})
    files = {path: entry for path, entry in manifest.files.items() if path.startswith(f"{name}/")}
    return StageRecord(dict(stage.get("inputs", {})), dict(stage.get("facts", {})), files)
