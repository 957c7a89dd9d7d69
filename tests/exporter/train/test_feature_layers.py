"""A drafter that reads three blocks of the target: trained, exported, and given the same features at run time."""

from __future__ import annotations

import io
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter.export import load_drafter
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.plan import FitOptions, TrainPlan
from dovetail.exporter.train.run import train
from dovetail.exporter.train.writer import BatchWriter
from dovetail.models.config import low_middle_high
from dovetail.models.drafter import DraftModel
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.errors import ExportError, IntegrityError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.pair.manifest import file_entry, read_manifest, write_manifest
from dovetail.runtime.target.features import FeatureMix, layer_outputs
from dovetail.runtime.target.graph import read_model
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel


@pytest.fixture(scope="module")
def checkpoint(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter of the tiny target that has learned to read its layers."""
    folder, rng = tmp_path_factory.mktemp("layers"), np.random.default_rng(0)
    requests = [Request(tuple(map(int, rng.integers(0, 200, 6))), 40) for _ in range(24)]
    model = PagedModel(tiny_pair / "target" / "openvino_model.xml")
    Corpus.of(BatchWriter(model, [], slots=8, max_length=64).write(requests, rng)).save(folder / "corpus.npz")
    fit = FitOptions(epochs=4, unroll=2, window=48, warmup=2, learning_rate=3e-3)
    plan = TrainPlan(corpora=(folder / "corpus.npz",), draft_vocab=128, fit=fit)
    train(tiny_pair, folder / "drafter", plan, lambda *_: None)
    return folder / "drafter"


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "layers"
    shutil.copytree(tiny_pair, folder)
    add_drafter(checkpoint, folder)
    return folder


def test_the_layers_are_those_of_eagle_3() -> None:
    assert low_middle_high(30) == (2, 15, 27)
    assert low_middle_high(2) == (0, 1)
    assert low_middle_high(1) == (0,)


def test_the_runtime_gives_the_features_that_training_read(pair: Path, checkpoint: Path) -> None:
    def features_of(target: OpenVINOTarget) -> np.ndarray:
        return target.prefill(target.open(), np.arange(40, 60)).features.copy()

    manifest = read_manifest(pair)
    mixed = features_of(OpenVINOTarget.load(pair, manifest))
    wide = PagedModel(pair / "target" / "openvino_model.xml", layers=(0, 1))
    assert wide.feature_size == 3 * mixed.shape[1]
    read = features_of(OpenVINOTarget(wide, 256))
    drafter = load_drafter(checkpoint, pair / "target")
    assert isinstance(drafter, DraftModel)
    assert drafter.mix is not None and drafter.mix.folded().abs().max() > 0
    with torch.no_grad():
        expected = drafter.read(torch.from_numpy(read)).numpy()
    assert np.linalg.norm(mixed - expected) < 0.01 * np.linalg.norm(expected)
    assert np.linalg.norm(read[:, -mixed.shape[1] :] - expected) > 0.02 * np.linalg.norm(expected)


def test_such_a_pair_passes_its_checks_and_speculates_without_changing_the_text(pair: Path) -> None:
    manifest = check_pair_folder(pair)
    assert manifest.drafter and manifest.drafter.feature_layers == (0, 1)
    with Engine.from_pretrained(pair, tree=TreeLimits(width=4, depth=3, top_k=1)) as engine:
        ours = engine.generate("the cat", max_new_tokens=24, raw=True)
        plain = engine.generate("the cat", max_new_tokens=24, raw=True, tree=TreeLimits(1, 0, 1, lookup=0))
    assert ours.token_ids == plain.token_ids


def zipped(shape: tuple[int, ...], kept: int, method: int = zipfile.ZIP_DEFLATED, **other: np.ndarray) -> bytes:
    """An archive whose `weight` says that it is float16 of this shape, followed by `kept` bytes of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, array in {"layers": np.array([0, 1]), "eps": np.array(1e-5), **other}.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        with archive.open("weight.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(kept >> 20):
                file.write(bytes(1 << 20))
            file.write(bytes(kept & (1 << 20) - 1))
    return buffer.getvalue()


WHOLE = zipped((32, 64), 4096, zipfile.ZIP_STORED)
DAMAGED_MIXES = {
    "nothing": b"",
    "no archive": b"PK\x03\x04 nonsense",
    "an array": b"\x93NUMPY\x01\x00",
    "cut": WHOLE[: len(WHOLE) // 2],
    "header flipped": WHOLE.replace(b"{'descr': '<f2'", b"('descr': '<f2'"),
    "header with a name": WHOLE.replace(b"(32, 64)", b"(32, 6L)"),
    "too large a shape": zipped((2**40, 2**40), 4096),
    "a shape without its numbers": zipped((2**16, 2**17), 4096),
    "a bomb": zipped((2**15, 2**15), 2**31),
    "another width": zipped((8, 24), 384),
    "other layers": zipped((32, 64), 4096, layers=np.array([0, 7])),
    "texts": zipped((32, 64), 4096, layers=np.array(["a", "b"])),
    "objects": zipped((32, 64), 4096, eps=np.array("1e-5")),
    "eps of many": zipped((32, 64), 4096, eps=np.zeros(3)),
    "eps of nan": zipped((32, 64), 4096, eps=np.array(np.nan)),
}


@pytest.mark.parametrize("content", DAMAGED_MIXES.values(), ids=DAMAGED_MIXES)
def test_a_damaged_mix_is_refused_at_once(content: bytes, pair: Path, tmp_path: Path) -> None:
    facts = read_manifest(pair).drafter
    assert facts
    (tmp_path / "mix.npz").write_bytes(WHOLE)
    assert FeatureMix.load(tmp_path / "mix.npz", facts).layers == (0, 1)
    (tmp_path / "mix.npz").write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(IntegrityError, match=r"mix\.npz .*: export the drafter again$") as caught:
        FeatureMix.load(tmp_path / "mix.npz", facts)
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 5


def test_a_damaged_mix_is_no_interrupt(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """click takes an end of file for Ctrl-D."""
    copy = shutil.copytree(pair, tmp_path / "pair")
    mix = copy / "drafter" / "feature_mix.npz"
    mix.write_bytes(b"")
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, files={**manifest.files, "drafter/feature_mix.npz": file_entry(mix)}))
    assert main(["check", str(copy)]) == IntegrityError.exit_code
    said = capsys.readouterr().err
    assert "feature_mix.npz cannot be read" in said and "interrupted" not in said


def test_layers_are_found_or_refused(tiny_target: Path) -> None:
    outputs = layer_outputs(read_model(tiny_target / "openvino_model.xml"))
    assert [output.get_partial_shape()[2].get_length() for output in outputs] == [32, 32]
    with pytest.raises(ExportError, match="layer 7 is none of the target's 2"):
        PagedModel(tiny_target / "openvino_model.xml", layers=(7,))
