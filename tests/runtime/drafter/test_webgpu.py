"""The drafter on WebGPU: the real plugin of ONNX Runtime, on SwiftShader, which computes on the CPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs are changed, and a pair is exported")
pytest.importorskip("torch", reason="a pair is exported")

from tests.runtime.drafter.conftest import Gpu, SwiftShaderDevice

from dovetail.runtime.devices.webgpu import SOFTWARE
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter.runners import webgpu_graph as webgpu_graph
from dovetail.runtime.drafter.runners.webgpu import WebGpuRunner
from dovetail.runtime.drafter.vram import BUCKETS, plan_on_webgpu, plan_webgpu
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.tree.limits import TreeLimits

pytestmark = pytest.mark.usefixtures("swiftshader")
SEQ = 1  # the number of a text


def test_bus_bytes_are_what_the_device_moved(webgpu: Gpu, pairs, stream) -> None:
    device = SwiftShaderDevice()
    session = webgpu.on(pairs, device)
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


def test_nodes_that_the_plugin_cannot_run_are_named(webgpu: Gpu, pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it was exported."""

    def unchanged(file: Path) -> webgpu_graph.WebGpuGraph:
        return webgpu_graph.WebGpuGraph(file.read_bytes(), None)

    monkeypatch.setattr(opening, "rewrite", unchanged)
    with pytest.raises(
        DeviceError, match=r"\d+ nodes would not run on WebGpu.*: \w+ '.+' on CPUExecutionProvider"
    ) as told:
        webgpu.on(pairs)
    assert "--drafter-device cpu" in str(told.value) and "\n" not in str(told.value)


def test_a_call_that_is_not_repeated_is_found(webgpu: Gpu, pairs, monkeypatch: pytest.MonkeyPatch) -> None:
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
        webgpu.on(pairs)


def test_memory_that_the_device_does_not_have_is_told_with_the_arithmetic(pairs, monkeypatch) -> None:
    manifest = pairs.manifest
    file = pairs.pair / manifest.drafter.files["cpu"]
    plan = plan_on_webgpu(manifest.drafter, 0, 20_000_000)  # more than a buffer can be
    with pytest.raises(DeviceError, match=r"free memory.*planned: .* webgpu = .* MiB") as told:
        WebGpuRunner(file, webgpu_graph.rewrite(file), manifest.drafter, plan, SwiftShaderDevice())
    assert "\n" not in str(told.value)


def test_the_budget_is_planned_and_refused_with_the_sum(webgpu: Gpu, pairs) -> None:
    file = pairs.pair / pairs.manifest.drafter.files["cpu"]
    embedding = webgpu_graph.rewrite(file).embedding
    assert embedding is not None
    plan = plan_webgpu(pairs.manifest, embedding.nbytes)
    assert plan.weights == sum(each.size for each in pairs.manifest.drafter_files("cpu")) - embedding.nbytes
    with pytest.raises(DeviceError, match=r"does not fit .* \+ 64.0 webgpu = "):
        webgpu.on(pairs, vram=plan.total - 2**20)


def test_what_is_allocated_is_what_was_planned(pairs, webgpu: Gpu) -> None:
    runner = webgpu.on(pairs)._runner
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
