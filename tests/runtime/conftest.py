"""A tiny pair and its engines, for the tests of what drafts on a device."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cpu, open_cuda
from dovetail.runtime.engine import Engine
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits


class Pairs:
    """Drafters of one pair, on the CPU and on a device that may fail, and engines over its target."""

    limits = TreeLimits(width=12, depth=4, top_k=3, lookup=0)
    prompt = "the quick brown fox"

    def __init__(self, pair: Path):
        self.pair, self.manifest = pair, read_manifest(pair)

    @cached_property
    def target(self) -> OpenVINOTarget:
        return OpenVINOTarget.load(self.pair, self.manifest, threads=1)

    def cpu(self, note: str = "asked for", texts: int = 1) -> OnnxDrafter:
        return open_cpu(self.pair, self.manifest.needed_drafter, note, threads=1, texts=texts)

    def on(self, device: Any, **options: Any) -> OnnxDrafter:
        return open_cuda(self.pair, self.manifest, new_device=lambda: device, **options)

    def engine(self, drafter: Any) -> Engine:
        tokenizer = Tokenizer.from_folder(self.pair / "target")
        return Engine(self.target, drafter, tokenizer, tree=self.limits, stop_tokens=())

    def text(self, drafter: Any, **sampling: Any) -> tuple[int, ...]:
        return self.engine(drafter).generate(self.prompt, 80, raw=True, **sampling).token_ids

    @staticmethod
    def assert_alike(got: DraftTree, want: DraftTree) -> None:
        """The same tree, but for what float16 does to log-probabilities."""
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.parents, want.parents)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=0.02)


@pytest.fixture
def quick_costs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The cache folder of a module's tests, where a measurement takes a tenth of a second."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{request.module.__name__}"
    monkeypatch.setenv("DOVETAIL_CACHE", str(folder))
    monkeypatch.setattr("dovetail.runtime.tune.measure.QUICK_SECONDS", 0.1)
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_full_pair: Path) -> Pairs:
    return Pairs(tiny_full_pair)


@pytest.fixture
def stream(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """250 random pairs: tokens, and the features before them."""
    rng = np.random.default_rng(1)
    facts = pairs.manifest.target
    return rng.integers(0, facts.vocab_size, 250), rng.standard_normal((250, facts.feature_size)).astype(np.float32)
