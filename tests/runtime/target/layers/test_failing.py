"""A device of first layers that fails: texts go on, memory and costs stay right."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from tests.runtime.target.layers.failing import PROMPT, TREE, Device, text

from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError, DovetailError
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system.arrays import Array
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.layers.texts import FirstLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tune import measure


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_a_device_that_fails_in_the_middle_of_a_text_hands_its_layers_back(
    device: Device, tiny_full_pair: Path, caplog: pytest.LogCaptureFixture, sampling: dict[str, Any]
) -> None:
    with Engine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1) as engine:
        whole = text(engine, PROMPT, 60, **sampling)
        assert engine.target_device == "CPU with the first layer on a GPU"
        engine.reset()
        tokens, before = list[int](), 0
        for number, chunk in enumerate(engine.stream(PROMPT, 60, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert not caplog.records
                before, device.fail_at = len(tokens), 1
            last = chunk
        assert tokens[:before] == list(whole[:before]) and len(tokens) == 60
        [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
        assert "from now on the CPU runs the first layer instead of a GPU: cudaStreamSynchronize" in record.message
        assert engine.target_device == "CPU"
        assert last.metrics is not None and last.metrics.bus_bytes > 0


def test_a_pass_whose_first_layers_fail_is_repeated_by_the_whole_model(tiny_pair: Path) -> None:
    """All texts are read again: those of the pass and another one."""
    device, manifest = Device(), read_manifest(tiny_pair)
    target = OpenVINOTarget.load(tiny_pair, manifest, take=TakeLayers(1, device, 256, texts=3))
    whole = OpenVINOTarget.load(tiny_pair, manifest)
    tokens, tree = np.arange(5, 75), DraftTree.chain(np.arange(3))
    texts = {seq: whole.open() for seq in (target.open() for _ in range(3))}
    for seq in texts:
        target.prefill(seq, tokens[: 20 * seq])
        target.verify({seq: tree})
        target.commit(seq, np.arange(2))
    device.fail_at = 1
    first, second, other = texts
    found = {seq: np.array(each.logits) for seq, each in target.verify({first: tree, second: tree}).items()}
    found[other] = np.array(target.verify({other: tree})[other].logits)
    for seq, same in texts.items():
        whole.prefill(same, np.concatenate([tokens[: 20 * seq], tree.tokens[:2]]))
        np.testing.assert_array_equal(found[seq], whole.verify({same: tree})[same].logits)
        assert target.length(seq) == whole.length(same)


@pytest.mark.parametrize("lasting", [True, False])
def test_what_a_failed_device_holds_is_kept_until_the_process_ends(tiny_pair: Path, lasting: bool) -> None:
    """ONNX Runtime may end the process if a session on a failed device is destroyed."""
    device = Device(fail_at=1)
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), take=TakeLayers(1, device, 256))
    front = target.model.front
    assert isinstance(front, FirstLayers)
    session, seq = weakref.ref(front._session._session), target.open()
    if lasting:
        upload = device.upload

        def broken(to: Any, source: Array) -> None:
            if device.downloads:
                raise DeviceError("cudaMemcpy: an illegal memory access was encountered (code 700)")
            upload(to, source)

        device.upload = broken  # type: ignore[method-assign]
    target.prefill(seq, np.arange(5, 25))
    del front
    gc.collect()
    assert target.device == "CPU" and (session() is not None) == lasting


@pytest.mark.parametrize("where", ["release", "run"])
def test_an_interrupt_while_the_layers_move_leaves_a_text_right(
    device: Device, tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C as the device's memory is freed, and as the text is read again: the next answer knows what is lost."""
    prompt, plain = [*range(5, 105)], TreeLimits(1, 0, 1, lookup=0)
    with Engine.from_pretrained(tiny_full_pair, tree=plain) as engine:
        right = engine.generate(prompt, 20, raw=True).token_ids
    with Engine.from_pretrained(tiny_full_pair, tree=plain, gpu_layers=1) as engine:
        engine.generate(prompt, 2, raw=True)
        owner: Any = FirstLayers if where == "release" else PagedModel
        real = getattr(owner, where)

        def interrupted(self: Any, *given: Any) -> Any:
            if where == "run" and self.front is not None:
                return real(self, *given)
            monkeypatch.setattr(owner, where, real)
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, where, interrupted)
        device.fail_at = 1
        with pytest.raises(KeyboardInterrupt):
            engine.generate([*prompt, 7], 5, raw=True)
        again = engine.generate(prompt, 20, raw=True)
        assert (again.token_ids, engine.target_device) == (right, "CPU")
        assert again.metrics.cached_tokens == len(prompt) - 1


def test_the_limit_of_kv_holds_after_the_device_has_failed(tiny_pair: Path) -> None:
    """The whole model has larger blocks. Texts that are read again count as memory that is taken."""
    manifest, device = read_manifest(tiny_pair), Device()
    limit = 900_000
    target = OpenVINOTarget.load(
        tiny_pair, manifest, threads=1, sequences=4, kv_cache=limit,
        take=TakeLayers(1, device, manifest.target.max_context, texts=4),
    )  # fmt: skip
    texts = [target.open() for _ in range(3)]
    for seq in texts:
        target.prefill(seq, np.arange(5, 205))
    device.fail_at = 1
    target.verify({texts[0]: DraftTree.chain(np.arange(3))})
    assert target.device == "CPU" and [target.length(seq) for seq in texts] == [200] * 3
    assert target.model.blocks * target.model.block_bytes <= limit
    before = target.room
    target.verify({texts[1]: DraftTree.chain(np.arange(1))})  # read again now
    assert before - 32 <= target.room <= before


def test_all_texts_of_a_batch_go_on_after_the_device_has_failed(
    device: Device, tiny_full_pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with BatchEngine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1, slots=3) as engine:
        jobs = [engine.submit(engine.ask(f"{PROMPT} {index}", 40, raw=True)) for index in range(4)]
        counts = {id(job): 0 for job in jobs}
        for step in range(200):
            if step == 5:
                device.fail_at = 1
            for job, chunk in engine.step():
                assert not isinstance(chunk, DovetailError)
                counts[id(job)] += len(chunk.token_ids)
            if engine.idle:
                break
        assert [*counts.values()] == [40] * 4
        assert len([each for each in caplog.records if "from now on" in each.message]) == 1


@pytest.mark.parametrize("between", [True, False], ids=["while rows are compared", "while passes are timed"])
def test_times_of_a_device_that_fails_are_not_kept_as_the_cpu_s(
    device: Device, tiny_full_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: bool
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr("dovetail.runtime.tune.measure.QUICK_SECONDS", 0.01)
    download, compare = device.download, measure.rows_apart

    def slow(to: Mapping[str, Array], sources: Mapping[str, Any]) -> None:
        sleep(0.06)
        download(to, sources)

    def failing(target: OpenVINOTarget) -> float:
        device.fail_at = 1
        return compare(target)

    monkeypatch.setattr(device, "download", slow)
    if between:
        monkeypatch.setattr(measure, "rows_apart", failing)
    else:
        device.fail_at = 35  # of about 40 calls
    with Engine.from_pretrained(tiny_full_pair, gpu_layers=1) as engine:
        assert engine.target_device == "CPU" and device.downloads > 34
    [kept] = (json.loads(file.read_text()) for file in (tmp_path / "costs").iterdir())
    assert kept["key"]["layers"] is None and np.median(kept["costs"]["target"]["ms"]) < 60
