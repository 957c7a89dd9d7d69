"""A drafter that holds several texts drafts each as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is the torch drafter")

from tests.runtime.drafter.onnx.tiny import LIMITS, SEQ, Tiny, assert_same_tree, path_to

from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import Ask
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.tree.growth import Candidates
from dovetail.runtime.tree.limits import TreeLimits


def test_a_second_sequence_is_refused_until_the_first_is_let_go(tiny: Tiny, stream) -> None:
    tokens, features = stream
    session, fresh = tiny.open(), tiny.open()
    session.extend(SEQ, tokens[:5], features[:5])
    before = session.propose(SEQ, LIMITS)
    with pytest.raises(InputError, match="room for 1 sequence and holds number 1: rewind one to 0 first") as told:
        session.extend(2, tokens[:3], features[:3])
    assert "number 2 without a drafter" in str(told.value)
    with pytest.raises(InputError, match="nothing to draft from"):
        session.propose(2, LIMITS)
    assert (session.length(SEQ), session.length(2)) == (5, 0)
    session.rewind(2, 0)  # it holds nothing of that one
    assert_same_tree(session.propose(SEQ, LIMITS), before, atol=0)
    session.rewind(SEQ, 0)
    for one in (session, fresh):
        one.extend(2, tokens[9:40], features[9:40])
    assert (session.length(SEQ), session.length(2)) == (0, 31)
    assert_same_tree(session.propose(2, LIMITS), fresh.propose(2, LIMITS))


@pytest.mark.parametrize("texts", [2, 4])
def test_texts_that_share_calls_are_drafted_as_alone(tiny: Tiny, stream, texts: int) -> None:
    """Long and short parts, texts that are rewound, leave and begin again, and start over in a full context."""
    tokens, features = stream
    rng, shared = np.random.default_rng(texts), tiny.open(texts=texts)
    alone, held = dict[int, OnnxDrafter](), dict[int, int]()
    limits = TreeLimits(width=7, depth=2, top_k=2)  # within each text's share of the slots
    for turn in range(40):
        for seq in range(1, texts + 1):
            if held.get(seq) and rng.random() < 0.2:
                keep = int(rng.integers(0, held[seq]))
                shared.rewind(seq, keep)
                alone[seq].rewind(seq, keep)
                held[seq] = keep
        asked = [seq for seq in range(1, texts + 1) if rng.random() < 0.8 or turn == 0]
        pairs = {}
        for seq in asked:
            count = int(rng.choice([1, 2, 5, 16, 150]))
            if held.get(seq, 0) + count > shared.capacity:
                continue
            begin = int(rng.integers(0, 400 - count))
            pairs[seq] = tokens[begin : begin + count], features[begin : begin + count]
            alone.setdefault(seq, tiny.open()).extend(seq, *pairs[seq])
            held[seq] = held.get(seq, 0) + count
        shared.extend_all(pairs)
        if not pairs:
            continue
        trees = shared.propose_all({seq: Ask(limits, None) for seq in pairs})
        assert {*trees} == {*pairs}
        for seq, tree in trees.items():
            assert shared.length(seq) == held[seq]
            assert_same_tree(tree, alone[seq].propose(seq, limits))
            assert_same_tree(shared.propose(seq, limits), tree)


def test_long_prompts_of_many_texts_are_read_in_full_calls(tiny: Tiny, stream, monkeypatch) -> None:
    tokens, features = stream
    shared, rows = tiny.open(texts=4), list[int]()
    run = shared._runner.run

    def counted(n: int, *rest: Any, **more: Any) -> Candidates:
        rows.append(n)
        return run(n, *rest, **more)

    monkeypatch.setattr(shared._runner, "run", counted)
    shared.extend_all({seq: (tokens[:100], features[:100]) for seq in range(1, 5)})
    assert rows == [128, 128, 128, 16]
    with pytest.raises(InputError, match="leave the vocabulary"):  # before any text is read
        shared.extend_all({1: (tokens[:3], features[:3]), 2: (tokens[:3] - 10**6, features[:3])})
    assert [shared.length(seq) for seq in range(1, 5)] == [100] * 4
    shared.rewind(1, 0)
    shared.rewind(2, 0)
    with pytest.raises(InputError, match="leave the vocabulary"):
        shared.extend_all({5: (tokens[:3], features[:3]), 6: (tokens[:3] - 10**6, features[:3])})
    shared.extend_all({7: (tokens[:3], features[:3]), 8: (tokens[:3], features[:3])})  # both places are still free


def test_trees_of_many_texts_share_the_slots(tiny: Tiny, stream) -> None:
    """More nodes are wanted than there are slots: trees are smaller, and their probabilities those of alone."""
    tokens, features = stream
    shared, alone = tiny.open(texts=4), tiny.open()
    limits = TreeLimits(width=16, depth=6, top_k=4)
    shared.extend_all({seq: (tokens[seq : seq + 9], features[seq : seq + 9]) for seq in range(1, 5)})
    trees = shared.propose_all({seq: Ask(limits, None) for seq in range(1, 5)})
    for seq, tree in trees.items():
        alone.rewind(SEQ, 0)
        alone.extend(SEQ, tokens[seq : seq + 9], features[seq : seq + 9])
        full = alone.propose(SEQ, limits)
        known = {tuple(path_to(full, node)): full.logprobs[node] for node in range(len(full))}
        same = [node for node in range(len(tree)) if tuple(path_to(tree, node)) in known]
        assert len(same) > 4
        for node in same:
            assert tree.logprobs[node] == pytest.approx(known[tuple(path_to(tree, node))], abs=1e-4)


def test_an_older_graph_holds_one_text(tiny: Tiny, stream) -> None:
    tokens, features = stream
    with pytest.raises(DeviceError, match="holds one text at a time, not 2: export the drafter again"):
        tiny.open("older.onnx", texts=2)
    with pytest.raises(DeviceError, match="16 tree slots"):
        tiny.open(texts=16)
    old, new = tiny.open("older.onnx"), tiny.open()
    for one in (old, new):
        one.extend(SEQ, tokens[:30], features[:30])
    assert_same_tree(old.propose(SEQ, LIMITS), new.propose(SEQ, LIMITS))
