"""The manifest round-trips, and every way to spoil a pair is one typed, one-line error."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.runtime.errors import DovetailError, ManifestError
from dovetail.runtime.pair.check import check_pair, verify_files
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import (
    read_manifest,
    write_manifest,
)
from dovetail.runtime.tree.limits import TreeLimits


def edit(pair: Path, *path: str, value: object = None, drop: bool = False) -> None:
    raw = json.loads((pair / MANIFEST_NAME).read_text())
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (pair / MANIFEST_NAME).write_text(json.dumps(raw))


def message(error: pytest.ExceptionInfo[DovetailError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


def test_written_manifest_reads_back_equal(pair: Path) -> None:
    provenance = {"source": {"id": "é", "revision": None}, "versions": ["1.0"]}
    first = replace(read_manifest(pair), tree=TreeLimits(8, 4, 2), provenance=provenance)
    for manifest in (first, replace(first, drafter=None)):
        write_manifest(pair, manifest)
        assert read_manifest(pair) == manifest
        verify_files(pair, manifest)
        check_pair(manifest)
    assert sorted(p.name for p in pair.iterdir()) == [MANIFEST_NAME, "drafter", "target"]  # no temporary left


@pytest.mark.parametrize("fusion", ["dgf", "fc", 3])
def test_a_manifest_of_an_older_version_is_read(pair: Path, fusion: object) -> None:
    """It names the drafter's fusion, which the graph holds."""
    manifest = read_manifest(pair)
    edit(pair, "drafter", "fusion", value=fusion)
    assert read_manifest(pair) == manifest
    write_manifest(pair, read_manifest(pair))
    assert "fusion" not in json.loads((pair / MANIFEST_NAME).read_text())["drafter"]


@pytest.mark.parametrize(
    ("provenance", "kind"),
    [({}, None), ({"drafter": 3}, None), ({"drafter": {}}, None), ({"drafter": {"description": 3}}, None),
     ({"drafter": {"description": "a pebble"}}, "a pebble")],
)  # fmt: skip
def test_provenance_says_what_the_drafter_is(pair: Path, provenance: dict[str, object], kind: str | None) -> None:
    edit(pair, "provenance", value=provenance)
    assert read_manifest(pair).drafter_kind == kind


@pytest.mark.parametrize(
    "path",
    [("colour",), ("target", "colour"), ("drafter", "colour"), ("tree", "colour"),
     ("files", "target/openvino_model.bin", "colour")],
)  # fmt: skip
def test_unknown_key_is_named(pair: Path, path: tuple[str, ...]) -> None:
    edit(pair, *path, value=1)
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    assert "unknown key" in message(error) and "colour" in message(error)


@pytest.mark.parametrize(
    "path", [("name",), ("target", "vocab_size"), ("drafter", "top_k"), ("tree", "depth"), ("provenance",)]
)
def test_missing_key_is_named(pair: Path, path: tuple[str, ...]) -> None:
    edit(pair, *path, drop=True)
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    assert "missing" in message(error) and path[-1] in message(error)


@pytest.mark.parametrize("version", [0, 2, "1", None, []])
def test_other_version_says_what_to_do(pair: Path, version: object) -> None:
    edit(pair, "format_version", value=version)
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    assert "format_version" in message(error) and "export the pair again" in message(error)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("target", "vocab_size"), "300"), (("target", "vocab_size"), True), (("target", "vocab_size"), 0),
     (("target", "taps"), []), (("target", "taps"), "norm"), (("target", "eos_token_ids"), [1.5]),
     (("drafter", "files"), ["a"]), (("drafter",), 3), (("files",), []),
     (("drafter", "noise"), 1), (("drafter", "noise"), "yes"),
     (("tree", "width"), 0), (("name",), 7), (("files", "../../etc/passwd"), {"size": 0, "sha256": "0" * 64}),
     (("files", "x"), {"size": 0, "sha256": "xyz"}), (("files", "x"), {"size": -1, "sha256": "0" * 64})],
)  # fmt: skip
def test_wrong_value_is_a_manifest_error(pair: Path, path: tuple[str, ...], value: object) -> None:
    edit(pair, *path, value=value)
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    message(error)


FACTS = {
    "target": ("hidden_size", "feature_size", "vocab_size", "num_layers", "max_context"),
    "drafter": ("blocks", "hidden_size", "feature_size", "target_vocab_size", "draft_vocab_size", "num_kv_heads",
                "head_size", "top_k", "tree_slots", "max_context"),
}  # fmt: skip
NO_SIZES: tuple[object, ...] = (None, "300", 2.5, [], {}, True, 0, -1, 2**40, 10**30)


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in FACTS.items() for key in keys])
def test_every_size_is_a_whole_number_within_bounds(pair: Path, part: str, key: str) -> None:
    for value in NO_SIZES:
        edit(pair, part, key, value=value)
        with pytest.raises(ManifestError) as error:
            read_manifest(pair)
        assert key in message(error)
    path = pair / MANIFEST_NAME
    path.write_text(path.read_text().replace(f'"{key}": {NO_SIZES[-1]}', f'"{key}": 1e400'))
    with pytest.raises(ManifestError, match=f"{key} is inf, not a whole number"):
        read_manifest(pair)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("drafter", "workspace"), [10**400, 1]), (("drafter", "workspace"), [-1, 1]), (("drafter", "vram"), 2**60),
     (("tree", "width"), 2**40), (("tree", "depth"), 10**30), (("tree", "lookup"), 2**40), (("name",), "a\0b"),
     (("files", "drafter/a\0b"), {"size": 0, "sha256": "0" * 64}), (("target", "taps"), ["\0"]),
     (("drafter", "files", "cpu"), "drafter/\0")],
)  # fmt: skip
def test_other_values_have_bounds_too(pair: Path, path: tuple[str, ...], value: object) -> None:
    edit(pair, *path, value=value)
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    message(error)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100 + "]" * 100, '{"name": "\\ud800"}', '{"\\udfff": 1}']
)
def test_json_that_is_deep_or_no_text_is_refused(pair: Path, text: str) -> None:
    (pair / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match="is not valid JSON") as error:
        read_manifest(pair)
    message(error)


def test_a_manifest_is_not_read_without_end(pair: Path) -> None:
    with (pair / MANIFEST_NAME).open("wb") as file:
        file.truncate(1 << 40)  # a hole of a TiB
    with pytest.raises(ManifestError, match="more than 64 MiB"):
        read_manifest(pair)


def test_missing_and_damaged_manifests(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "nowhere")
    assert "nowhere" in message(error)
    path = pair / MANIFEST_NAME
    text = path.read_bytes()
    for damaged in (text[: len(text) // 2], b"", b"\xff\xfe", b"[]", b"null"):
        path.write_bytes(damaged)
        with pytest.raises(ManifestError) as error:
            read_manifest(pair)
        assert MANIFEST_NAME in message(error)
    path.unlink()
    with pytest.raises(ManifestError) as error:
        read_manifest(pair)
    assert "--resume" in message(error)


def test_failed_write_keeps_the_old_manifest(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (pair / MANIFEST_NAME).read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(pair, replace(read_manifest(pair), name="other"))
    assert (pair / MANIFEST_NAME).read_bytes() == before
    assert sorted(p.name for p in pair.iterdir()) == [MANIFEST_NAME, "drafter", "target"]
