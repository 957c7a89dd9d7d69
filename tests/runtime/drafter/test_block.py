"""BlockDrafter drafts what the torch module does, in one call a round, and changes no text.

The tiny DFlash drafter is exported once in float32 and once as a pair. In float32 it must equal torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is the torch drafter")

from dovetail.exporter.drafter import block_graph
from dovetail.exporter.drafter.export import load_drafter, save
from dovetail.models.dflash import DFlash
from dovetail.runtime.drafter.block import BlockDrafter
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cpu, open_cuda, open_drafter
from dovetail.runtime.drafter.session import DeviceReport, Drafter
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.manifest import Manifest, read_manifest
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, best_first
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text
LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=0)
CHAIN = TreeLimits(width=6, depth=5, top_k=1, lookup=0)
PROMPT = "the quick brown fox"


@dataclass(frozen=True)
class Tiny:
    """The tiny drafter in torch, and as a float32 file in a folder of its own."""

    pair: Path
    manifest: Manifest
    exact: Manifest  # with the float32 file for the CPU
    folder: Path
    module: DFlash

    def open(self) -> BlockDrafter:
        drafter = open_drafter(self.folder, self.exact, device="cpu", threads=1)
        assert isinstance(drafter, BlockDrafter)
        return drafter

    def want(self, tokens: np.ndarray, features: np.ndarray, noise: np.ndarray | None = None) -> Candidates:
        """Torch's candidates after a whole context, all of them, best first."""
        with torch.no_grad():
            logits = self.module(torch.from_numpy(features), torch.from_numpy(tokens[-1:]))
        logits = logits if noise is None else logits + torch.from_numpy(noise)
        logprobs, order = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True)
        return Candidates(logprobs.numpy(), self.module.d2t[order].numpy())


def in_float32(pair: Path, manifest: Manifest, module: DFlash, folder: Path) -> Tiny:
    """Export `module` in float32 for the CPU. manifest: of `pair`."""
    slots, count = manifest.needed_drafter.tree_slots, module.shape.draft_vocab_size
    files = {**manifest.needed_drafter.files, "cpu": "f32.onnx"}
    facts = replace(manifest.needed_drafter, draft_vocab_size=count, top_k=min(10, count), files=files)
    save(block_graph.to_onnx(module, torch.float32, slots=slots, top_k=facts.top_k), folder / "f32.onnx")
    exact = replace(manifest, drafter=facts)
    return Tiny(pair, manifest, exact, folder, module)


@pytest.fixture(scope="module")
def tiny(dflash_pair: Path, tiny_dflash: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    module = load_drafter(tiny_dflash, dflash_pair / "target")
    assert isinstance(module, DFlash)
    return in_float32(dflash_pair, read_manifest(dflash_pair), module, tmp_path_factory.mktemp("f32"))


@pytest.fixture
def stream(tiny: Tiny) -> tuple[np.ndarray, np.ndarray]:
    """250 random pairs: tokens, and the features before them."""
    rng = np.random.default_rng(1)
    facts = tiny.manifest.target
    return rng.integers(0, facts.vocab_size, 250), rng.standard_normal((250, facts.feature_size)).astype(np.float32)


def assert_same(got: DraftTree, want: DraftTree, tolerance: float = 1e-4) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.parents, want.parents)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=tolerance)


def test_the_manifest_picks_the_session(tiny: Tiny) -> None:
    assert tiny.manifest.needed_drafter.positions == 5
    session = tiny.open()
    assert isinstance(session, BlockDrafter) and isinstance(session, Drafter)


def test_chunks_and_rewinds_draft_what_torch_does(tiny: Tiny, stream) -> None:
    """Calls of 1 to 128 rows; a rewind into what was read, and one into what waits."""
    tokens, features = stream
    session, context = tiny.open(), np.zeros((0, features.shape[1]), np.float32)
    begin = 0
    for keep, new in ((0, 9), (9, 1), (10, 140), (149, 3), (40, 30), (60, 2)):
        session.rewind(SEQ, keep)
        part = slice(begin, begin + new)
        session.extend(SEQ, tokens[part], features[part])
        context = np.concatenate([context[:keep], features[part]])
        assert session.length(SEQ) == len(context) == keep + new
        assert_same(
            session.propose(SEQ, LIMITS), best_first(int(tokens[part][-1]), tiny.want(tokens[part], context), LIMITS)
        )
        begin += new
    session.extend(SEQ, tokens[:5], features[:5])
    session.rewind(SEQ, session.length(SEQ) - 2)  # two of the five wait no more
    session.extend(SEQ, tokens[5:6], features[5:6])
    context = np.concatenate([context, features[:3], features[5:6]])
    assert_same(session.propose(SEQ, LIMITS), best_first(int(tokens[5]), tiny.want(tokens[5:6], context), LIMITS))


def counted(session: BlockDrafter, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and context of each call that the session makes from now on."""
    calls, run = list[tuple[int, int]](), session._runner.run

    def counting(n: int, context: int, *rest: Any, **more: Any) -> Candidates:
        calls.append((n, context))
        return run(n, context, *rest, **more)

    monkeypatch.setattr(session._runner, "run", counting)
    return calls


def test_a_round_is_one_call(tiny: Tiny, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, features = stream
    session = tiny.open()
    calls = counted(session, monkeypatch)
    session.extend(SEQ, tokens[:200], features[:200])
    assert calls == [(128, 128)]
    session.propose(SEQ, LIMITS)
    for begin in (200, 203):
        session.extend(SEQ, tokens[begin : begin + 3], features[begin : begin + 3])
        deep = session.propose(SEQ, TreeLimits(width=30, depth=5, top_k=3, lookup=0))
        assert len(deep) == 30
        session.propose(SEQ, LIMITS)  # asked again, nothing is computed again
    assert calls == [(128, 128), (72, 200), (3, 203), (3, 206)]


def test_noise_of_each_depth_is_the_samplers(tiny: Tiny, stream) -> None:
    tokens, features = stream
    session, sampler = tiny.open(), Sampler(SamplingParams(temperature=1.0, seed=3))
    sampler.pick(np.zeros(tiny.manifest.target.vocab_size, np.float32), 0, [])
    ids = tiny.module.d2t.numpy()
    session.extend(SEQ, tokens[:20], features[:20])
    got = session.propose(SEQ, LIMITS, noise=lambda depth, ids: sampler.ahead(20 + depth, ids))
    noise = np.stack([sampler.ahead(20 + depth, ids) for depth in range(1, 6)])
    assert_same(got, best_first(int(tokens[19]), tiny.want(tokens[:20], features[:20], noise), LIMITS))
    session.extend(SEQ, tokens[20:21], features[20:21])  # the next call has none
    assert_same(
        session.propose(SEQ, LIMITS), best_first(int(tokens[20]), tiny.want(tokens[:21], features[:21]), LIMITS)
    )


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_after_a_nan_no_text_drafts_from_cleared_memory(tiny: Tiny, stream, HostDevice, device: str) -> None:
    """The text that failed, another one where there is room, and a shorter call in rows that held the NaN."""

    def opened() -> OnnxDrafter:
        if device == "cpu":
            return open_drafter(tiny.folder, tiny.exact, device="cpu", threads=1, texts=2)
        return open_cuda(tiny.pair, tiny.manifest, new_device=HostDevice)

    (tokens, features), session, other = stream, opened(), SEQ + (device == "cpu")
    session.extend(SEQ, tokens[:9], features[:9])
    session.propose(SEQ, LIMITS)
    spoiled = features[:8].copy()  # a whole bucket of a GPU: of rows that write to one place its last row stays
    spoiled[-1] = np.nan
    session.extend(other, tokens[:8], spoiled)
    with pytest.raises(DeviceError, match="no numbers"):
        session.propose(other, LIMITS)
    assert session.length(SEQ) == session.length(other) == 0
    trees = []
    for each in (session, opened()):
        each.extend(SEQ, tokens[:3], features[:3])
        trees.append(each.propose(SEQ, LIMITS))
    assert_same(trees[0], trees[1], tolerance=0.0)


def test_bad_calls_are_errors_that_name_the_remedy(tiny: Tiny, stream) -> None:
    tokens, features = stream
    session = tiny.open()
    with pytest.raises(InputError, match="nothing to draft from"):
        session.propose(SEQ, LIMITS)
    with pytest.raises(InputError, match="do not fit 3 tokens"):
        session.extend(SEQ, tokens[:3], features[:2])
    with pytest.raises(InputError, match="leave the vocabulary of 263"):
        session.extend(SEQ, np.array([263]), features[:1])
    session.extend(SEQ, tokens[:4], features[:4])
    with pytest.raises(InputError, match="holds number 1"):
        session.extend(2, tokens[:1], features[:1])
    with pytest.raises(InputError, match="cannot keep 5 pairs of 4"):
        session.rewind(SEQ, 5)
    with pytest.raises(InputError, match="top_k 11 exceeds the drafter's"):
        session.propose(SEQ, TreeLimits(width=4, depth=2, top_k=11))
    with pytest.raises(ContextOverflow, match="exceed the drafter's context of 256"):
        session.extend(SEQ, np.zeros(253, np.int64), np.zeros((253, 32), np.float32))
    session.rewind(SEQ, 2)
    with pytest.raises(InputError, match="nothing to draft from"):
        session.propose(SEQ, LIMITS)
    session.rewind(SEQ, 0)
    session.extend(2, tokens[:1], features[:1])  # room for another text
    assert (session.length(SEQ), session.length(2)) == (0, 1)


def test_a_graph_of_the_other_kind_is_refused(tiny: Tiny) -> None:
    facts = tiny.exact.needed_drafter
    with pytest.raises(DeviceError, match=r"f32\.onnx has no 'bank': export the drafter again"):
        open_cpu(tiny.folder, replace(facts, positions=0), "asked for", threads=1)
    with pytest.raises(DeviceError, match=r"noise is .* the manifest says"):
        open_cpu(tiny.folder, replace(facts, positions=4), "asked for", threads=1)


class TorchDrafter:
    """A Drafter that runs the torch module itself over the whole context."""

    device, capacity, top_k = "torch", 256, 10
    report = DeviceReport()

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.tokens, self.features = tiny, list[int](), list[np.ndarray]()

    def length(self, seq: int) -> int:
        return len(self.tokens)

    def extend(self, seq: int, tokens: np.ndarray, features: np.ndarray, noise: Any = None) -> None:
        self.tokens += tokens.tolist()
        self.features += list(features.copy())

    def propose(self, seq: int, limits: TreeLimits, judge: Any = None, noise: Any = None) -> DraftTree:
        found = self.tiny.want(np.array(self.tokens), np.array(self.features))
        return best_first(self.tokens[-1], found, limits, judge=judge)

    def rewind(self, seq: int, keep: int) -> None:
        del self.tokens[keep:], self.features[keep:]

    def close(self) -> None:
        self.tokens.clear()


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> OpenVINOTarget:
    return OpenVINOTarget.load(tiny.pair, tiny.manifest, threads=1)


@pytest.fixture
def engine(tiny: Tiny, target: OpenVINOTarget) -> Callable[..., Engine]:
    def opened(drafter: Any, tree: TreeLimits = LIMITS, **more: Any) -> Engine:
        tokenizer = Tokenizer.from_folder(tiny.pair / "target")
        return Engine(target, drafter, tokenizer, tree=tree, stop_tokens=(), **more)

    return opened


def test_a_chain_is_accepted_as_often_before_and_after_export(tiny: Tiny, engine, tmp_path: Path) -> None:
    """With a draft vocabulary of the target's two most frequent tokens, which are often right."""
    text = engine(None).generate(PROMPT, 80, raw=True).token_ids
    frequent = torch.tensor([token for token, _ in Counter(text).most_common(2)])
    small = in_float32(tiny.pair, tiny.manifest, tiny.module.narrowed(torch.isin(tiny.module.d2t, frequent)), tmp_path)
    before = engine(TorchDrafter(small), CHAIN).generate(PROMPT, 80, raw=True)
    after = engine(small.open(), CHAIN).generate(PROMPT, 80, raw=True)
    assert after.token_ids == before.token_ids == text
    assert after.metrics.accepted == before.metrics.accepted > 0
    assert after.metrics.rounds == before.metrics.rounds


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_text_is_that_of_plain_decoding(tiny: Tiny, engine, sampling: dict[str, Any]) -> None:
    writer = engine(open_drafter(tiny.pair, tiny.manifest, device="cpu", threads=1))
    for prompt in (PROMPT, PROMPT + " jumps", "the cat"):  # the second goes on from the first, the third starts over
        drafted = writer.generate(prompt, 60, raw=True, **sampling)
        plain = writer.generate(prompt, 60, raw=True, speculate=False, **sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.metrics.drafted > 60 and plain.metrics.drafted == 0


@pytest.mark.parametrize("name", ["run", "rows"])
def test_after_an_interrupt_anywhere_the_text_is_the_same(
    tiny: Tiny, engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tiny.open()
    writer = engine(session)
    plain = writer.generate(PROMPT, 50, raw=True, speculate=False).token_ids
    real, calls = getattr(session._runner, name), 0

    def interrupted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments, **more)
        if calls % 4 == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(session._runner, name, interrupted)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            writer.generate(PROMPT, 50, raw=True)
    monkeypatch.undo()
    drafted = writer.generate(PROMPT, 50, raw=True)
    assert drafted.token_ids == plain and drafted.metrics.drafted > 20


def test_a_scheduler_drafts_with_one_call_and_learns_its_time(tiny: Tiny, engine) -> None:
    """A draft that costs nothing pays, so that the scheduler takes trees of any depth."""
    flat = Curve((0,), (1, 128), ((1.0, 1.2),))
    costs = Costs(Curve((0,), (1, 32), ((100.0, 101.0),)), flat)
    writer = engine(tiny.open(), TreeLimits(width=32, depth=5, top_k=3, lookup=0), scheduler=Scheduler(costs))
    drafted = writer.generate(PROMPT, 60, raw=True)
    plain = writer.generate(PROMPT, 60, raw=True, speculate=False)
    assert drafted.token_ids == plain.token_ids and drafted.metrics.drafted > 10


def test_an_engine_measures_and_schedules_it(tiny: Tiny, quick_costs: Path) -> None:
    """The whole way of `dovetail-run generate`: costs of this machine, trees as deep as a block."""
    with Engine.from_pretrained(tiny.pair, drafter_device="cpu", threads=1) as writer:
        assert writer.tree.depth == 5 and writer.drafter_device == "CPU (int8)"
        choices: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 1})
        for sampling in choices:
            drafted = writer.generate(PROMPT, 40, raw=True, **sampling)
            plain = writer.generate(PROMPT, 40, raw=True, speculate=False, **sampling)
            assert drafted.token_ids == plain.token_ids
    (kept,) = (quick_costs / "costs").glob("*.json")
    assert json.loads(kept.read_text())["costs"]["draft"]["rows"][0] == 1


def test_timing_measures_one_call_with_reading(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.open()
    calls = counted(session, monkeypatch)
    for rows in (1, 16, 128):
        session.pretend_length(SEQ, 100)
        assert session.time_pass(SEQ, rows) > 0
    assert calls == [(1, 101), (16, 116), (128, 228)]
    session.rewind(SEQ, 0)


def test_the_float16_graph_on_a_device_drafts_what_float32_does(tiny: Tiny, stream, HostDevice) -> None:
    tokens, features = stream
    device, want = HostDevice(), tiny.open()
    got = open_cuda(tiny.pair, tiny.manifest, new_device=lambda: device)
    begin = 0
    for rows in (9, 1, 128, 3, 17, 40, 2):
        for session in (got, want):
            session.extend(SEQ, tokens[begin : begin + rows], features[begin : begin + rows])
        begin += rows
        assert_same(got.propose(SEQ, LIMITS), want.propose(SEQ, LIMITS), 0.02)
    device.calls.clear()
    got.extend(SEQ, tokens[:2], features[:2])
    got.propose(SEQ, LIMITS)
    assert device.calls == ["up", "down", "wait"]
    got.close()


def test_a_device_that_fails_is_left_and_the_text_stays(tiny: Tiny, engine, HostDevice, caplog) -> None:
    plain = engine(tiny.open()).generate(PROMPT, 40, raw=True, speculate=False).token_ids
    first = open_cuda(tiny.pair, tiny.manifest, new_device=lambda: HostDevice(fail_at=9))
    moving = FailoverDrafter(first, lambda note: tiny.open())
    assert engine(moving).generate(PROMPT, 40, raw=True).token_ids == plain
    assert moving.device == "CPU (int8)" and "moves from CUDA" in caplog.text
