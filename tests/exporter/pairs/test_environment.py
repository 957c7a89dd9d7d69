"""`dovetail-export environment`: what it installs, and what it refuses before it installs anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.exporter.cli.main import main
from dovetail.exporter.pairs import environment
from dovetail.exporter.pairs.environment import make_environment
from dovetail.exporter.target.export import versions
from dovetail.runtime.errors import ExportError, InputError


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip is told, in place of a download of gigabytes."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append(command[4:])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(environment.venv, "create", lambda folder, **options: folder.mkdir())
    return calls


def test_it_has_the_transformers_of_the_architecture_and_all_else_as_here(pip: list[list[str]], tmp_path: Path) -> None:
    assert make_environment(tmp_path / "env", "exaone4") == "4.57.6"
    first, second = pip
    here = versions("optimum-intel", "openvino", "nncf", "numpy", "torch")
    assert first[:2] == ["--quiet", "--no-deps"]
    for name in ("optimum-intel", "openvino", "nncf", "numpy"):
        assert f"{name}=={here[name]}" in first
    assert not any(pin.startswith(("torchvision", "transformers", "huggingface-hub", "tokenizers")) for pin in first)
    assert second == ["--quiet", "transformers==4.57.6", f"torch=={here['torch'].partition('+')[0]}"]


def test_what_cannot_be_made_is_refused_first(pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    for folder, architecture, reason in (
        (tmp_path / "env", "olmo3", "olmo3 is no architecture"),
        (tmp_path, "exaone4", "is not empty"),
        (tmp_path / "mine", "exaone4", "is not empty"),
    ):
        with pytest.raises(InputError, match=reason):
            make_environment(folder, architecture)
    assert not pip and not (tmp_path / "env").exists()


def test_a_failure_of_pip_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "_pins", lambda *roots: ["no-such-package-of-anyone==1"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["environment", str(tmp_path / "env"), "--for", "exaone4"]) == ExportError.exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: pip could not install into") and "no-such-package-of-anyone" in last
    assert not (tmp_path / "env").exists()


def test_help_names_it() -> None:
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "environment", "--help"]
    assert "--for" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
