"""The drafter on a real GPU: captured graphs draft what the CPU does, quicker than launched ones, within the limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.devices.cuda import CudaDevice, cuda_problem
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cuda, open_drafter
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import plan_pair
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text

PROBLEM = cuda_problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"no GPU: {PROBLEM}")]
LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=0)
LIMIT = 3 * 10**9


@pytest.fixture(scope="module")
def manifest(tiny_full_pair: Path) -> Manifest:
    return read_manifest(tiny_full_pair)


@pytest.fixture(scope="module")
def bench(bench_script: Callable[[str], ModuleType]) -> ModuleType:
    return bench_script("gpu")


@pytest.fixture(scope="module")
def drafter(tiny_full_pair: Path, manifest: Manifest) -> OnnxDrafter:
    return open_drafter(tiny_full_pair, manifest, device="cuda", vram=LIMIT)


def test_captured_graphs_draft_what_the_host_does(
    drafter: OnnxDrafter, tiny_full_pair: Path, manifest: Manifest, HostDevice: type
) -> None:
    host = open_cuda(tiny_full_pair, manifest, new_device=HostDevice)
    rng = np.random.default_rng(0)
    drafter.rewind(SEQ, 0)
    for rows in (9, 1, 128, 3, 17, 40, 2):
        tokens = rng.integers(0, manifest.target.vocab_size, rows)
        features = rng.standard_normal((rows, manifest.target.feature_size)).astype(np.float32)
        for session in (drafter, host):
            session.extend(SEQ, tokens, features)
        got, want = (paths(session.propose(SEQ, LIMITS)) for session in (drafter, host))
        assert all(abs(got[path] - want[path]) < 0.02 for path in got.keys() & want.keys())
        # float16 adds in another order: at a near tie the trees may differ in their last nodes.
        for one, other in ((got, want), (want, got)):
            assert all(one[path] < min(other.values()) + 0.02 for path in one.keys() - other.keys())


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """The log-probability of each node, by the tokens down to it."""
    tokens = [tuple(tree.tokens[path].tolist()) for path in node_paths(tree)]
    return dict(zip(tokens, tree.logprobs.tolist(), strict=True))


def node_paths(tree: DraftTree) -> list[list[int]]:
    """The nodes from the root down to each node."""
    found = [[0]]
    for node, parent in enumerate(tree.parents.tolist()[1:], 1):
        found.append([*found[parent], node])
    return found


def test_replay_is_quicker_than_launching(drafter: OnnxDrafter, bench: ModuleType) -> None:
    for bucket, ms in bench.latencies(drafter).items():
        assert ms["uncaptured"] > 1.5 * ms["captured"], (bucket, ms)


def test_the_limit_is_kept(drafter: OnnxDrafter, bench: ModuleType) -> None:
    used = bench.used_vram_mb()
    if used is None:
        pytest.skip("nvidia-smi does not tell what this process holds, as in a container of its own")
    assert used << 20 <= LIMIT


def test_a_limit_that_is_too_small_is_refused(tiny_full_pair: Path, manifest: Manifest) -> None:
    with pytest.raises(DeviceError, match="does not fit"):
        open_drafter(tiny_full_pair, manifest, device="cuda", vram=plan_pair(manifest).total - 2**20)


def test_more_than_the_device_has_is_refused_in_one_line() -> None:
    device = CudaDevice(DRAFTING)
    try:
        with pytest.raises(DeviceError, match=r"cudaMalloc: .* \(code 2\): free VRAM") as told:
            device.allocate(2 * device.memory()[1])
        assert "\n" not in str(told.value)
        device.allocate(1 << 20)  # the device goes on
    finally:
        device.close()


@pytest.mark.parametrize("name", ["tiny_full_pair", "language_pair"])
def test_an_engine_writes_the_same_text_with_either_drafter(request: pytest.FixtureRequest, name: str) -> None:
    pair, texts = request.getfixturevalue(name), set()
    for device in ("cuda", "cpu"):
        with Engine.from_pretrained(pair, drafter_device=device, tree=LIMITS) as engine:
            texts.add(engine.generate("the quick brown fox", 60, raw=True).token_ids)
            assert (device == "cuda") == (engine.drafter_device == "CUDA (fp16)")
    assert len(texts) == 1
