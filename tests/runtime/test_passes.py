"""Passes of a real target: what OpenVINO is asked for, with what properties, and that no pass sees another's inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.decode import Conversation, Request, decode
from dovetail.runtime.manifest import read_manifest
from dovetail.runtime.metrics import Meter
from dovetail.runtime.openvino_target import OpenVINOTarget
from dovetail.runtime.paged import FLOAT32, PROPERTIES, Batch, default_properties
from dovetail.runtime.tree import DraftTree, TreeLimits

PROMPT = np.arange(5, 25)


@pytest.fixture
def target(tiny_pair: Path) -> OpenVINOTarget:
    return OpenVINOTarget.open(tiny_pair, read_manifest(tiny_pair), threads=1)


def chain(*tokens: int) -> DraftTree:
    nodes = np.arange(len(tokens))
    return DraftTree(np.array(tokens), nodes - 1, np.zeros(len(tokens), np.float32))


def fork(*tokens: int) -> DraftTree:
    """All below the root."""
    return replace(chain(*tokens), parents=np.array([-1, *[0] * (len(tokens) - 1)]))


@pytest.fixture
def rows(target: OpenVINOTarget, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every pass, as they come."""
    found: list[int] = []
    run = target.model.run

    def spy(batch: Batch):
        found.append(len(batch.tokens))
        return run(batch)

    monkeypatch.setattr(target.model, "run", spy)
    return found


def test_plain_decoding_runs_one_row_and_a_prompt_never_does(target: OpenVINOTarget, rows: list[int]) -> None:
    talk = Conversation(target, None)
    for prompt in (PROMPT.tolist(), [7]):
        rows.clear()
        list(decode(talk, Request(tuple(prompt), 5), Meter()))
        assert rows == [max(len(prompt), 2), 1, 1, 1, 1]


def test_with_limits_every_pass_has_two_rows_and_the_bits_of_a_chain(target: OpenVINOTarget, rows: list[int]) -> None:
    limits = TreeLimits(width=1, depth=0, top_k=1, lookup=0)
    steps = list(decode(Conversation(target, None), Request(tuple(PROMPT.tolist()), 8, limits=limits), Meter()))
    text = [token for step in steps for token in step.tokens]
    assert len(text) == 8 and set(rows[1:]) == {2}
    target.reset(0)
    target.prefill(PROMPT)
    alone = target.verify(chain(text[0], 3))
    logits, features = np.array(alone.logits[0]), np.array(alone.features[0])
    target.reset(len(PROMPT))
    together = target.verify(chain(*text))
    assert (together.logits[0] == logits).all() and (together.features[0] == features).all()


def test_no_pass_sees_what_one_of_the_same_shape_was_given(target: OpenVINOTarget, tiny_pair: Path) -> None:
    trees = [chain(1, 2, 3), fork(1, 2, 3), chain(4, 2, 9), fork(8, 7, 6), chain(1, 2, 3)]

    def verify(one: OpenVINOTarget, tree: DraftTree) -> tuple[np.ndarray, np.ndarray]:
        one.reset(len(PROMPT))
        result = one.verify(tree)
        return np.array(result.logits), np.array(result.features)

    target.prefill(PROMPT)
    for tree, (logits, features) in zip(trees, [verify(target, tree) for tree in trees], strict=True):
        alone = OpenVINOTarget.open(tiny_pair, read_manifest(tiny_pair), threads=1)
        alone.prefill(PROMPT)
        expected, taps = verify(alone, tree)
        assert (logits == expected).all() and (features == taps).all()


@pytest.mark.parametrize(
    ("instruction_sets", "float32"),
    [(("avx2", "avx512_bf16"), True), (("avx2", "avx512_bf16", "amx_bf16"), False), (("asimddp",), False), ((), False)],
)
def test_float32_where_nothing_computes_another_precision_faster(instruction_sets, float32) -> None:
    assert default_properties(instruction_sets) == {**PROPERTIES, **(FLOAT32 if float32 else {})}
