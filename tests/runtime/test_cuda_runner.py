"""The GPU's drafter without a GPU: real graphs, buffers and calls on a host device, and what happens when it fails.

HostDevice stands for CUDA at the seam of cuda_runner; ONNX Runtime runs the float16 graph of a tiny pair on its CPU
provider.  What only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime import cuda_runner, onnx_drafter, runners, steady
from dovetail.runtime.cuda_runner import CudaRunner, check_placement
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.manifest import Manifest, read_manifest
from dovetail.runtime.onnx_drafter import OnnxDrafter
from dovetail.runtime.openvino_target import OpenVINOTarget
from dovetail.runtime.steady import SteadyDrafter
from dovetail.runtime.tokenizer import Tokenizer
from dovetail.runtime.tree import DraftTree, TreeLimits
from dovetail.runtime.vram import BUCKETS, plan_pair

LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=0)
CUDA = "CUDAExecutionProvider"
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def manifest(tiny_full_pair: Path) -> Manifest:
    return read_manifest(tiny_full_pair)


@pytest.fixture
def stream(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = 250, manifest.target.feature_size
    return rng.integers(0, manifest.target.vocab_size, 250), rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def exact(tiny_full_pair: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Opens the same drafter in float32 on the CPU."""
    import torch

    from dovetail.exporter.drafter import load_drafter, save
    from dovetail.exporter.drafter_graph import to_onnx

    assert manifest.drafter is not None
    checkpoint = Path(manifest.provenance["drafter"]["checkpoint"])
    drafter = load_drafter(checkpoint, tiny_full_pair / "target")
    folder = tmp_path_factory.mktemp("f32")
    facts = manifest.drafter
    save(to_onnx(drafter, torch.float32, tree_slots=facts.tree_slots, top_k=facts.top_k), folder / "f32.onnx")
    in_f32 = replace(manifest, drafter=replace(facts, files={**facts.files, "cpu": "f32.onnx"}))
    return lambda: OnnxDrafter.open(folder, in_f32, device="cpu", threads=1)


class Claims:
    """A session that says it runs on CUDA, of which ONNX Runtime gave every node to the CPU."""

    def __init__(self, session: Any):
        self.get_provider_graph_assignment_info = session.get_provider_graph_assignment_info

    def get_providers(self) -> list[str]:
        return [CUDA]


class Pairs:
    """Engines over one target: with the drafter on the CPU, and on a device that may fail."""

    def __init__(self, pair: Path, manifest: Manifest):
        self.pair, self.manifest = pair, manifest
        self.target = OpenVINOTarget.open(pair, manifest, threads=1)

    def cpu(self, note: str = "asked for") -> OnnxDrafter:
        return OnnxDrafter.open_cpu(self.pair, self.manifest, threads=1, note=note)

    def engine(self, drafter: Any) -> Engine:
        self.target.reset()
        return Engine(self.target, drafter, Tokenizer.from_folder(self.pair / "target"), tree=LIMITS, stop_tokens=())

    def text(self, drafter: Any, **sampling: Any) -> tuple[int, ...]:
        return self.engine(drafter).generate(PROMPT, 80, raw=True, **sampling).token_ids


@pytest.fixture(scope="module")
def pairs(tiny_full_pair: Path, manifest: Manifest) -> Pairs:
    return Pairs(tiny_full_pair, manifest)


def open_on(device: Any, pair: Path, manifest: Manifest, **options: Any) -> OnnxDrafter:
    return OnnxDrafter.open_cuda(pair, manifest, new_device=lambda: device, **options)


def assert_alike(got: DraftTree, want: DraftTree) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.parents, want.parents)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=0.02)


def test_float16_in_buckets_drafts_what_float32_does(HostDevice, tiny_full_pair, manifest, exact, stream) -> None:
    """Calls of 1 to 128 rows in turns: what another call left in a bucket's rows is not seen."""
    tokens, features = stream
    got, want = open_on(HostDevice(), tiny_full_pair, manifest), exact()
    begin = 0
    for rows in (9, 1, 128, 3, 17, 40, 2):
        for session in (got, want):
            session.extend(tokens[begin : begin + rows], features[begin : begin + rows])
        begin += rows
        assert_alike(got.propose(LIMITS), want.propose(LIMITS))


def test_a_call_is_one_copy_up_one_down_and_one_wait(HostDevice, tiny_full_pair, manifest, stream) -> None:
    device = HostDevice()
    session = open_on(device, tiny_full_pair, manifest)
    device.calls.clear()
    session.extend(stream[0][:9], stream[1][:9])
    assert device.calls == ["up", "down", "wait"]
    session.propose(TreeLimits(width=12, depth=3, top_k=3, lookup=0))  # two levels below the root's children
    assert device.calls == ["up", "down", "wait"] * 3


def test_features_cross_the_bus_once_and_levels_only_small_rows(HostDevice, tiny_full_pair, manifest, stream) -> None:
    session = open_on(HostDevice(), tiny_full_pair, manifest)
    features = 8 * manifest.target.feature_size * 2
    session.extend(stream[0][:5], stream[1][:5])
    first = session.bus_bytes
    session.propose(TreeLimits(width=6, depth=2, top_k=3, lookup=0))  # one call
    level = session.bus_bytes - first
    assert 0 <= first - level - features < 256  # the block's padding


def test_every_bucket_has_its_own_graph_and_memory(HostDevice, tiny_full_pair, manifest, stream) -> None:
    session = open_on(HostDevice(), tiny_full_pair, manifest)
    runner = session._runner
    assert isinstance(runner, CudaRunner)
    assert [len(runner.rows(n).input_ids) for n in (1, 8, 9, 16, 17, 128)] == [8, 8, 16, 16, 128, 128]
    before = {bucket: (graph.inputs.address, graph.outputs.address) for bucket, graph in runner._graphs.items()}
    assert sorted(before) == list(BUCKETS) and len({address for pair in before.values() for address in pair}) == 6
    ids = {b: graph.run_options.get_run_config_entry("gpu_graph_id") for b, graph in runner._graphs.items()}
    assert ids == {8: "1", 16: "2", 128: "3"}
    session.extend(stream[0][:150], stream[1][:150])
    assert before == {b: (graph.inputs.address, graph.outputs.address) for b, graph in runner._graphs.items()}


def test_nodes_that_would_run_elsewhere_are_named(HostDevice, tiny_full_pair, manifest) -> None:
    session = open_on(HostDevice(), tiny_full_pair, manifest)._runner._session  # type: ignore[attr-defined]

    with pytest.raises(
        DeviceError, match=r"\d+ nodes would not run on CUDA.*: \w+ '.+' on CPUExecutionProvider"
    ) as told:
        check_placement(Claims(session), CUDA)
    assert "\n" not in str(told.value) and " more: use --drafter-device cpu" in str(told.value)
    with pytest.raises(DeviceError, match="could not load its CUDAExecutionProvider"):
        check_placement(session, CUDA)


def test_a_device_that_is_too_small_is_told_with_the_arithmetic(HostDevice, tiny_full_pair, manifest) -> None:
    device = HostDevice(room=20_000)
    with pytest.raises(DeviceError, match=r"out of memory.*planned: .* weights \+ .* = .* MiB") as told:
        open_on(device, tiny_full_pair, manifest)
    assert device.closed and "\n" not in str(told.value)


def test_what_is_allocated_is_what_was_planned(HostDevice, tiny_full_pair, manifest) -> None:
    device = HostDevice()
    session = open_on(device, tiny_full_pair, manifest)
    plan, held = plan_pair(manifest), sum(block.nbytes for block in device.blocks.values())
    assert session.max_context == plan.context
    assert plan.state + plan.rows <= held <= plan.state + plan.rows + 60 * 256  # what blocks are rounded up by


def test_the_arena_gets_what_a_limit_leaves(HostDevice, tiny_full_pair, manifest) -> None:
    free, limited = HostDevice(), HostDevice()
    open_on(free, tiny_full_pair, manifest)
    open_on(limited, tiny_full_pair, manifest, vram=3 * 10**9)
    plan = plan_pair(manifest)
    assert free.arena is None and limited.arena == 3 * 10**9 - plan.state - plan.rows - plan.cuda > plan.weights


def test_nodes_that_stop_a_capture_are_named(
    HostDevice, tiny_full_pair, manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime refuses to capture without naming a node; without capturing it tells where it placed them."""
    opened: list[int] = []

    def refuse_once(*arguments: Any) -> Any:
        opened.append(1)
        if len(opened) == 1:
            raise DeviceError("This session cannot use the graph capture feature")
        return runners.open_session(*arguments)

    monkeypatch.setattr(cuda_runner, "open_session", refuse_once)
    with pytest.raises(DeviceError, match="cannot use the graph capture"):  # all nodes are where they belong
        open_on(HostDevice(), tiny_full_pair, manifest)
    monkeypatch.setattr(cuda_runner, "check_placement", lambda session, _: check_placement(Claims(session), CUDA))
    opened.clear()
    with pytest.raises(DeviceError, match="nodes would not run on CUDAExecutionProvider: "):
        open_on(HostDevice(), tiny_full_pair, manifest)


@pytest.mark.parametrize("way", ["close", "drop", "engine", "failed"])
def test_a_session_goes_before_its_device_and_a_failed_one_stays(HostDevice, pairs: Pairs, way: str) -> None:
    """ONNX Runtime ends the process when it destroys a captured graph on a device that failed."""
    device, gone = HostDevice(), []
    drafter: Any = open_on(device, pairs.pair, pairs.manifest)
    session = weakref.ref(drafter._runner._session)
    close = device.close
    device.close = lambda: (gone.append(session() is None), close())
    if way == "engine":
        with pairs.engine(SteadyDrafter(drafter)) as engine:
            del drafter
            engine.generate(PROMPT, 4, raw=True)
    elif way == "drop":
        del drafter
        gc.collect()
    else:
        device.fail_at = 1 if way == "failed" else 0
        drafter.close()
        drafter.close()
    assert device.closed and gone == [way != "failed"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    HostDevice, pairs: Pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    spoiled = (lambda down: down.view(np.uint8).fill(0xFF)) if fault == "nan" else None  # all bits set: nan
    device = HostDevice()
    drafter = SteadyDrafter(open_on(device, pairs.pair, pairs.manifest), pairs.cpu)
    engine = pairs.engine(drafter)
    assert engine.drafter_device == "CUDA (fp16)"
    tokens: list[int] = []
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(PROMPT, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert engine.drafter_device == "CUDA (fp16)" and not caplog.records
                device.alter = spoiled
                device.fail_at = 0 if spoiled else device.calls.count("wait") + 2
            last = chunk
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)" and device.closed
    assert engine.drafter_note is not None and engine.drafter_note.startswith("moved there: ")
    [record] = caplog.records
    assert "moves from CUDA (fp16) to CPU (int8)" in record.message and "\n" not in record.message
    assert last.metrics is not None and last.metrics.drafted > 0 and last.metrics.bus_bytes > 0


def test_a_provider_that_refuses_at_load_leaves_the_text_as_it_is(
    HostDevice, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from a folder: CUDA seems usable, its device does not start."""

    def refuse() -> Any:
        raise DeviceError("cudaStreamCreateWithFlags: no CUDA-capable device is detected (code 100): check nvidia-smi")

    expected = Engine.from_pretrained(pairs.pair, drafter_device="cpu", tree=LIMITS).generate(PROMPT, 60).token_ids
    monkeypatch.setattr(onnx_drafter, "cuda_problem", lambda: None)
    monkeypatch.setattr(onnx_drafter, "CudaDevice", refuse)
    engine = Engine.from_pretrained(pairs.pair, tree=LIMITS)
    assert engine.generate(PROMPT, 60).token_ids == expected
    assert engine.drafter_device == "CPU (int8)"
    assert engine.drafter_note is not None and "no CUDA: cudaStreamCreateWithFlags" in engine.drafter_note
    with pytest.raises(DeviceError, match="cannot run on CUDA: cudaStreamCreateWithFlags") as told:
        Engine.from_pretrained(pairs.pair, tree=LIMITS, drafter_device="cuda")
    assert "\n" not in str(told.value)


def test_a_device_that_fails_while_the_pair_is_measured_is_left(
    HostDevice, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr(onnx_drafter, "cuda_problem", lambda: None)
    monkeypatch.setattr(onnx_drafter, "CudaDevice", lambda: HostDevice(fail_at=5))
    engine = Engine.from_pretrained(pairs.pair)
    assert engine.drafter_device == "CPU (int8)" and "illegal memory access" in str(engine.drafter_note)
    assert len(engine.generate(PROMPT, 8, raw=True).token_ids) > 0


def test_with_no_second_drafter_the_failure_is_raised(HostDevice, pairs: Pairs) -> None:
    engine = pairs.engine(SteadyDrafter(open_on(HostDevice(fail_at=6), pairs.pair, pairs.manifest)))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.generate(PROMPT, 60, raw=True)


@pytest.fixture
def short(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SteadyDrafter]]:
    """Opens drafters that hold 64 pairs and read 16 of them again."""
    monkeypatch.setattr(steady, "KEPT", 16)
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=64))
    yield lambda: SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))


def test_a_full_context_begins_anew_with_the_last_pairs(pairs: Pairs, short, stream) -> None:
    tokens, features = stream
    session, fresh = short(), pairs.cpu()
    for begin in range(0, 60, 6):
        session.extend(tokens[begin : begin + 6], features[begin : begin + 6])
    session.extend(tokens[60:70], features[60:70])  # 70 do not fit: the last parts of at least 16, and these
    assert session.length == 70 and session._drafter.length == 26
    fresh.extend(tokens[44:70], features[44:70])
    want, got = fresh.propose(LIMITS), session.propose(LIMITS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_a_text_longer_than_the_drafter_s_context_is_drafted_to_its_end(pairs: Pairs, short) -> None:
    chain = TreeLimits(width=5, depth=4, top_k=1, lookup=0)  # gives token for token what plain decoding does
    plain = pairs.engine(None).generate(PROMPT, 150, raw=True)
    engine = pairs.engine(short())
    lengths, tokens = [], list[int]()
    for chunk in engine.stream(PROMPT, 150, raw=True, tree=chain):
        lengths.append(engine._drafter.length if engine._drafter else 0)  # type: ignore[union-attr]
        tokens += chunk.token_ids
        last = chunk
    assert last.metrics is not None and last.metrics.drafted > last.metrics.rounds * 3
    assert max(lengths) > 140 and tuple(tokens) == plain.token_ids


def test_a_reset_behind_what_is_held_begins_there(short, stream) -> None:
    tokens, features = stream
    session = short()
    for begin in range(0, 100, 5):
        session.extend(tokens[begin : begin + 5], features[begin : begin + 5])
    for keep in (97, 90, 20, 0):
        session.reset(keep)
        assert session.length == keep
    session.extend(tokens[:9], features[:9])
    fresh = short()
    fresh.extend(tokens[:9], features[:9])
    assert_alike(session.propose(LIMITS), fresh.propose(LIMITS))


@pytest.mark.parametrize("room", [300, 512, 700])
def test_a_context_shorter_than_a_prompt_reads_its_end(pairs: Pairs, stream, room: int) -> None:
    tokens, features = (np.concatenate([part] * 3) for part in stream)
    assert pairs.manifest.drafter is not None
    narrow = replace(pairs.manifest, drafter=replace(pairs.manifest.drafter, max_context=room))
    session = SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))
    begin = 0
    for count in (511, 7, 150, 9):
        session.extend(tokens[begin : begin + count], features[begin : begin + count])
        begin += count
        held = session._drafter.length
        assert session.length == begin and 0 < held <= room
        fresh = SteadyDrafter(OnnxDrafter.open(pairs.pair, narrow, device="cpu", threads=1))
        fresh.extend(tokens[begin - held : begin], features[begin - held : begin])
        assert_alike(session.propose(LIMITS), fresh.propose(LIMITS))
    session.reset(600)
    session.extend(tokens[600:610], features[600:610])
    assert session.length == 610


def test_an_interrupt_while_the_drafter_moves_leaves_it_on_the_cpu(HostDevice, pairs: Pairs, stream) -> None:
    tokens, features = stream
    device = HostDevice()
    session = SteadyDrafter(open_on(device, pairs.pair, pairs.manifest), pairs.cpu)
    session.extend(tokens[:100], features[:100])

    def interrupted() -> None:
        raise KeyboardInterrupt

    device.close, device.fail_at = interrupted, 1
    with pytest.raises(KeyboardInterrupt):
        session.extend(tokens[100:105], features[100:105])
    session.reset(100)
    session.extend(tokens[100:120], features[100:120])
    assert session.device == "CPU (int8)" and session.length == 120
    fresh = pairs.cpu()  # what was kept is read when there is something new
    fresh.extend(tokens[:120], features[:120])
    assert_alike(session.propose(LIMITS), fresh.propose(LIMITS))


@pytest.mark.parametrize("left", ["interrupted", "failed"])
def test_a_device_waits_for_a_session_that_a_traceback_holds(
    HostDevice, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """The engine is closed while an error from within a call is on its way, on a device that is well."""
    device, gone = HostDevice(), []
    opened = [open_on(device, pairs.pair, pairs.manifest)]
    session, close = weakref.ref(opened[0]._runner._session), device.close  # type: ignore[attr-defined]
    device.close = lambda: (gone.append(session() is None), close())
    problem = KeyboardInterrupt if left == "interrupted" else RuntimeError

    def raise_it(self: Any, *_: Any) -> None:
        raise problem

    def leave() -> None:
        with pairs.engine(SteadyDrafter(opened.pop())) as engine:
            monkeypatch.setattr("onnxruntime.InferenceSession.run_with_iobinding", raise_it)
            engine.generate(PROMPT, 30, raw=True)

    with pytest.raises((KeyboardInterrupt, DeviceError)) as told:
        leave()
    del told
    gc.collect()
    assert gone == [True] and device.closed


def test_after_an_interrupted_call_the_kept_pairs_are_still_the_last(pairs: Pairs, stream) -> None:
    """The first of two chunks was read when Ctrl-C came: the rollback takes it from the drafter alone."""
    tokens, features = stream
    session = SteadyDrafter(pairs.cpu())
    session.extend(tokens[:100], features[:100])
    runner = session._drafter._runner
    run, calls = runner.run, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    runner.run = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.extend(tokens[100:240], features[100:240])
    session.reset(100)
    kept, _ = session._recent.last(100, 256)
    np.testing.assert_array_equal(kept, tokens[:100])
