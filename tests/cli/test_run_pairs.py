"""Which folder a pair's name means, and the reference pair that is built on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.runtime.errors import ExportError, InputError
from dovetail.runtime.pair import known as pairs


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, make_pair) -> list[list[str]]:
    """An exporter that writes a pair at once; what it was called with."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        make_pair(pairs.pairs_dir() / pairs.DEFAULT_PAIR)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pairs, "_installed", lambda module: True)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_no_name_means_the_reference_pair_built_once(invoke, opener, built, cache: Path) -> None:
    for _ in range(2):
        result = invoke("Hello", "-n", "2", obj=opener)
        assert result.exit_code == 0, result.output
    folder = cache / "pairs" / pairs.DEFAULT_PAIR
    assert [pair for pair, _ in opener.calls] == [folder, folder]
    (command,) = built
    assert command[1:] == ["-m", "dovetail.exporter.cli.main", "pair", pairs.DEFAULT_PAIR, str(folder), "--resume"]


def test_a_path_is_taken_as_it_is(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pairs.resolve_pair(str(pair)) == pair
    assert pairs.resolve_pair("./missing") == Path("missing")  # the manifest's reader says what is wrong
    monkeypatch.chdir(pair.parent)
    assert pairs.resolve_pair(pair.name) == Path(pair.name)


def test_without_the_export_stack_one_line_says_what_to_do(invoke, opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_installed", lambda module: module != "torch")
    result = invoke("Hello", obj=opener)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "needs torch" in result.stderr and "pip install '.[export]'" in result.stderr


@pytest.mark.parametrize(("code", "told"), [(0, "left no pair at"), (-9, "was ended by signal 9")])
def test_a_failed_build_is_an_export_error(monkeypatch: pytest.MonkeyPatch, code: int, told: str) -> None:
    monkeypatch.setattr(pairs, "_installed", lambda module: True)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))
    with pytest.raises(ExportError, match=f"building the pair {pairs.DEFAULT_PAIR} {told}"):
        pairs.resolve_pair(None)


def test_a_failed_build_has_the_line_and_the_code_of_the_exporter(
    invoke, opener, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "import sys; print('error: the disk is full', file=sys.stderr); sys.exit(5)"
    monkeypatch.setattr(pairs, "_EXPORTER", (sys.executable, "-c", fails))
    result = invoke("Hello", obj=opener)
    assert (result.exit_code, capfd.readouterr().err) == (5, "error: the disk is full\n")
    assert result.stderr.startswith("Building the pair") and result.stderr.count("\n") == 1


def test_installed_sees_missing_parents() -> None:
    assert pairs._installed("dovetail.runtime") and not pairs._installed("no_such_package.module")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="'llama-9000' is unknown"):
        pairs.resolve_pair("llama-9000")
    long = "word " * 60  # longer than a file's name may be
    with pytest.raises(InputError, match=f"pair '{long}' is unknown: name a pair folder"):
        pairs.resolve_pair(long)
    with pytest.raises(InputError, match=f"draft model '{long}' is unknown: name one of the pairs"):
        pairs.resolve_draft_model(long)


def test_a_cache_that_cannot_be_made_is_one_line(invoke, opener, built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without a home."""
    monkeypatch.setenv("DOVETAIL_CACHE", "/dev/null/dovetail")
    result = invoke("Hello", obj=opener)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "/dev/null/dovetail/pairs cannot be made (Not a directory): set DOVETAIL_CACHE" in result.stderr
    assert built == []
