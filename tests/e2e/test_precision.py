"""The shipped drafter's float16 graph against float32 torch: the same children, the same acceptance length.

The float16 graph is the file that CUDA runs, here by ONNX Runtime's CPU provider on a host device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is the torch drafter")

from dovetail.exporter.drafter.export import load_drafter, save
from dovetail.exporter.drafter.graph import to_onnx
from dovetail.exporter.pairs.reference import REFERENCE_PAIRS, shipped_drafter
from dovetail.models.drafter import DraftModel
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cuda, open_drafter
from dovetail.runtime.drafter.session import DeviceReport
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.pair.known import DEFAULT_PAIR
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system.arrays import TokenArray
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text

pytestmark = pytest.mark.real

PROMPT = 'Complete the following Python function.\n\ndef mean(xs):\n    """Return the arithmetic mean of a list."""\n'
LIMITS = TreeLimits(width=16, depth=6, top_k=4, lookup=0)
TOKENS = 160


class Recorder:
    """A drafter that drafts nothing and keeps the pairs it is told."""

    device, capacity, top_k, report = "none", 1 << 20, 10, DeviceReport()

    def __init__(self) -> None:
        self.tokens: list[TokenArray] = []
        self.features: list[np.ndarray] = []

    def length(self, seq: int) -> int:
        return sum(map(len, self.tokens))

    def extend(self, seq: int, tokens: TokenArray, features: np.ndarray, noise: Any = None) -> None:
        self.tokens.append(tokens.copy())
        self.features.append(features.copy())

    def propose(self, seq: int, limits: TreeLimits, judge: Any = None, noise: Any = None) -> DraftTree:
        return DraftTree.root(int(self.tokens[-1][-1]))

    def rewind(self, seq: int, keep: int) -> None: ...

    def close(self) -> None: ...


def test_float16_keeps_children_and_acceptance_length(
    pair: Path, HostDevice: Callable[[], Any], tmp_path: Path
) -> None:
    manifest = read_manifest(pair)
    assert manifest.drafter is not None
    tokens, features = text_of(pair)
    half = open_cuda(pair, manifest, new_device=HostDevice)
    whole = in_float32(pair, tmp_path)
    first = agreeing = total = 0
    gained = {"half": 0, "whole": 0}
    rounds = range(len(tokens) - TOKENS, len(tokens) - LIMITS.depth, 2)  # float16 is slow on a CPU
    for session in (half, whole):
        session.extend(SEQ, tokens[: rounds[0]], features[: rounds[0]])
    for at in rounds:
        trees = {"half": half.propose(SEQ, LIMITS), "whole": whole.propose(SEQ, LIMITS)}
        for name, tree in trees.items():
            gained[name] += 1 + accepted(tree, tokens[at:])
        ours, theirs = (tree.tokens[tree.parents == 0].tolist() for tree in trees.values())
        first += ours[0] == theirs[0]
        agreeing, total = agreeing + len({*ours} & {*theirs}), total + len(theirs)
        for session in (half, whole):
            session.extend(SEQ, tokens[at : at + 2], features[at : at + 2])
    assert first / len(rounds) > 0.99 and agreeing / total > 0.99, (first, len(rounds), agreeing, total)
    assert gained["half"] == pytest.approx(gained["whole"], rel=0.01)
    before = half.report.bus_bytes
    half.extend(SEQ, tokens[rounds[0] : rounds[0] + 9], features[rounds[0] : rounds[0] + 9])
    half.propose(SEQ, LIMITS)
    assert 0 < half.report.bus_bytes - before < 64 * 1024  # of a round: nine accepted pairs, a tree of six levels
    assert gained["whole"] > 1.5 * len(rounds), "the shipped drafter does not fit this target"


def text_of(pair: Path) -> tuple[TokenArray, np.ndarray]:
    """Pairs (token, feature before it) of a prompt and its answer, as plain decoding finds them."""
    manifest, recorder = read_manifest(pair), Recorder()
    target = OpenVINOTarget.load(pair, manifest)
    prompt = Tokenizer.from_folder(pair / "target").encode_chat([{"role": "user", "content": PROMPT}])
    limits = TreeLimits(width=2, depth=1, top_k=1, lookup=0)  # so that the drafter is told
    for _ in decode(Sequence(target, recorder), Request(tuple(prompt), TOKENS, limits=limits), Meter()):
        pass
    return np.concatenate(recorder.tokens), np.concatenate(recorder.features)


def in_float32(pair: Path, folder: Path) -> OnnxDrafter:
    """The same drafter as float32, which the export's tests hold to torch."""
    manifest = read_manifest(pair)
    assert manifest.drafter is not None
    facts = replace(manifest.drafter, files={**manifest.drafter.files, "cpu": "f32.onnx"})
    drafter = load_drafter(shipped_drafter(REFERENCE_PAIRS[DEFAULT_PAIR]), pair / "target")
    assert isinstance(drafter, DraftModel)
    save(to_onnx(drafter, torch.float32, tree_slots=facts.tree_slots, top_k=facts.top_k), folder / "f32.onnx")
    return open_drafter(folder, replace(manifest, drafter=facts), device="cpu")


def accepted(tree: DraftTree, text: TokenArray) -> int:
    """Nodes of the path that `text` takes through the tree."""
    node = count = 0
    for token in text.tolist():
        children = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
        if not len(children):
            break
        node, count = int(children[0]), count + 1
    return count
