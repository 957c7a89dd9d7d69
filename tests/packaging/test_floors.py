"""Who may import whom: rooms lie on floors, and imports go down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Per package, from the ground up.  Rooms of one floor do not import each other; a room is a folder or a single module.
FLOORS = {
    "runtime": (
        ("errors", "system"),
        ("tree", "sampling", "devices"),
        ("pair",),
        ("target", "drafter", "policy"),
        ("loop", "tune"),
        ("text", "testing"),
        ("settings", "load", "front"),
        ("engine", "batch_engine"),
        ("async_engine",),
        ("bench", "doctor", "serve"),
        ("cli",),
    ),
    "models": (
        ("config", "layers", "rope"),
        ("fusion",),
        ("drafter", "checkpoint"),
        ("eagle3",),
        ("eagle", "dflash", "language"),
        ("formats",),
    ),
    "exporter": (("build", "hub"), ("target",), ("drafter", "train"), ("pairs",), ("cli",)),
}
PACKAGES = ("runtime", "models", "exporter")  # from the ground up, too
MOST_MODULES = 12  # of a room, beside __init__.py


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package / "dovetail" / package).rglob("*.py"))


def room(file: Path, package: str) -> str:
    """The folder or the module, directly below the package, that `file` belongs to."""
    return file.relative_to(ROOT / package / "dovetail" / package).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(package, room) of everything of Dovetail that `file` imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute, so that a reader sees the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dovetail" and len(parts) > 2:
                yield parts[1], parts[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package: str) -> None:
    floor = {name: level for level, names in enumerate(FLOORS[package]) for name in names}
    for file in modules(package):
        here = room(file, package)
        if here == "__init__":  # hands on what is below it
            continue
        for other, there in imported(file):
            if other != package:
                assert PACKAGES.index(other) < PACKAGES.index(package), f"{file} imports {other}"
            elif there != here and there in floor:
                assert floor[there] < floor[here], f"{file}, in {here}, imports {there}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_floor(package: str) -> None:
    known = {"__init__", *(name for names in FLOORS[package] for name in names)}
    assert {room(file, package) for file in modules(package)} == known


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_is_crowded(package: str) -> None:
    for folder in {file.parent for file in modules(package)}:
        found = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(found) <= MOST_MODULES, f"{folder} has {len(found)} modules"
