"""Passes of a real target: what OpenVINO is asked for, with what properties, and that no pass sees another's inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.errors import ContextOverflow, DeviceError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target import openvino as openvino_target
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK, Batch
from dovetail.runtime.target.paths import prompt_rows
from dovetail.runtime.target.properties import FLOAT32, PROPERTIES, default_properties
from dovetail.runtime.tree.draft_tree import DraftTree

PROMPT = np.arange(5, 25)


@pytest.fixture
def target(tiny_pair: Path) -> OpenVINOTarget:
    return OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1)


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


def test_no_pass_has_one_row_but_a_plain_one_that_need_not_be_exact(target: OpenVINOTarget, rows: list[int]) -> None:
    for exact, least in ((True, 2), (False, 1)):
        target.exact = exact
        talk = Sequence(target, None)
        for prompt in (PROMPT.tolist(), [7]):
            rows.clear()
            list(decode(talk, Request(tuple(prompt), 5), Meter()))
            assert rows == [prompt_rows(len(prompt)), *[least] * 4]
        talk.forget()


def test_the_attention_of_a_tree_reads_no_more_text_than_that_of_a_chain(target: OpenVINOTarget, monkeypatch) -> None:
    """And has as many rows, so that OpenVINO prepares nothing anew for another tree in a pass of the size."""
    batches, run = list[Batch](), target.model.run

    def spy(batch: Batch):
        batches.append(batch)
        return run(batch)

    monkeypatch.setattr(target.model, "run", spy)
    bushy = replace(chain(*range(12)), parents=np.array([-1, 0, 1, 2, 3, 4, 0, 1, 2, 0, 6, 7]))
    seq = target.open()
    target.prefill(seq, np.arange(200))
    for tree in (chain(*range(12)), bushy, fork(*range(12)), chain(1, 2)):
        target.verify({seq: tree}, rows=12)
    _, alone, *trees = [int(batch.past.sum()) for batch in batches]
    assert {len(batch.past) for batch in batches[1:]} == {24}
    assert max(trees) < alone + 12 * BLOCK


def test_a_pass_without_a_result_is_an_error(target: OpenVINOTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen of OpenVINO with bfloat16 where ONEDNN_MAX_CPU_ISA rules it out: no exception, and logits of no row."""

    class Silent:
        def infer(self, share_outputs: bool) -> None:
            pass

        def set_tensor(self, name: str, tensor: object) -> None:
            pass

        def get_tensor(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(data=np.zeros((0, 1, 9), np.float32))

    seq = target.open()
    monkeypatch.setattr(target.model, "request", Silent())
    with pytest.raises(DeviceError, match="no result: use other properties"):
        target.prefill(seq, PROMPT)


def test_prompts_of_all_lengths_come_in_few_sizes_that_are_little_more() -> None:
    sizes = {count: prompt_rows(count) for count in range(1, 257)}
    assert len(set(sizes.values())) < 25 and 1 not in sizes.values()
    for count, rows in sizes.items():
        assert count <= rows <= max(2, min(2 * count - 1, count + (7 if count <= 64 else 15)))
    assert sizes[256] == 256  # whole chunks are not filled


@pytest.mark.parametrize("count", [1, 3, 9, 20, 70, 200])
def test_what_fills_a_prompt_up_is_never_seen(target: OpenVINOTarget, monkeypatch: pytest.MonkeyPatch, count) -> None:
    """Against passes of exactly the tokens: what is told of them, and what follows them."""

    seq = target.open()

    def read() -> list[np.ndarray]:
        target.rewind(seq, 0)
        target.prefill(seq, np.arange(40, 46))
        told = target.prefill(seq, np.arange(count) % 97)
        out = [np.array(told.logits), np.array(told.features)]
        assert target.length(seq) == 6 + count and out[0].shape[0] == 1 and out[1].shape[0] == count
        out.append(np.array(target.verify({seq: fork(5, 6, 7)})[seq].logits))
        target.commit(seq, np.array([0, 2]))
        return [*out, np.array(target.prefill(seq, np.array([11, 12])).logits)]

    filled = read()
    monkeypatch.setattr(openvino_target, "prompt_rows", lambda count: max(count, 2))
    for got, want in zip(filled, read(), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-2)


def test_a_prompt_may_end_where_the_context_does(target: OpenVINOTarget) -> None:
    seq = target.open()
    target.prefill(seq, np.arange(target.max_context - 10) % 97)
    blocks = target.model.blocks
    target.prefill(seq, np.arange(9))
    alone = np.array(target.verify({seq: chain(5)})[seq].logits)
    assert target.length(seq) == target.max_context - 1 and alone.shape[0] == 1
    with pytest.raises(ContextOverflow, match=f"^{target.max_context + 1} tokens exceed"):
        target.verify({seq: chain(5, 6)})
    last = np.array(target.prefill(seq, np.array([5])).logits)
    np.testing.assert_allclose(last, alone, atol=2e-2)  # a prompt's kernel, and an answer's
    assert target.length(seq) == target.max_context and target.model.blocks == blocks
    with pytest.raises(ContextOverflow, match=f"^{target.max_context + 3} tokens exceed"):
        target.prefill(seq, np.array([5, 6, 7]))
    other = target.open()
    target.prefill(other, np.arange(target.max_context - 10) % 97)
    assert (target.prefill(other, np.array([*range(9), 5])).logits == last).all()


def test_no_pass_sees_what_one_of_the_same_shape_was_given(target: OpenVINOTarget, tiny_pair: Path) -> None:
    trees = [chain(1, 2, 3), fork(1, 2, 3), chain(4, 2, 9), fork(8, 7, 6), chain(1, 2, 3)]

    def verify(one: OpenVINOTarget, seq: int, tree: DraftTree) -> tuple[np.ndarray, np.ndarray]:
        one.rewind(seq, len(PROMPT))
        result = one.verify({seq: tree})[seq]
        return np.array(result.logits), np.array(result.features)

    seq = target.open()
    target.prefill(seq, PROMPT)
    for tree, (logits, features) in zip(trees, [verify(target, seq, tree) for tree in trees], strict=True):
        alone = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1)
        other = alone.open()
        alone.prefill(other, PROMPT)
        expected, taps = verify(alone, other, tree)
        assert (logits == expected).all() and (features == taps).all()


@pytest.mark.parametrize(
    ("instruction_sets", "float32"),
    [(("avx2", "avx512_bf16"), True), (("avx2", "avx512_bf16", "amx_bf16"), True), (("asimddp",), False), ((), False)],
)
def test_float32_on_every_x86_cpu_with_avx2(instruction_sets, float32) -> None:
    assert default_properties(instruction_sets) == {**PROPERTIES, **(FLOAT32 if float32 else {})}
