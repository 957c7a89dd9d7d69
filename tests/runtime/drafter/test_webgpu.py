"""The drafter on WebGPU: the real plugin of ONNX Runtime, on SwiftShader, which computes on the CPU."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs are changed, and a pair is exported")
pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.devices.webgpu import SOFTWARE, WebGpuDevice
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cpu, open_webgpu
from dovetail.runtime.drafter.runners import webgpu_graph as webgpu_graph
from dovetail.runtime.drafter.runners.webgpu import WebGpuRunner
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import BUCKETS, plan_on_webgpu, plan_webgpu
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.tree.limits import TreeLimits

pytestmark = pytest.mark.usefixtures("swiftshader")
SEQ = 1  # the number of a text


class Device(WebGpuDevice):
    """The plugin's device, with a fault. fail: whether copies down fail. spoil: whether they bring NaN."""

    def __init__(self) -> None:
        super().__init__(DRAFTING, software=True)
        self.fail = self.spoil = False
        self.moved = 0

    def upload(self, to: Any, source: np.ndarray) -> None:
        self.moved += source.nbytes
        super().upload(to, source)

    def download(self, to: Mapping[str, np.ndarray], sources: Mapping[str, Any]) -> None:
        if self.fail:
            raise DeviceError("the drafter failed: Device lost: generate without speculation")
        super().download(to, sources)
        self.moved += sum(to[name].nbytes for name in sources)
        if self.spoil:
            to["top_logprobs"][:] = np.nan


def on(pairs: Any, device: Device | None = None, **options: Any) -> OnnxDrafter:
    return open_webgpu(pairs.pair, pairs.manifest, new_device=lambda: device or Device(), **options)


@pytest.fixture(scope="module")
def drafter(pairs: Any, swiftshader: None) -> OnnxDrafter:
    """One drafter for the tests that leave it as it was: opening compiles for a second."""
    return on(pairs)


@pytest.fixture
def exact(pairs: Any, tmp_path: Path) -> OnnxDrafter:
    """The same INT8 weights on the CPU, without quantised activations, which the plugin has for larger layers alone."""
    file = pairs.pair / pairs.manifest.drafter.files["cpu"]
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    changed = tmp_path / file.relative_to(pairs.pair)
    changed.parent.mkdir(parents=True)
    onnx.save(model, changed)
    data = file.with_name(file.name + ".data")
    (changed.parent / data.name).write_bytes(data.read_bytes())
    return open_cpu(tmp_path, pairs.manifest.drafter, "", threads=1)


def test_buckets_draft_what_the_cpu_does(pairs, drafter: OnnxDrafter, exact: OnnxDrafter, stream) -> None:
    """Calls of 1 to 128 rows in turns: KV and bank stay on the device, in place, from one captured call to another."""
    tokens, features = stream
    begin = 0
    drafter.rewind(SEQ, 0)
    for rows in (9, 1, 128, 3, 17, 40, 2):
        for session in (drafter, exact):
            session.extend(SEQ, tokens[begin : begin + rows], features[begin : begin + rows])
        begin += rows
        got, want = (session.propose(SEQ, pairs.limits) for session in (drafter, exact))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.parents, want.parents)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_noise_is_added_and_taken_away_again(pairs, drafter: OnnxDrafter, exact: OnnxDrafter, stream) -> None:
    tokens, features = stream

    def noise(depth: int, ids: np.ndarray) -> np.ndarray:
        # The plugin's ReduceLogSumExp alone would overflow at 300.
        return np.sin(ids * 7.0 + depth).astype(np.float32) * 3 + 300

    drafter.rewind(SEQ, 0)
    for each in (noise, None):
        for session in (drafter, exact):
            session.extend(SEQ, tokens[:9], features[:9], each)
        got, want = (session.propose(SEQ, pairs.limits, None, each) for session in (drafter, exact))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_bus_bytes_are_what_the_device_moved(pairs, stream) -> None:
    device = Device()
    session = on(pairs, device)
    assert session.report.bus_bytes == 0  # opening does not count
    device.moved = 0
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    first = device.moved
    assert session.report.bus_bytes == first
    session.propose(SEQ, TreeLimits(width=6, depth=2, top_k=3, lookup=0))  # one call
    level = device.moved - first
    assert session.report.bus_bytes == device.moved
    assert first - level == 8 * pairs.manifest.target.feature_size * 4  # features go up once
    facts = pairs.manifest.drafter
    kv = (facts.tree_slots + session.capacity) * 2 * facts.num_kv_heads * facts.head_size * 4
    assert level < kv / 2  # KV stays


def test_any_thread_may_call(pairs, drafter: OnnxDrafter, stream) -> None:
    drafter.rewind(SEQ, 0)
    for begin in (0, 9):
        user = Thread(target=drafter.extend, args=(SEQ, stream[0][begin : begin + 9], stream[1][begin : begin + 9]))
        user.start()
        user.join()
    assert drafter.length(SEQ) == 18
    other = on(pairs)
    other.extend(SEQ, stream[0][:18], stream[1][:18])
    got, want = (each.propose(SEQ, pairs.limits) for each in (drafter, other))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_after_a_nan_the_device_is_as_new(pairs, drafter: OnnxDrafter, stream) -> None:
    tokens, features = stream
    spoiled = features[:5].copy()
    spoiled[-1] = np.nan
    session = on(pairs)
    with pytest.raises(DeviceError, match=r"WebGPU \(int8\).*no numbers"):
        session.extend(SEQ, tokens[:5], spoiled)
    assert session.length(SEQ) == 0
    trees = []
    drafter.rewind(SEQ, 0)
    for each in (session, drafter):
        each.extend(SEQ, tokens[:9], features[:9])
        trees.append(each.propose(SEQ, pairs.limits))
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].logprobs.tolist() == trees[1].logprobs.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["fail", "spoil"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = pairs.text(pairs.cpu(), **sampling)
    device = Device()
    engine = pairs.engine(FailoverDrafter(on(pairs, device), pairs.cpu))
    tokens: list[int] = []
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(pairs.prompt, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            if number == 7:
                assert engine.drafter_device == "WebGPU (int8)" and not caplog.records
                setattr(device, fault, True)
            last = chunk
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)"
    assert engine.drafter_note is not None and engine.drafter_note.startswith("moved there: ")
    [record] = caplog.records
    assert "moves from WebGPU (int8) to CPU (int8)" in record.message and "\n" not in record.message
    assert last.metrics is not None and last.metrics.drafted > 0 and last.metrics.bus_bytes > 0


def test_a_text_from_the_folder_is_that_of_the_cpu(pairs, caplog: pytest.LogCaptureFixture) -> None:
    texts = []
    for device in ("cpu", "webgpu"):
        with Engine.from_pretrained(pairs.pair, drafter_device=device, tree=pairs.limits) as engine:
            texts.append(engine.generate(pairs.prompt, 60, raw=True).token_ids)
            named = engine.drafter_device, engine.drafter_note
    assert texts[0] == texts[1] and not caplog.records
    assert named[0] == "WebGPU (int8)" and "SwiftShader" in str(named[1])


def test_a_plugin_that_refuses_at_load_leaves_the_text_as_it_is(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise DeviceError("Vulkan shows no adapter: install the GPU's Vulkan driver")

    monkeypatch.setattr(opening, "WebGpuDevice", refuse)
    engine = Engine.from_pretrained(pairs.pair, tree=pairs.limits)
    assert engine.drafter_device == "CPU (int8)"
    assert "no WebGPU: Vulkan shows no adapter" in str(engine.drafter_note)
    with pytest.raises(DeviceError, match="cannot run on WebGPU: Vulkan shows no adapter") as told:
        Engine.from_pretrained(pairs.pair, tree=pairs.limits, drafter_device="webgpu")
    assert "\n" not in str(told.value)


def test_auto_does_not_take_an_adapter_that_computes_on_the_cpu(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(pairs.pair, tree=pairs.limits)
    assert engine.drafter_device == "CPU (int8)" and "SwiftShader" in str(engine.drafter_note)
    monkeypatch.delenv(SOFTWARE)
    with pytest.raises(DeviceError, match=f"set {SOFTWARE}=1"):
        Engine.from_pretrained(pairs.pair, tree=pairs.limits, drafter_device="webgpu")


def test_nodes_that_the_plugin_cannot_run_are_named(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it was exported."""

    def unchanged(file: Path) -> webgpu_graph.WebGpuGraph:
        return webgpu_graph.WebGpuGraph(file.read_bytes(), None)

    monkeypatch.setattr(opening, "rewrite", unchanged)
    with pytest.raises(
        DeviceError, match=r"\d+ nodes would not run on WebGpu.*: \w+ '.+' on CPUExecutionProvider"
    ) as told:
        on(pairs)
    assert "--drafter-device cpu" in str(told.value) and "\n" not in str(told.value)


def test_a_call_that_is_not_repeated_is_found(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured call leaves out copies, such as the one that the exported graph ends in."""

    def with_copy(file: Path) -> webgpu_graph.WebGpuGraph:
        made = webgpu_graph.rewrite(file)
        model = onnx.load_from_string(made.model)
        [last] = [node for node in model.graph.node if "top_ids" in node.output]
        last.output[0] = "before"
        shape = onnx.numpy_helper.from_array(np.array([-1, pairs.manifest.drafter.top_k], np.int64), "shape")
        model.graph.initializer.append(shape)
        model.graph.node.append(onnx.helper.make_node("Reshape", ["before", "shape"], ["top_ids"]))
        return replace(made, model=model.SerializeToString())

    monkeypatch.setattr(opening, "rewrite", with_copy)
    with pytest.raises(DeviceError, match=r"SwiftShader.* does not repeat a captured call"):
        on(pairs)


def test_memory_that_the_device_does_not_have_is_told_with_the_arithmetic(pairs, monkeypatch) -> None:
    manifest = pairs.manifest
    file = pairs.pair / manifest.drafter.files["cpu"]
    plan = plan_on_webgpu(manifest.drafter, 0, 20_000_000)  # more than a buffer can be
    with pytest.raises(DeviceError, match=r"free memory.*planned: .* webgpu = .* MiB") as told:
        WebGpuRunner(file, webgpu_graph.rewrite(file), manifest.drafter, plan, Device())
    assert "\n" not in str(told.value)


def test_the_budget_is_planned_and_refused_with_the_sum(pairs) -> None:
    file = pairs.pair / pairs.manifest.drafter.files["cpu"]
    embedding = webgpu_graph.rewrite(file).embedding
    assert embedding is not None
    plan = plan_webgpu(pairs.manifest, embedding.nbytes)
    assert plan.weights == sum(each.size for each in pairs.manifest.drafter_files("cpu")) - embedding.nbytes
    with pytest.raises(DeviceError, match=r"does not fit .* \+ 64.0 webgpu = "):
        on(pairs, vram=plan.total - 2**20)


def test_what_is_allocated_is_what_was_planned(pairs, drafter: OnnxDrafter) -> None:
    runner = drafter._runner
    assert isinstance(runner, WebGpuRunner)
    plan = plan_webgpu(pairs.manifest, 0)
    held = sum(array.nbytes for bucket in runner._buckets.values() for array in bucket.arrays.values()) + (
        0 if runner.draft_ids is None else runner.draft_ids.nbytes
    )
    assert runner.max_context == plan.context and sorted(runner._buckets) == list(BUCKETS)
    assert held == plan.rows
    assert plan.state == sum(4 * int(np.prod(shape)) for shape in runner._shapes.values())


def test_the_process_ends_well_with_an_open_drafter(pairs) -> None:
    code = (
        "import sys\n"
        "from tests.conftest import use_swiftshader\n"
        "use_swiftshader()\n"
        "from pathlib import Path\n"
        "from dovetail.runtime.drafter.open import open_drafter\n"
        "from dovetail.runtime.pair.manifest import read_manifest\n"
        "pair = Path(sys.argv[1]); manifest = read_manifest(pair)\n"
        "kept = open_drafter(pair, manifest, device='webgpu')\n"
        "print(kept.device)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pairs.pair)], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "WebGPU (int8)\n", "")
