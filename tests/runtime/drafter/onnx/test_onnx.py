"""OnnxDrafter is the drafter of training, run incrementally: chunks, trees, rollback and growth change nothing.

A tiny random drafter is exported once; in float32 it must equal torch, in INT8 it must stay close.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is the torch drafter")

import onnx
import torch
from tests.runtime.drafter.onnx.tiny import (
    CONFIG,
    LIMITS,
    MAX_CONTEXT,
    SEQ,
    TOP_K,
    TREE_SLOTS,
    Tiny,
    assert_same_tree,
    path_to,
)

from dovetail.models.drafter import Drafter
from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.runners.cpu import PREFIX_STEP, CpuRunner
from dovetail.runtime.drafter.session import Drafter as DrafterSeam
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.tree.limits import TreeLimits


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_after_a_nan_the_drafter_is_as_new(tiny: Tiny, stream: tuple[np.ndarray, np.ndarray], rows: int) -> None:
    """A masked NaN in the KV would still reach every row: 0 x NaN is NaN."""
    (tokens, features), drafter, limits = stream, tiny.open(), TreeLimits(width=12, depth=3, top_k=TOP_K, lookup=0)
    spoiled = features[:rows].copy()
    spoiled[-1] = np.nan
    with pytest.raises(DeviceError, match="no numbers"):
        drafter.extend(SEQ, tokens[:rows], spoiled)
    assert drafter.length(SEQ) == 0
    found = []
    for session in (drafter, tiny.open()):
        session.extend(SEQ, tokens[:1], features[:1])
        tree = session.propose(SEQ, limits)
        found.append((tree.tokens.tolist(), tree.logprobs.tolist()))
    assert found[0] == found[1]


@torch.no_grad()
def chain_logprob(
    drafter: Drafter, tokens: np.ndarray, features: np.ndarray, path: list[int], noise: np.ndarray | None = None
) -> float:
    """Cumulative log-probability of `path` after the pairs, by the unrolled steps of training.

    noise: [depth, draft vocabulary], added to the logits of each step.
    """
    length, total = len(tokens), 0.0
    ids = torch.tensor([*tokens.tolist(), *path])[None]
    x = torch.zeros(1, len(ids[0]), CONFIG.feature_size)
    x[0, :length] = torch.from_numpy(features)
    caches: list = [[] for _ in drafter.layers]
    draft_id = {target: i for i, target in enumerate(drafter.d2t.tolist())}
    for step, token in enumerate(path):
        x = drafter.step(x if step == 0 else x.roll(1, dims=1), ids, caches)
        logits = drafter.logits(x[0, length - 1 + step])
        logprobs = torch.log_softmax(logits if noise is None else logits + torch.from_numpy(noise[step]), dim=-1)
        total += float(logprobs[draft_id[token]])
    return total


def test_is_a_draft_session(tiny: Tiny) -> None:
    session = tiny.open()
    assert isinstance(session, DrafterSeam)
    assert (session.device, session.length(SEQ)) == ("CPU (int8)", 0)


@pytest.mark.parametrize("length", [1, 7, CHUNK + 1, PREFIX_STEP + 44])
def test_every_node_has_the_log_probability_of_its_path_run_as_a_chain(tiny: Tiny, stream, length: int) -> None:
    tokens, features = stream[0][:length], stream[1][:length]
    session = tiny.open()
    session.extend(SEQ, tokens, features)
    tree = session.propose(SEQ, LIMITS)
    assert len(tree) == LIMITS.width and int(tree.depths().max()) >= 2
    for node in range(1, len(tree)):
        expected = chain_logprob(tiny.drafter, tokens, features, path_to(tree, node))
        assert tree.logprobs[node] == pytest.approx(expected, abs=1e-3)


def test_noise_is_added_to_the_logits_of_its_depth(tiny: Tiny, stream) -> None:
    """Chunks, levels and calls without noise in between: each has its own, and leaves none."""
    tokens, features = stream[0][:150], stream[1][:150]
    session, fresh = tiny.open(), tiny.open()
    rows = np.random.default_rng(3).gumbel(size=(5, CONFIG.vocab_size)).astype(np.float32) * 4
    session.extend(SEQ, tokens[:20], features[:20])
    session.propose(SEQ, LIMITS)
    session.extend(SEQ, tokens[20:], features[20:], lambda depth, ids: rows[depth][ids])
    tree = session.propose(SEQ, LIMITS, None, lambda depth, ids: rows[depth][ids])
    assert int(tree.depths().max()) >= 2
    drafted = rows[1:, tiny.drafter.d2t.numpy()]
    for node in range(1, len(tree)):
        expected = chain_logprob(tiny.drafter, tokens, features, path_to(tree, node), drafted)
        assert tree.logprobs[node] == pytest.approx(expected, abs=1e-3)
    for one in (session, fresh):
        one.rewind(SEQ, 0)
        one.extend(SEQ, tokens, features)
    assert_same_tree(session.propose(SEQ, LIMITS), fresh.propose(SEQ, LIMITS))


def test_an_older_pair_drafts_without_noise(tiny: Tiny, stream) -> None:
    session, older = tiny.open(), tiny.open("silent.onnx")
    session.extend(SEQ, stream[0][:20], stream[1][:20])
    older.extend(SEQ, stream[0][:20], stream[1][:20], lambda depth, ids: np.full(len(ids), np.nan, np.float32))
    assert_same_tree(session.propose(SEQ, LIMITS), older.propose(SEQ, LIMITS))


@pytest.mark.parametrize("said", [None, "", "AAAA", "%%%", "AQAAAA=="])
def test_a_graph_that_does_not_say_its_draft_vocabulary_is_refused(tiny: Tiny, said: str | None) -> None:
    model = onnx.load(tiny.pair / "f32.onnx")
    del model.metadata_props[:]
    if said is not None:
        onnx.helper.set_model_props(model, {"draft_ids": said})
    onnx.save(model, tiny.pair / "mute.onnx")
    with pytest.raises(DeviceError, match="export the drafter again"):
        tiny.open("mute.onnx")


def test_first_level_is_torch_s_best_children(tiny: Tiny, stream) -> None:
    tokens, features = stream[0][:20], stream[1][:20]
    session = tiny.open()
    session.extend(SEQ, tokens, features)
    tree = session.propose(SEQ, TreeLimits(width=TOP_K + 1, depth=1, top_k=TOP_K))
    with torch.no_grad():
        out = tiny.drafter(torch.from_numpy(features)[None], torch.from_numpy(tokens)[None])[0, -1]
        best = tiny.drafter.logits(out).topk(TOP_K).indices
    assert tree.tokens[1:].tolist() == tiny.drafter.d2t[best].tolist()
    assert tree.tokens[0] == tokens[-1]


@pytest.mark.parametrize("cuts", [(1, 2, 3), (5, 130, 131, 256, 257), tuple(range(1, 40))])
def test_chunked_extends_equal_one_extend(tiny: Tiny, stream, cuts: tuple[int, ...]) -> None:
    tokens, features = stream[0][:300], stream[1][:300]
    whole, pieces = tiny.open(), tiny.open()
    whole.extend(SEQ, tokens, features)
    for start, end in zip((0, *cuts), (*cuts, 300), strict=True):
        pieces.extend(SEQ, tokens[start:end], features[start:end])
        pieces.propose(SEQ, LIMITS)  # trees in between leave no trace
    assert pieces.length(SEQ) == whole.length(SEQ) == 300
    assert_same_tree(pieces.propose(SEQ, LIMITS), whole.propose(SEQ, LIMITS))


def test_reset_forgets_what_came_after(tiny: Tiny, stream) -> None:
    tokens, features = stream
    used, fresh = tiny.open(), tiny.open()
    used.extend(SEQ, tokens[:290], features[:290])
    used.propose(SEQ, LIMITS)
    used.rewind(SEQ, 20)
    assert used.length(SEQ) == 20
    with pytest.raises(InputError, match="extend the drafter"):
        used.propose(SEQ, LIMITS)
    fresh.extend(SEQ, tokens[:20], features[:20])
    for session in (used, fresh):
        session.extend(SEQ, tokens[300:303], features[300:303])
    assert_same_tree(used.propose(SEQ, LIMITS), fresh.propose(SEQ, LIMITS))


def test_reset_to_its_own_length_keeps_the_root(tiny: Tiny, stream) -> None:
    session = tiny.open()
    session.extend(SEQ, stream[0][:9], stream[1][:9])
    before = session.propose(SEQ, LIMITS)
    session.rewind(SEQ, 9)
    assert_same_tree(session.propose(SEQ, LIMITS), before, atol=0)


def test_bound_prefix_grows_with_the_context(tiny: Tiny, stream) -> None:
    """One pair at a time over the boundary: nothing is lost when a longer prefix is bound."""
    tokens, features = stream
    session, whole = tiny.open(), tiny.open()
    session.extend(SEQ, tokens[: PREFIX_STEP - 2], features[: PREFIX_STEP - 2])
    runner = session._runner
    assert isinstance(runner, CpuRunner)
    bound = []
    for i in range(PREFIX_STEP - 2, PREFIX_STEP + 3):
        session.extend(SEQ, tokens[i : i + 1], features[i : i + 1])
        bound.append(runner._lanes[1, 1][0] - TREE_SLOTS)
    assert bound == [PREFIX_STEP, PREFIX_STEP, 2 * PREFIX_STEP, 2 * PREFIX_STEP, 2 * PREFIX_STEP]
    whole.extend(SEQ, tokens[: PREFIX_STEP + 3], features[: PREFIX_STEP + 3])
    assert_same_tree(session.propose(SEQ, LIMITS), whole.propose(SEQ, LIMITS))


def test_state_is_updated_in_place(tiny: Tiny, stream) -> None:
    """ONNX Runtime writes the rows of this call into our own arrays, and touches no other row."""
    session = tiny.open()
    runner = session._runner
    assert isinstance(runner, CpuRunner)
    session.extend(SEQ, stream[0][:4], stream[1][:4])
    outputs = runner._lanes[4, 1][1].get_outputs()
    rows = runner.rows(4)
    buffers = [rows.top_logprobs, rows.top_ids, runner._bank, *runner._kv.values()]
    assert sorted(o.data_ptr() for o in outputs) == sorted(b.ctypes.data for b in buffers)
    marks = [buffer.copy() for buffer in runner._kv.values()]
    for mark, buffer in zip(marks, runner._kv.values(), strict=True):
        written = np.flatnonzero(np.abs(buffer).max(axis=(1, 2, 3)))
        assert written.tolist() == [TREE_SLOTS + j for j in range(4)]
        buffer[TREE_SLOTS + 300 :] = mark[TREE_SLOTS + 300 :] = 7.0  # beyond what is bound
    session.extend(SEQ, stream[0][4:5], stream[1][4:5])
    for mark, buffer in zip(marks, runner._kv.values(), strict=True):
        changed = np.flatnonzero(np.abs(buffer - mark).max(axis=(1, 2, 3)))
        assert changed.tolist() == [TREE_SLOTS + 4]


def test_a_prompt_gives_the_children_of_its_last_token_alone(tiny: Tiny, stream) -> None:
    """A graph of an older pair, which answers for every row, gives the same trees; levels have children everywhere."""
    session, older = tiny.open(), tiny.open("older.onnx")
    for begin, end in ((0, 50), (50, 53), (53, 54)):
        for one in (session, older):
            one.extend(SEQ, stream[0][begin:end], stream[1][begin:end])
        assert_same_tree(session.propose(SEQ, LIMITS), older.propose(SEQ, LIMITS))
    runner, older_runner = session._runner, older._runner
    assert isinstance(runner, CpuRunner) and isinstance(older_runner, CpuRunner)
    lanes, before = runner._lanes.keys(), older_runner._lanes.keys()
    assert lanes >= {(50, 1), (3, 1), (1, 1)} and before >= {(50, 50), (3, 3), (1, 1)}
    assert any(rows == answers > 1 for rows, answers in lanes)


def test_proposals_stay_in_the_draft_vocabulary(tiny: Tiny, stream) -> None:
    session = tiny.open("int8.onnx")
    session.extend(SEQ, stream[0][:50], stream[1][:50])
    tree = session.propose(SEQ, LIMITS)
    assert set(tree.tokens[1:].tolist()) <= set(tiny.drafter.d2t.tolist())


def test_int8_stays_close_to_float(tiny: Tiny, stream) -> None:
    tokens, features = stream[0][:30], stream[1][:30]
    session = tiny.open("int8.onnx")
    session.extend(SEQ, tokens, features)
    tree = session.propose(SEQ, LIMITS)
    for node in range(1, len(tree)):
        expected = chain_logprob(tiny.drafter, tokens, features, path_to(tree, node))
        assert tree.logprobs[node] == pytest.approx(expected, abs=0.15 * len(path_to(tree, node)) + 0.15)


def test_bad_input_is_refused_and_changes_nothing(tiny: Tiny, stream) -> None:
    tokens, features = stream
    session = tiny.open()
    session.extend(SEQ, tokens[:5], features[:5])
    before = session.propose(SEQ, LIMITS)
    with pytest.raises(InputError, match="features"):
        session.extend(SEQ, tokens[:3], features[:2])
    with pytest.raises(InputError, match="vocabulary"):
        session.extend(SEQ, np.array([CONFIG.vocab_size]), features[:1])
    with pytest.raises(ContextOverflow, match=str(MAX_CONTEXT)):
        session.extend(SEQ, np.zeros(MAX_CONTEXT, np.int64), np.zeros((MAX_CONTEXT, 32), np.float32))
    with pytest.raises(InputError, match="top_k 6"):
        session.propose(SEQ, TreeLimits(top_k=TOP_K + 1))
    with pytest.raises(InputError, match="keep 6"):
        session.rewind(SEQ, 6)
    assert session.length(SEQ) == 5
    assert_same_tree(session.propose(SEQ, LIMITS), before, atol=0)
