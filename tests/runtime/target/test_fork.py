"""Texts that share KV blocks, and a limit on the memory of all texts, with the bits of texts that share nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK
from dovetail.runtime.target.session import opened
from dovetail.runtime.tree.draft_tree import DraftTree

TEXT = np.random.default_rng(0).integers(5, 90, 150)
TREE = DraftTree(np.array([7, 8, 9, 11, 12]), np.array([-1, 0, 1, 0, 3]), np.zeros(5, np.float32))


@pytest.fixture(params=[0, 1, 4], ids=["whole", "one-buffer-elsewhere", "buffers-elsewhere"])
def take(request: pytest.FixtureRequest) -> TakeLayers | None:
    """The first layer on a device that holds this many texts at once."""
    return TakeLayers(1, OrtDevice.cpu(), 256, request.param) if request.param else None


def load(pair: Path, take: TakeLayers | None = None, **options: Any) -> OpenVINOTarget:
    return OpenVINOTarget.load(pair, read_manifest(pair), threads=1, take=take, **options)


def rows_after(target: OpenVINOTarget, text: np.ndarray) -> np.ndarray:
    """Logits of the tree's rows after a text that shares nothing."""
    with opened(target) as seq:
        target.prefill(seq, text)
        return np.array(target.verify({seq: TREE})[seq].logits)


@pytest.mark.parametrize("kv", ["f16", "u8"])
@pytest.mark.parametrize("keep", [31, 32, 100, 150])
def test_a_fork_goes_on_with_the_bits_of_its_own_text(
    tiny_pair: Path, take: TakeLayers | None, keep: int, kv: str
) -> None:
    target, new = load(tiny_pair, take, ov_config={"KV_CACHE_PRECISION": kv}), np.array([60, 61, 62])
    source = target.open()
    target.prefill(source, TEXT)
    used = np.count_nonzero(target.model.pool.owners)
    fork = target.fork(source, keep)
    begin = target.length(fork)
    assert begin == keep // BLOCK * BLOCK
    assert np.count_nonzero(target.model.pool.owners) == used  # no block is copied
    text = np.concatenate([TEXT[:begin], new])
    target.prefill(fork, new)
    passes = target.verify({source: TREE, fork: TREE})
    got = {seq: np.array(each.logits) for seq, each in passes.items()}
    np.testing.assert_array_equal(got[fork], rows_after(target, text))
    np.testing.assert_array_equal(got[source], rows_after(target, TEXT))


@pytest.mark.parametrize("kv", ["f16", "u8"])
def test_texts_that_share_end_in_any_order_and_free_every_block(tiny_pair: Path, kv: str) -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        target = load(tiny_pair, ov_config={"KV_CACHE_PRECISION": kv})
        texts = [target.open()]
        target.prefill(texts[0], TEXT)
        texts += [target.fork(texts[0], 100)]
        texts += [target.fork(texts[1], 70)]
        for seq, own in zip(texts[1:], ([50] * 20, [51] * 40), strict=True):
            target.prefill(seq, np.array(own))
        for index in order:
            want = rows_after(target, TEXT) if texts[0] in target._texts else None
            target.close(texts[index])
            if want is not None and texts[0] in target._texts:
                np.testing.assert_array_equal(np.array(target.verify({texts[0]: TREE})[texts[0]].logits), want)
                target.rewind(texts[0], len(TEXT))
        assert np.count_nonzero(target.model.pool.owners) == 1  # the block without a use


@pytest.mark.parametrize("keep", [0, 5, 32, 50, 64, 90])
def test_a_text_that_goes_back_into_shared_blocks_leaves_them_to_the_others(
    tiny_pair: Path, take: TakeLayers | None, keep: int
) -> None:
    target = load(tiny_pair, take)
    source = target.open()
    target.prefill(source, TEXT)
    fork = target.fork(source, 128)
    target.rewind(source, keep)
    target.prefill(source, np.array([40] * 60))  # writes where the shared tokens were
    np.testing.assert_array_equal(
        np.array(target.verify({source: TREE})[source].logits), rows_after(target, np.array([*TEXT[:keep], *[40] * 60]))
    )
    np.testing.assert_array_equal(np.array(target.verify({fork: TREE})[fork].logits), rows_after(target, TEXT[:128]))
    target.close(source)
    target.close(fork)
    assert np.count_nonzero(target.model.pool.owners) == 1  # the block without a use


@pytest.mark.parametrize("keep", [0, 1, 32, 33, 150])
def test_a_text_that_goes_back_gives_up_the_memory_behind_it(
    tiny_pair: Path, take: TakeLayers | None, keep: int
) -> None:
    target = load(tiny_pair, take)
    with opened(target) as seq:
        target.prefill(seq, TEXT)
        target.verify({seq: TREE})
        target.rewind(seq, keep)
        assert np.count_nonzero(target.model.pool.owners) == 1 + -(-keep // BLOCK)
        if keep < 149:
            target.prefill(seq, TEXT[keep:149])
        np.testing.assert_array_equal(
            np.array(target.verify({seq: TREE})[seq].logits), rows_after(target, TEXT[: max(keep, 149)])
        )


def test_memory_for_kv_is_limited(tiny_pair: Path) -> None:
    block = load(tiny_pair).model.block_bytes
    context = read_manifest(tiny_pair).target.max_context
    with pytest.raises(
        InputError, match=r"kv_cache of 1000 bytes is too small for a context of \d+ tokens: give \d+ bytes"
    ):
        load(tiny_pair, sequences=4, kv_cache=1000)
    least = (-(-context // BLOCK) + 192) * block
    target = load(tiny_pair, sequences=4, kv_cache=least)
    blocks, room = target.model.blocks, target.room
    assert blocks * block <= least and room == -(-context // BLOCK) * BLOCK
    seqs = [target.open() for _ in range(40)]
    with pytest.raises(DeviceError, match=r"the memory for KV is full: .* give the engine a larger kv_cache"):
        for seq in seqs:
            target.prefill(seq, np.arange(5, 5 + min(context, 250)) % 90)
    assert target.model.blocks == blocks
    for seq in seqs:
        target.close(seq)
    assert target.room == room
