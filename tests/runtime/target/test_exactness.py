"""The text is the target's own, to the bit: with any tree, after any other pass, interrupt, or beside other texts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.devices import ort
from dovetail.runtime.drafter import failover, graph_io, onnx, window
from dovetail.runtime.drafter.runners import cpu
from dovetail.runtime.errors import InputError
from dovetail.runtime.loop import generate, rescore, sequence
from dovetail.runtime.loop.batch import SequenceBatch, Ticket
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target import blocks, openvino, paged
from dovetail.runtime.target.blocks import BlockPool
from dovetail.runtime.target.exactness import largest_difference
from dovetail.runtime.target.layers import session, texts
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK, Batch
from dovetail.runtime.tree.draft_tree import DraftTree

TEXT = np.random.default_rng(5).integers(0, 200, 240)


def grown(seed: int, nodes: int) -> DraftTree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(int(rng.integers(max(0, node - 4), node)) for node in range(1, nodes))])
    return DraftTree(rng.integers(0, 200, nodes), parents, np.zeros(nodes, np.float32))


@pytest.fixture(
    params=[(0, "f16"), (0, "u8"), (1, "f16"), (1, "u8")],
    ids=["whole", "8-bit-kv", "first-layer-elsewhere", "first-layer-elsewhere, 8-bit-kv"],
)
def target(tiny_pair: Path, request: pytest.FixtureRequest) -> OpenVINOTarget:
    layers, kv = request.param
    take = TakeLayers(1, OrtDevice.cpu(), 256) if layers else None
    return OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), take=take, ov_config={"KV_CACHE_PRECISION": kv})


@pytest.mark.parametrize("context", [8, 31, 32, 33, 95, 200])
def test_a_tree_has_the_bits_of_chains(target: OpenVINOTarget, context: int) -> None:
    assert largest_difference(target, context) == 0


def test_a_lone_row_differs_where_exactness_is_off(target: OpenVINOTarget) -> None:
    target.exact = False
    assert largest_difference(target) > 0


def mix_up(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Have every pass go wrong in this way."""
    of = Batch.of

    def mixed(*arguments: Any) -> Batch:
        batch = of(*arguments)
        last = np.flatnonzero(batch.past)[-1] if batch.past.any() else 0  # after it come surplus sequences
        if wrong == "paths" and len(batch.tokens) == len(batch.wanted) > 2:
            assert batch.path_rows is not None
            batch.path_rows[last] = batch.path_rows[last - 1]
        if wrong == "outputs":
            assert batch.node_rows is not None
            batch.node_rows[-1] = batch.node_rows[0]
        if wrong == "past" and len(batch.tokens) == len(batch.wanted) > 2:
            batch.past[last] -= 1
        return batch

    monkeypatch.setattr(Batch, "of", mixed)


@pytest.mark.parametrize("wrong", ["paths", "outputs", "past"])
def test_a_pass_that_mixes_paths_up_is_found(target: OpenVINOTarget, monkeypatch, wrong: str) -> None:
    mix_up(monkeypatch, wrong)
    assert largest_difference(target) > 0


@pytest.mark.parametrize("wrong", [None, "outputs"])
def test_rows_that_differ_here_are_told_whenever_a_pair_is_opened(
    tiny_full_pair: Path, tmp_path: Path, monkeypatch, caplog, wrong: str | None
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr("dovetail.runtime.tune.measure.QUICK_SECONDS", 0.01)
    if wrong:
        mix_up(monkeypatch, wrong)
    for opened in (1, 2):  # the second time with costs from the cache
        Engine.from_pretrained(tiny_full_pair, drafter_device="cpu").close()
        told = [record.getMessage() for record in caplog.records if "rows differ" in record.getMessage()]
        assert len(told) == (opened if wrong else 0)


def test_a_sequence_that_is_not_open_is_refused(target: OpenVINOTarget) -> None:
    seq = target.open()
    target.close(seq)
    with pytest.raises(InputError, match=f"sequence {seq} is not open"):
        target.verify({seq: grown(1, 3)})


STAR = DraftTree(np.arange(40), np.array([-1, *[0] * 39]), np.zeros(40, np.float32))  # more rows than twice its nodes


@pytest.mark.parametrize("context", [20, 31, 64])
@pytest.mark.parametrize("tree", [grown(1, 24), STAR], ids=["grown", "star"])
def test_every_path_can_be_committed(target: OpenVINOTarget, context: int, tree: DraftTree) -> None:
    seq = target.open()
    for path in tree.paths():
        for kept in (path, path[: len(path) // 2 + 1]):
            target.rewind(seq, 0)
            target.prefill(seq, TEXT[:context])
            target.verify({seq: tree})
            target.commit(seq, kept)
            assert target.length(seq) == context + len(kept)
            after = np.array(target.verify({seq: grown(2, 6)})[seq].logits)
            target.rewind(seq, context)
            for token in tree.tokens[kept].tolist():
                target.verify({seq: DraftTree.root(token)})
                target.commit(seq, np.array([0]))
            assert (target.verify({seq: grown(2, 6)})[seq].logits == after).all()


def test_texts_that_share_a_pass_have_the_bits_that_they_have_alone(target: OpenVINOTarget) -> None:
    """Trees beside trees, and beside prompts that are read in the same pass."""
    texts = [target.open() for _ in range(8)]
    trees = {seq: grown(seed, 1 + seed) for seed, seq in enumerate(texts)}
    alone = {}
    for seed, seq in enumerate(texts):
        target.prefill(seq, TEXT[10 * seed : 10 * seed + 30 + 7 * seed])
        alone[seq] = [np.array(part) for part in vars(target.verify({seq: trees[seq]})[seq]).values()]
    late, prompt = target.open(), TEXT[100:140]
    alone[late] = [np.array(part) for part in vars(target.prefill(late, prompt)).values()]
    for prompts in ({}, {late: prompt}):
        target.rewind(late, 0)
        together = target.verify(trees, prompts)
        assert list(together) == [*prompts, *texts]
        for seq, result in together.items():
            for part, found in zip(alone[seq], vars(result).values(), strict=True):
                assert (part == found).all()
    assert target.length(late) == 40
    owned = int(np.count_nonzero(target.model.pool.owners))
    for seq in texts:
        target.commit(seq, np.array([0]))
    for seq in texts[1:]:
        target.close(seq)
    assert np.count_nonzero(target.model.pool.owners) < owned


def test_blocks_are_taken_once_and_given_back() -> None:
    pool = BlockPool()
    pool.grow(6)
    one, two = pool.new_owner(), pool.new_owner()
    taken = [pool.take(owner, count).tolist() for owner, count in ((one, 2), (two, 3), (one, 1))]
    assert taken == [[0, 1], [2, 3, 4], [5]]
    pool.keep(one, np.array([5], np.int32))
    pool.grow(8)
    assert pool.take(two, 4).tolist() == [0, 1, 6, 7]


def test_an_interrupted_growth_of_the_memory_is_made_up_for(target: OpenVINOTarget) -> None:
    seq = target.open()

    def logits() -> np.ndarray:
        return np.array(target.verify({seq: grown(1, 8)})[seq].logits)

    target.prefill(seq, TEXT[:40])
    wanted = logits()
    for line in itertools.count(1):
        try:
            with interrupt_at(line):
                target.model.reserve(target.model.blocks + 1)
            break
        except KeyboardInterrupt:
            target.rewind(seq, 40)
            assert (logits() == wanted).all(), line
            target.model.reserve(target.model.blocks + 1)
            assert (logits() == wanted).all(), line
    assert line > 10


def test_memory_comes_with_the_text_not_with_the_context(target: OpenVINOTarget) -> None:
    blocks_of_text = -(-len(TEXT) // BLOCK)
    unused = np.count_nonzero(target.model.pool.owners)
    target.prefill(target.open(), TEXT)
    assert np.count_nonzero(target.model.pool.owners) - unused == blocks_of_text < target.model.blocks


# --- whole answers

PROMPTS = ("the cat", "a b a b a b", "Thaaaat")
TREES = {"scheduled": None, "wide": TreeLimits(24, 4, 4), "chain": TreeLimits(6, 5, 1), "root": TreeLimits(1, 0, 1, 0)}


@pytest.fixture(scope="module", params=[0, 1], ids=["whole", "first-layer-elsewhere"])
def engine(
    tiny_full_pair: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("dovetail.runtime.load.layer_device", lambda _: OrtDevice.cpu())
        with Engine.from_pretrained(tiny_full_pair, gpu_layers=request.param) as engine:
            assert engine.drafter_device == "CPU (int8)"
            yield engine


SAMPLED = {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "seed": 8}


@pytest.mark.parametrize("sampling", [{}, *SAMPLED])
def test_drafts_change_no_token(engine: Engine, sampling: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        engine.reset()
        plain = engine.generate(prompt, 48, raw=True, speculate=False, **sampling)
        for tree in TREES.values():
            for forget in (True, False):
                if forget:
                    engine.reset()
                assert engine.generate(prompt, 48, raw=True, tree=tree, **sampling).token_ids == plain.token_ids


def test_a_second_turn_has_the_text_of_a_fresh_engine(target: OpenVINOTarget) -> None:
    """The KV of an answer has other bits than that of the same tokens in a prompt, and is not kept for one."""
    talk = Sequence(target, None)

    def answer(prompt: tuple[int, ...], meter: Meter) -> tuple[int, ...]:
        return tuple(token for step in generate.decode(talk, Request(prompt, 40), meter) for token in step.tokens)

    second = (5, 6, 7, *answer((5, 6, 7), Meter()), 8, 9)
    kept = [answer(second, Meter())]
    third = (*second, *kept[0], 10)
    kept.append(answer(third, meter := Meter()))
    assert meter.cached_tokens == len(second)
    for prompt, told in zip((second, third), kept, strict=True):
        talk.forget()
        assert answer(prompt, Meter()) == told


@pytest.mark.parametrize("after", [1, 2, 40, 90])
def test_answers_that_lost_their_memory_go_on_with_the_bits_that_they_had(target: OpenVINOTarget, after: int) -> None:
    """The prompt is read as a prompt again, the answer as chains: 90 tokens take two passes."""

    def features(dropped: bool) -> np.ndarray:
        """Of each text's last token."""
        batch, found = SequenceBatch(target, 3), dict[Ticket, np.ndarray]()
        tickets = [batch.add(Request(tuple(TEXT[: 20 + 30 * index].tolist()), 130)) for index in range(3)]
        passes = 0
        while batch.running or batch.waiting:
            for advance in batch.step():
                found[advance.ticket] = advance.features[-1]
            passes += 1
            if dropped and passes == after + 1:
                for ticket in [ticket for ticket in batch.running if ticket is not tickets[0]]:
                    assert ticket.sequence and len(ticket.sequence.tokens) > len(ticket.request.prompt)
                    batch.running.remove(ticket)
                    ticket.sequence.drop()
                    batch.waiting.append(ticket)
        return np.array([found[ticket] for ticket in tickets])

    np.testing.assert_array_equal(features(dropped=True), features(dropped=False))


MODULES = (
    blocks, cpu, failover, generate, graph_io, onnx, openvino, ort, paged, rescore, sequence, session, texts, window,
)  # fmt: skip
FILES = {str(module.__file__) for module in MODULES}


@contextmanager
def interrupt_at(line: int) -> Iterator[None]:
    """Ctrl-C at the n-th line that runs in FILES."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def test_an_interrupt_anywhere_leaves_the_text_of_a_fresh_engine(engine: Engine) -> None:
    tree = TreeLimits(12, 3, 3)

    def answer(prompt: str) -> tuple[int, ...]:
        return engine.generate(prompt, 4, raw=True, tree=tree).token_ids

    engine.reset()
    wanted, expected = answer("the cat ran"), answer("the cat sat")
    for line in itertools.count(1, 7):
        answer("the cat")
        try:
            with interrupt_at(line):
                answer("the cat sat")
            break  # it has fewer lines
        except KeyboardInterrupt:
            assert answer("the cat ran") == wanted, line
            assert answer("the cat sat") == expected, line
    assert line > 500
