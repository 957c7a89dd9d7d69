"""A drafter that reads three blocks of the target: trained, exported, and given the same features at run time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.exporter.check import check_pair_folder
from dovetail.exporter.corpus import Corpus
from dovetail.exporter.drafter import load_drafter
from dovetail.exporter.fit import FitOptions
from dovetail.exporter.pair import add_drafter
from dovetail.exporter.synth import BatchWriter, Request
from dovetail.exporter.train import TrainPlan, train
from dovetail.models.config import low_middle_high
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.errors import ExportError, IntegrityError
from dovetail.runtime.graph import FeatureMix, layer_outputs, read_model
from dovetail.runtime.manifest import read_manifest
from dovetail.runtime.openvino_target import OpenVINOTarget
from dovetail.runtime.paged import PagedModel


@pytest.fixture(scope="module")
def checkpoint(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter of the tiny target that has learned to read its layers."""
    folder, rng = tmp_path_factory.mktemp("layers"), np.random.default_rng(0)
    requests = [Request(tuple(map(int, rng.integers(0, 200, 6))), 0.0, 40) for _ in range(24)]
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
    tokens = np.arange(40, 60)
    manifest = read_manifest(pair)
    mixed = OpenVINOTarget.open(pair, manifest).prefill(tokens).features.copy()
    wide = PagedModel(pair / "target" / "openvino_model.xml", layers=(0, 1))
    assert wide.feature_size == 3 * mixed.shape[1]
    read = OpenVINOTarget(wide, 256).prefill(tokens).features.copy()
    drafter = load_drafter(checkpoint, pair / "target")
    assert drafter.mix is not None and drafter.mix.proj.weight.abs().max() > 0
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


def test_a_damaged_mix_is_named(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(IntegrityError, match=r"mix\.npz cannot be read"):
        FeatureMix.load(tmp_path / "mix.npz")
    FeatureMix((0, 1), np.zeros((8, 24), np.float32), 1e-5).save(tmp_path / "odd.npz")
    with pytest.raises(IntegrityError, match=r"\(8, 24\) for 2 layers"):
        FeatureMix.load(tmp_path / "odd.npz")


def test_layers_are_found_or_refused(tiny_target: Path) -> None:
    outputs = layer_outputs(read_model(tiny_target / "openvino_model.xml"))
    assert [output.get_partial_shape()[2].get_length() for output in outputs] == [32, 32]
    with pytest.raises(ExportError, match="layer 7 is none of the target's 2"):
        PagedModel(tiny_target / "openvino_model.xml", layers=(7,))
