"""Every way to spoil a pair's files is one typed, one-line error."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.runtime.errors import DovetailError, IntegrityError, ManifestError, MismatchError
from dovetail.runtime.pair.check import check_pair, read_sound, verify_files
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import read_manifest


def message(error: pytest.ExceptionInfo[DovetailError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


@pytest.mark.parametrize("name", [MANIFEST_NAME, "target/openvino_model.bin", "target/config.json", "drafter/more"])
def test_a_pipe_is_never_read(pair: Path, name: str) -> None:
    (pair / name).unlink(missing_ok=True)
    os.mkfifo(pair / name)
    with pytest.raises(DovetailError, match="not a regular file") as error:
        verify_files(pair, read_manifest(pair))
    assert name in message(error)


def test_a_device_is_never_read(pair: Path) -> None:
    (pair / "target/chat_template.jinja").symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja cannot be read \(not a regular file\)"):
        verify_files(pair, read_manifest(pair))


def test_truncated_flipped_and_missing_files_are_named(pair: Path) -> None:
    manifest = read_manifest(pair)
    weights = pair / "target/openvino_model.bin"
    content = weights.read_bytes()
    verify_files(pair, manifest)

    weights.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="truncated") as error:
        verify_files(pair, manifest)
    assert "openvino_model.bin" in message(error) and "--resume" in message(error)

    stat = weights.stat()
    weights.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(IntegrityError, match="altered") as error:
        verify_files(pair, manifest)
    assert "openvino_model.bin" in message(error)

    weights.unlink()
    with pytest.raises(IntegrityError, match="missing") as error:
        verify_files(pair, manifest)
    assert "openvino_model.bin" in message(error)


def test_drafter_file_without_a_digest_is_refused(pair: Path) -> None:
    manifest = read_manifest(pair)
    files = {name: entry for name, entry in manifest.files.items() if "int8" not in name}
    with pytest.raises(IntegrityError, match=r"drafter\.int8\.onnx"):
        verify_files(pair, replace(manifest, files=files))


@pytest.mark.parametrize(
    ("key", "value"), [("target_vocab_size", 301), ("tokenizer_sha256", "b" * 64), ("tree_slots", 8)]
)
def test_a_drafter_that_reads_tokens_has_sizes_of_its_own(pair: Path, key: str, value: object) -> None:
    manifest = read_manifest(pair)
    drafter = replace(manifest.needed_drafter, reads_tokens=True, hidden_size=64, feature_size=64)
    check_pair(replace(manifest, drafter=drafter))
    other = replace(drafter, **{key: value})  # type: ignore[arg-type]  # the key decides the type
    with pytest.raises(MismatchError):
        check_pair(replace(manifest, drafter=other))


def test_a_drafter_that_reads_tokens_reads_no_features(pair: Path) -> None:
    drafter = read_manifest(pair).needed_drafter
    mixed = {"feature_layers": (0,), "files": {**drafter.files, "features": "drafter/mix.npz"}}
    for changes in (mixed, {"positions": 4}):
        with pytest.raises(ManifestError, match="reads_tokens with feature_layers or positions"):
            replace(drafter, reads_tokens=True, **changes)


def test_a_pair_from_before_reads_tokens_still_opens(pair: Path) -> None:
    file = pair / MANIFEST_NAME
    content = json.loads(file.read_text())
    assert content["drafter"].pop("reads_tokens") is False
    file.write_text(json.dumps(content))
    assert read_manifest(pair).needed_drafter.reads_tokens is False


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 64), ("feature_size", 96), ("target_vocab_size", 301), ("tokenizer_sha256", "b" * 64),
     ("draft_vocab_size", 301), ("tree_slots", 8)],
)  # fmt: skip
def test_drafter_of_another_target_is_refused(pair: Path, key: str, value: object) -> None:
    manifest = read_manifest(pair)
    drafter = replace(manifest.needed_drafter, **{key: value})  # type: ignore[arg-type]  # the key decides the type
    with pytest.raises(MismatchError) as error:
        check_pair(replace(manifest, drafter=drafter))
    message(error)


def test_a_target_whose_graph_is_not_listed_is_refused(pair: Path) -> None:
    """Its digest could not be checked, so an altered graph would run."""
    with pytest.raises(IntegrityError, match=r"openvino_model\.xml has no digest"):
        read_sound(pair)
