"""Whatever happens to an export, its folder holds the old pair or the new one; --resume goes on from there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dovetail.exporter.build import exchange, stages
from dovetail.exporter.build.stages import PairBuild, Stage
from dovetail.runtime.errors import ExportError
from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.manifest import Manifest, TargetFacts, read_manifest

ROOTS = os.pathsep.join(str(Path(__file__).parents[3] / root) for root in ("runtime", "exporter", "models"))
FACTS = TargetFacts("llama", 8, 8, 16, 1, 64, "int8", ("norm",), (1,), "a" * 64)
SLOW_EXPORT = """
    import sys, time
    from pathlib import Path
    from dovetail.exporter.build.stages import PairBuild, Stage

    def target(folder):
        (folder / "a").write_text("whole")
        return {}

    def drafter(folder):
        (folder / "b").write_text("hal")
        print("half-written", flush=True)
        time.sleep(60)
        return {}

    with PairBuild(Path(sys.argv[1]), resume=True, force=True) as build:
        build.run(Stage("target", {"version": int(sys.argv[2])}, target))
        build.run(Stage("drafter", {"version": int(sys.argv[2])}, drafter))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))


class Writer:
    """A stage body that writes one file and counts its runs."""

    def __init__(self, content: str, error: BaseException | None = None):
        self.content, self.error, self.runs = content, error, 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.runs += 1
        (folder / "file").write_text(self.content)
        if self.error:
            raise self.error
        return {"content": self.content}


def export(
    out: Path, target: Callable, drafter: Callable, version: int = 1, *, resume: bool = False, force: bool = False
) -> Manifest:
    with PairBuild(out, resume=resume, force=force) as build:
        build.run(Stage("target", {"version": version}, target))
        facts = build.run(Stage("drafter", {"version": version}, drafter))
        assert "content" in facts
        return build.finish(Manifest("tiny", FACTS, None, {}))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pair_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "pair"
    manifest = export(out, Writer("t"), Writer("d"))
    assert snapshot(out).keys() == {"dovetail.json", "target/file", "drafter/file"}
    verify_files(out, read_manifest(out))
    assert read_manifest(out) == manifest
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["pair"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied"),
              KeyboardInterrupt(), ExportError("parity")],
)  # fmt: skip
@pytest.mark.parametrize("existing", [False, True])
def test_failed_stage_changes_nothing_and_resume_goes_on(tmp_path: Path, error: BaseException, existing: bool) -> None:
    out, target = tmp_path / "pair", Writer("new")
    if existing:
        export(out, Writer("old"), Writer("old"))
    before = snapshot(out)
    with pytest.raises((ExportError, KeyboardInterrupt)) as caught:
        export(out, target, Writer("half", error), version=2, force=True)
    assert "\n" not in str(caught.value)
    if getattr(error, "errno", None) == errno.ENOSPC:
        assert "disk is full" in str(caught.value) and "--resume" in str(caught.value)
    assert snapshot(out) == before
    assert not list((tmp_path / ".pair.build/temporary").glob("*"))
    export(out, target, Writer("whole"), version=2, resume=True, force=True)
    assert target.runs == 1
    assert snapshot(out)["drafter/file"] == b"whole" and snapshot(out)["target/file"] == b"new"
    assert not (tmp_path / ".pair.build").exists()


def test_without_resume_everything_is_built_again(tmp_path: Path) -> None:
    out, target = tmp_path / "pair", Writer("t")
    with pytest.raises(ExportError):
        export(out, target, Writer("half", OSError(errno.ENOSPC, "full")))
    export(out, target, Writer("d"))
    assert target.runs == 2


def test_resume_builds_again_what_no_longer_holds(tmp_path: Path) -> None:
    out, target = tmp_path / "pair", Writer("t")
    with pytest.raises(ExportError):
        export(out, target, Writer("half", OSError(errno.ENOSPC, "full")))
    (tmp_path / ".pair.build/pair/target/file").write_text("X")
    export(out, target, Writer("d"), resume=True)
    assert target.runs == 2  # altered meanwhile
    with pytest.raises(ExportError, match="built with another version"):
        export(out, target, Writer("d"), version=2, resume=True)
    export(out, target, Writer("d"), version=2, resume=True, force=True)
    assert target.runs == 3  # other inputs


@pytest.mark.parametrize("moment", ["write_manifest", "exchange", "_digest_folder"])
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_at_any_step_keeps_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, existing: bool
) -> None:
    out = tmp_path / "pair"
    if existing:
        export(out, Writer("old"), Writer("old"))
    before = snapshot(out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, moment, full)
        with pytest.raises(ExportError, match="disk is full"):
            export(out, Writer("new"), Writer("new"), version=2, force=True)
    assert snapshot(out) == before
    export(out, Writer("new"), Writer("new"), version=2, force=True, resume=True)
    verify_files(out, read_manifest(out))
    assert snapshot(out)["target/file"] == b"new"


@pytest.mark.parametrize("existing", [False, True])
def test_kill_in_the_middle_of_a_stage(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "pair"
    if existing:
        export(out, Writer("old"), Writer("old"), version=1)
    before = snapshot(out)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_EXPORT), str(out), "2"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOTS},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "half-written\n"
    running = snapshot(tmp_path / ".pair.build")
    for resume in (True, False):
        with pytest.raises(ExportError, match="another export"):
            export(out, Writer("x"), Writer("x"), version=2, resume=resume, force=True)
        assert snapshot(tmp_path / ".pair.build") == running  # the refused export removes nothing
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert snapshot(out) == before
    target, drafter = Writer("never"), Writer("whole")
    export(out, target, drafter, version=2, resume=True, force=True)
    assert (target.runs, drafter.runs) == (0, 1)
    assert snapshot(out).keys() == {"dovetail.json", "target/a", "drafter/file"}
    verify_files(out, read_manifest(out))
    assert not (tmp_path / ".pair.build").exists()


def test_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    out = tmp_path / "pair"
    export(out, Writer("old"), Writer("old"))
    work = tmp_path / ".pair.build"
    work.mkdir()
    out.rename(work / "old")  # what a kill leaves where folders cannot be exchanged at once
    with pytest.raises(ExportError, match="--force"):
        export(out, Writer("new"), Writer("new"))
    assert snapshot(out)["target/file"] == b"old"


def test_exchange_without_kernel_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_renameat2_exchange", lambda *_: False)
    out = tmp_path / "pair"
    export(out, Writer("old"), Writer("old"))
    export(out, Writer("new"), Writer("new"), force=True)
    assert snapshot(out)["target/file"] == b"new"
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["pair"]


def test_intermediate_stage_is_skipped_on_resume_and_not_shipped(tmp_path: Path) -> None:
    out, weights = tmp_path / "pair", Writer("w")

    def run(fails: bool, *, resume: bool = False) -> None:
        with PairBuild(out, resume=resume) as build:

            def target(folder: Path) -> Mapping[str, Any]:
                build.run(Stage("weights", {}, weights, intermediate=True))
                shutil.copyfile(build.folder("weights") / "file", folder / "file")
                if fails:
                    raise ExportError("tokenizer")
                return {}

            build.run(Stage("target", {"fails": fails}, target))
            build.finish(Manifest("tiny", FACTS, None, {}))

    with pytest.raises(ExportError):
        run(True)
    run(False, resume=True)
    assert weights.runs == 1
    assert snapshot(out).keys() == {"dovetail.json", "target/file"}
    run(False, resume=True)
    assert weights.runs == 1  # the finished target needs it no more


def test_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ExportError):
            export(out, Writer("t"), Writer("d"), force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_pair_behind_a_symbolic_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    real, link = tmp_path / "disk/pair", tmp_path / "pair"
    export(real, Writer("old"), Writer("old"))
    link.symlink_to(real)
    export(link, Writer("new"), Writer("new"), force=True)
    assert link.is_symlink() and snapshot(real)["target/file"] == b"new"
