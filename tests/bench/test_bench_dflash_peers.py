"""The comparison of DFlash drafts passes for equal weights, and fails if two weights are swapped."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the module that the peer is compared with is torch's")

from dovetail.exporter.drafter.export import load_drafter
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.models.dflash import DFlash
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.pair.manifest import Manifest


class TorchPeer:
    """A peer that computes with a DFlash module."""

    def __init__(self, module: DFlash):
        self.module = module

    def logits(self, context: Any) -> np.ndarray:
        with torch.no_grad():
            features = self.module.mix(torch.from_numpy(context.taps))
            found: np.ndarray = self.module(features, torch.tensor([context.token])).numpy()
        return found


@pytest.fixture(scope="module")
def script(bench_script) -> ModuleType:
    return bench_script("dflash_peers")


@pytest.fixture(scope="module")
def exact(script: ModuleType, module: DFlash, pair: Path) -> Manifest:
    return script.in_float32(pair, module)


@pytest.fixture(scope="module")
def checkpoint(dflash: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DFlash checkpoint over the whole vocabulary of `tiny_llama`."""
    flags = dflash.Flags(vocabulary=263, depth=2, taps=(0,), mask=262)
    return dflash.write(tmp_path_factory.mktemp("dflash_peer"), flags)


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_pair, tmp_path_factory.mktemp("peer_pair") / "tiny")
    add_drafter(checkpoint, copy)
    return copy


@pytest.fixture(scope="module")
def module(pair: Path, checkpoint: Path) -> DFlash:
    found = load_drafter(checkpoint, pair / "target")
    assert isinstance(found, DFlash)
    return found


@pytest.mark.parametrize(
    "swapped",
    [None, ("layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"), ("norm", "hidden_norm")],
    ids=["equal", "keys", "norms"],
)
def test_swapped_weights_are_seen(
    script: ModuleType, exact: Manifest, pair: Path, module: DFlash, checkpoint: Path, swapped: tuple[str, str] | None
) -> None:
    other = load_drafter(checkpoint, pair / "target")
    assert isinstance(other, DFlash)
    if swapped:
        one, two = (other.get_parameter(f"{name}.weight") for name in swapped)
        with torch.no_grad():
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)
    rng = np.random.default_rng(3)
    asked = [script.Context(rng.standard_normal((count, 32)).astype(np.float32), count) for count in (1, 2, 9, 30, 140)]
    session = open_drafter(pair, exact, device="cpu", threads=1)
    found = script.compare(TorchPeer(other), module, {"float32": session}, asked)
    assert {name: agreement.same for name, agreement in found.items()} == dict.fromkeys(
        ("torch", "float32"), swapped is None
    )
    assert {agreement.positions for agreement in found.values()} == {5 * 4}


def test_a_tie_counts_as_equal_and_no_position_as_different(script: ModuleType) -> None:
    tied, apart = np.array([[1.0, 1.0005, 0.0]], np.float32), np.array([[1.0, 1.01, 0.0]], np.float32)
    for peer, equal in ((tied, 1), (apart, 0)):
        agreement = script.Agreement()
        agreement.add([0], peer)
        assert (agreement.equal, agreement.same) == (equal, bool(equal))
    assert not script.Agreement().same
    assert "0 of 1 (0.01)" in str(agreement)
