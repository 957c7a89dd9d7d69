"""OnnxDrafter is the drafter of training, run incrementally: chunks, trees, rollback and growth change nothing.

A tiny random drafter is exported once; in float32 it must equal torch, in INT8 it must stay close.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is the torch drafter")

import onnx
import onnx_ir as ir
import torch

from dovetail.exporter.drafter.graph import to_onnx
from dovetail.exporter.drafter.int8 import quantize
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners.cpu import PREFIX_STEP, CpuRunner
from dovetail.runtime.drafter.session import Ask
from dovetail.runtime.drafter.session import Drafter as DrafterSeam
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError, PairError
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, TargetFacts
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text

TREE_SLOTS, TOP_K, MAX_CONTEXT = 16, 5, 600
CONFIG = DrafterConfig(
    vocab_size=90, draft_vocab_size=40, hidden_size=32, feature_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=MAX_CONTEXT, blocks=2,
)  # fmt: skip
LIMITS = TreeLimits(width=12, depth=4, top_k=3)


@dataclass
class Tiny:
    """The torch drafter, and a pair folder whose "cpu" file is float32 (exact) or INT8."""

    drafter: Drafter
    pair: Path

    def manifest(self, file: str, **facts: Any) -> Manifest:
        c = CONFIG
        drafter = DrafterFacts(
            c.blocks, c.hidden_size, c.feature_size, c.vocab_size, c.draft_vocab_size, c.num_key_value_heads,
            c.head_dim, TOP_K, TREE_SLOTS, MAX_CONTEXT, "t", {"cpu": file, "cuda": "absent.onnx"},
        )  # fmt: skip
        target = TargetFacts("llama", 32, 32, c.vocab_size, 2, MAX_CONTEXT, "int8", ("tap",), (1,), "t")
        return Manifest("tiny", target, replace(drafter, **facts), {})

    def open(self, file: str = "f32.onnx", texts: int = 1) -> OnnxDrafter:
        return open_drafter(self.pair, self.manifest(file), device="cpu", threads=1, texts=texts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    torch.manual_seed(0)
    embed = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size)
    d2t = torch.randperm(CONFIG.vocab_size)[: CONFIG.draft_vocab_size]
    drafter = Drafter(CONFIG, embed, torch.randn(CONFIG.draft_vocab_size, CONFIG.feature_size), d2t).eval()
    folder = tmp_path_factory.mktemp("pair")
    model = to_onnx(drafter, torch.float32, tree_slots=TREE_SLOTS, top_k=TOP_K)
    ir.save(model, folder / "f32.onnx")
    onnx.save(without_noise(onnx.load(folder / "f32.onnx")), folder / "silent.onnx")
    onnx.save(answering_every_row(without_noise(onnx.load(folder / "f32.onnx"))), folder / "older.onnx")
    quantize(model)
    ir.save(model, folder / "int8.onnx")
    return Tiny(drafter, folder)


def without_noise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its input `noise`: zeros in its place, and no word of the draft vocabulary."""
    zeros = np.zeros((1, CONFIG.draft_vocab_size), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, "noise"))
    model.graph.input.remove(next(given for given in model.graph.input if given.name == "noise"))
    del model.metadata_props[:]
    return model


def answering_every_row(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its inputs `queries` and `context_begin`: 0, 1, 2 .. and 0 in their place."""
    constants = {"first": np.array(0), "step": np.array(1), "axis": np.array([0])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        onnx.helper.make_node("Shape", ["input_ids"], ["shape"]),
        onnx.helper.make_node("Squeeze", ["shape", "axis"], ["end"]),
        onnx.helper.make_node("Range", ["first", "end", "step"], ["queries"]),
        onnx.helper.make_node("Sub", ["context_end", "context_end"], ["context_begin"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    for name in ("queries", "context_begin"):
        model.graph.input.remove(next(given for given in model.graph.input if given.name == name))
    return model


@pytest.fixture
def stream() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, CONFIG.vocab_size, 400), rng.standard_normal((400, 32)).astype(np.float32)


def path_to(tree: DraftTree, node: int) -> list[int]:
    nodes = []
    while node > 0:
        nodes.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return nodes[::-1]


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


def assert_same_tree(a: DraftTree, b: DraftTree, atol: float = 1e-4) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.parents, b.parents)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)


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


def test_unusable_files_and_devices(tiny: Tiny) -> None:
    (tiny.pair / "broken.onnx").write_bytes((tiny.pair / "f32.onnx").read_bytes()[:5000])
    with pytest.raises(DeviceError, match=r"broken\.onnx"):
        tiny.open("broken.onnx")
    with pytest.raises(DeviceError, match=r"missing\.onnx"):
        tiny.open("missing.onnx")
    with pytest.raises(InputError, match="tpu"):
        open_drafter(tiny.pair, tiny.manifest("f32.onnx"), device="tpu")
    with pytest.raises(PairError, match="no drafter"):
        open_drafter(tiny.pair, replace(tiny.manifest("f32.onnx"), drafter=None))


def renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename an input or an output everywhere in the graph."""
    for names in (node.input for node in model.graph.node), (node.output for node in model.graph.node):
        for those in names:
            those[:] = [new if name == old else name for name in those]
    for port in (*model.graph.input, *model.graph.output):
        port.name = new if port.name == old else port.name


def endless(model: onnx.ModelProto) -> None:
    """Put a Loop that never ends before the output `top_ids`."""
    helper, kind = onnx.helper, onnx.TensorProto
    renamed(model, "top_ids", "found_ids")
    model.graph.output[1].name = "top_ids"
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Identity", ["ids"], ["same"])], "body",
        [helper.make_tensor_value_info(name, one, ()) for name, one in (("n", kind.INT64), ("go", kind.BOOL))]
        + [helper.make_tensor_value_info("ids", kind.INT32, None)],
        [helper.make_tensor_value_info("more", kind.BOOL, ()), helper.make_tensor_value_info("same", kind.INT32, None)],
    )  # fmt: skip
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("Loop", ["", "always", "found_ids"], ["top_ids"], body=body))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: renamed(model, "features", "features\u2028"), "has no 'features'"),
        (lambda model: renamed(model, "bank", "vault"), "has no 'bank'"),
        (lambda model: renamed(model, "top_ids", "ids"), "has no 'top_ids'"),
        (lambda model: renamed(model, "kv.1.out", "kv.2.out"), "has no 'kv.1.out'"),
        (lambda model: model.graph.output.pop(), "has no 'kv.1.out'"),
        (lambda model: model.graph.input.append(model.graph.input[0]), "Duplicate|cannot load"),
        (lambda model: renamed(model, "noise", "sound"), "unknown input 'sound'"),
        (endless, "holds a Loop"),
    ],
)
def test_a_graph_of_another_kind_is_refused_when_it_is_opened(tiny: Tiny, spoil, said: str) -> None:
    model = onnx.load(tiny.pair / "f32.onnx")
    spoil(model)
    onnx.save(model, tiny.pair / "spoilt.onnx")
    with pytest.raises(DeviceError, match=said) as caught:
        tiny.open("spoilt.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"blocks": 1}, "unknown input 'kv.1'"),
        ({"blocks": 64}, "no 'kv.10'"),
        ({"num_kv_heads": 4096}, "kv.0"),
        ({"head_size": 16}, "kv.0"),
        ({"feature_size": 2**20}, "features"),
        ({"top_k": 4096}, "top_logprobs"),
        ({"tree_slots": 4096}, "tree_mask"),
        ({"draft_vocab_size": 2**24}, "noise"),
    ],
)
def test_sizes_that_are_not_the_graph_s_are_refused_before_memory_is_taken(tiny: Tiny, facts: dict, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        open_drafter(tiny.pair, tiny.manifest("f32.onnx", **facts), device="cpu", threads=1)


def test_a_context_beyond_memory_is_refused(tiny: Tiny) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 30), before[1]))
    try:
        with pytest.raises(DeviceError, match="context of 134217728 tokens does not fit into memory"):
            open_drafter(tiny.pair, tiny.manifest("f32.onnx", max_context=2**27), device="cpu", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"\xff" * 64])
def test_what_is_no_graph_is_refused(tiny: Tiny, content: bytes) -> None:
    (tiny.pair / "none.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match=r"none\.onnx") as caught:
        tiny.open("none.onnx")
    assert "\n" not in str(caught.value)


def test_a_failure_in_a_run_is_one_typed_line(
    tiny: Tiny, stream, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    session = tiny.open()
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    text = session._texts[SEQ]
    text.length = 10**6  # rows far outside the buffer
    with pytest.raises(DeviceError, match="the drafter failed") as caught:
        session._extend([(text, stream[0][:1], stream[1][:1])])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
