"""The wheel carries the three packages and their data, and its runtime lives without the export stack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = [ROOT / name for name in ("exporter", "runtime", "models")]
PACKAGES = ("exporter", "runtime", "models")

# Runs in a bare interpreter: the wheel first, this checkout's folders gone, the export stack unimportable.
IMPORT_RUNTIME = """
import importlib.abc, json, sys

target, roots, blocked = sys.argv[1], set(json.loads(sys.argv[2])), {"torch", "transformers", "optimum"}
sys.path[:] = [target] + [entry for entry in sys.path if entry not in roots]

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import dovetail.runtime

if len(sys.argv) > 3:
    with dovetail.runtime.Engine.from_pretrained(sys.argv[3], drafter_device="cpu") as engine:
        print(len(engine.generate("hello", max_new_tokens=12).token_ids))
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"path": list(dovetail.runtime.__path__), "loaded": sorted(loaded)}))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_of_each_package(names: set[str], package: str) -> None:
    folder = ROOT / package / "dovetail" / package
    expected = {
        f"dovetail/{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"dovetail/{package}/py.typed" in expected
    assert expected <= names


def test_wheel_holds_nothing_else(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dovetail", *(top for top in tops if top.endswith(".dist-info"))}
    assert {name.split("/")[1] for name in names if name.startswith("dovetail/")} == set(PACKAGES)
    assert not [name for name in names if "test_" in name or name.endswith(".pyc")]


def test_wheel_states_licence_and_commands(wheel: Path, names: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        commands = archive.read(entry_points).decode()
        facts = archive.read(metadata).decode()
    assert "dovetail-run = dovetail.runtime.cli.main:main" in commands
    assert "dovetail-export = dovetail.exporter.cli.main:main" in commands
    assert "License-Expression: Apache-2.0" in facts
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_runtime_imports_without_the_export_stack_and_costs_numpy_alone(installed: Path, tmp_path: Path) -> None:
    roots = json.dumps([str(root) for root in SOURCE_ROOTS])
    seen = json.loads(run(sys.executable, "-I", "-c", IMPORT_RUNTIME, installed, roots, cwd=tmp_path))
    assert seen["path"] == [str(installed / "dovetail" / "runtime")]
    engines = {"openvino", "onnxruntime", "tokenizers", "jinja2"}
    export_stack = {"torch", "transformers", "optimum"}
    assert not (engines | export_stack) & set(seen["loaded"])


def test_the_wheels_runtime_generates_without_the_export_stack(
    installed: Path, tiny_full_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))  # what passes cost is measured and kept
    roots = json.dumps([str(root) for root in SOURCE_ROOTS])
    command = (sys.executable, "-I", "-W", "ignore", "-c", IMPORT_RUNTIME, installed, roots, tiny_full_pair)
    count, told = run(*command, cwd=tmp_path).splitlines()
    assert 0 < int(count) <= 12
    assert len(list((tmp_path / "cache" / "costs").iterdir())) == 1
    seen = json.loads(told)
    assert seen["path"] == [str(installed / "dovetail" / "runtime")]
    assert {"openvino", "onnxruntime"} <= set(seen["loaded"])
    assert not {"torch", "transformers", "optimum"} & set(seen["loaded"])


def test_the_readme_is_whole_and_its_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "models").rglob("README.md")):
        text = page.read_text()
        assert "@@" not in text
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert all((page.parent / link).exists() for link in links), (page, links)
