"""Engines whose target has its first layer on a device: texts, flags, memory, costs."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from tests.runtime.target.layers.failing import PROMPT, TREE, Device, text

from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.devices.webgpu import Adapter
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DeviceError, DovetailError, InputError
from dovetail.runtime.load import first_layers
from dovetail.runtime.pair.manifest import Manifest, read_manifest, write_manifest
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.layers.plan import LayerPlan, fitting, plans, within
from dovetail.runtime.target.layers.session import LayerSession
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.layers.texts import FirstLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tune.cost_cache import CostKey

ROOT = Path(__file__).parents[4]


def test_texts_are_the_same_alone_and_beside_others(device: Device, tiny_full_pair: Path) -> None:
    prompts = [f"{PROMPT} {index}" * (1 + index) for index in range(5)]
    with Engine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1) as engine:
        alone = [text(engine, prompt, 30, speculate=False) for prompt in prompts]
    with BatchEngine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1, slots=3) as batch:
        jobs = [batch.submit(batch.ask(prompt, 30, raw=True)) for prompt in prompts]
        found = {id(job): list[int]() for job in jobs}
        while not batch.idle:
            for job, chunk in batch.step():
                assert not isinstance(chunk, DovetailError)
                found[id(job)] += chunk.token_ids
    assert [tuple(found[id(job)]) for job in jobs] == alone


@pytest.mark.usefixtures("swiftshader")
def test_drafter_and_layers_share_a_gpu(tiny_full_pair: Path) -> None:
    with Engine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1, drafter_device="webgpu") as engine:
        plain = text(engine, PROMPT, 40, speculate=False)
        assert text(engine, PROMPT, 40) == plain
        assert engine.drafter_device == "WebGPU (int8)"
        assert engine.target_device.startswith("CPU with the first layer on SwiftShader")


def test_costs_with_layers_elsewhere_are_kept_apart(
    device: Device, tiny_full_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    monkeypatch.setattr("dovetail.runtime.tune.measure.QUICK_SECONDS", 0.01)
    for layers, files in ((0, 1), (1, 2), (1, 2)):
        Engine.from_pretrained(tiny_full_pair, gpu_layers=layers).close()
        assert len([*(tmp_path / "costs").iterdir()]) == files
    manifest = read_manifest(tiny_full_pair)
    keys = {CostKey.of(manifest, "cpu", None, layers=each).file for each in (None, (1, "cpu"), (2, "cpu"), (1, "cuda"))}
    assert len(keys) == 4


def test_the_pair_s_own_number_is_the_default(device: Device, tiny_full_pair: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_full_pair)
    for name in ("target", "drafter"):
        (tmp_path / name).symlink_to(tiny_full_pair / name)
    write_manifest(tmp_path, replace(manifest, target=replace(manifest.target, gpu_layers="1")))
    for given, device_name in ((None, "CPU with the first layer on a GPU"), (0, "CPU")):
        with Engine.from_pretrained(tmp_path, tree=TREE, gpu_layers=given) as engine:
            assert engine.target_device == device_name
    with Engine.from_pretrained(tmp_path, tree=TREE, drafter_device="cpu") as engine:
        assert engine.target_device == "CPU"  # the user wants no GPU


@pytest.mark.parametrize(("layers", "vram"), [("1", None), ("auto", None), ("auto", 10**9), ("1", 10**9)])
def test_the_pair_s_own_number_needs_no_gpu(
    tiny_full_pair: Path, caplog: pytest.LogCaptureFixture, layers: str, vram: int | None
) -> None:
    manifest = read_manifest(tiny_full_pair)
    wished = replace(manifest, target=replace(manifest.target, gpu_layers=layers))
    found = first_layers(
        tiny_full_pair, wished, None, drafter_device="cuda", vram=vram, fit=False, texts=1, threads=None
    )
    assert found == (None, vram) and "all layers of the target run on the CPU: " in caplog.text
    assert "--gpu-layers auto" not in caplog.text  # nobody gave the flag
    if layers == "auto" and vram is None:
        assert "the pair's gpu_layers auto takes what is left of a limit: give --vram SIZE too" in caplog.text


def test_the_pair_s_own_number_needs_no_gpu_that_opens(
    device: Device, tiny_full_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def full(*_: Any) -> Any:
        raise DeviceError("a call of the target's first layers failed: out of memory: give fewer --gpu-layers")

    monkeypatch.setattr(device, "allocate", full)
    manifest = read_manifest(tiny_full_pair)
    for name in ("target", "drafter"):
        (tmp_path / name).symlink_to(tiny_full_pair / name)
    write_manifest(tmp_path, replace(manifest, target=replace(manifest.target, gpu_layers="1")))
    with Engine.from_pretrained(tmp_path, tree=TREE) as engine:
        assert engine.target_device == "CPU" and "all layers of the target run on the CPU: a call" in caplog.text
    with pytest.raises(DeviceError, match="out of memory: give fewer --gpu-layers"):
        Engine.from_pretrained(tmp_path, tree=TREE, gpu_layers=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpu_layers": "many"}, "gpu layers 'many' is no number of layers: give 0, 1, 2 ..., or auto"),
        ({"gpu_layers": -1}, "gpu layers -1 is no number"),
        ({"gpu_layers": 10001}, "gpu layers 10001 are more than any target has: give 10000 or less, or auto"),
        ({"gpu_layers": "9" * 5000}, "gpu layers 9{40} are more than any target has"),
        ({"gpu_layers": True}, "gpu layers True is no number"),
        ({"gpu_layers": 1, "drafter_device": "cpu"}, "runs on CUDA or WebGPU, not beside --drafter-device cpu: give"),
        ({"gpu_layers": 1, "drafter_device": "openvino-gpu"}, "not beside --drafter-device openvino-gpu: give"),
        (
            {"gpu_layers": "auto"},
            "--gpu-layers auto takes what is left of a limit: give --vram SIZE too, or --",
        ),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(
    tiny_full_pair: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as told:
        Engine.from_pretrained(tiny_full_pair, **flags)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("device_name", ["cuda", "webgpu"])
def test_a_gpu_that_is_missing_for_layers_has_a_remedy_for_layers(
    tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch, device_name: str
) -> None:
    monkeypatch.setattr("dovetail.runtime.devices.cuda.DRIVER", "libnone.so")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("dovetail.runtime.devices.webgpu.adapters", lambda: (Adapter("llvmpipe", software=True),))
    monkeypatch.setattr("dovetail.runtime.devices.webgpu.packages_problem", lambda: None)
    monkeypatch.delenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", raising=False)
    with pytest.raises(DeviceError, match="leave out --gpu-layers, or give --gpu-layers 0") as told:
        Engine.from_pretrained(tiny_full_pair, gpu_layers=1, drafter_device=device_name)
    assert "let the drafter" not in str(told.value) and "--drafter-device cpu" not in str(told.value)


def test_without_a_gpu_one_line_says_what_is_missing(tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = "dovetail.runtime.target.layers.choose"
    monkeypatch.setattr(f"{choose}.cuda_problem", lambda off: f"no NVIDIA driver: install it, or {off}")
    monkeypatch.setattr(f"{choose}.webgpu_problem", lambda software, off: f"no Vulkan loader: install it, or {off}")
    with pytest.raises(
        DeviceError,
        match=r"no GPU for the target's first layers \(no CUDA: .*leave out --gpu-layers, .*; no WebGPU: .*\): give",
    ):
        Engine.from_pretrained(tiny_full_pair, gpu_layers=1)


def test_without_onnx_one_line_names_the_extras_that_have_it(
    device: Device, tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # "not installed" to import
    with pytest.raises(
        DeviceError, match=r"onnx, which is not installed: run pip install '.\[cuda\]' .*, or '.\[webgpu\]' for WebGPU"
    ):
        Engine.from_pretrained(tiny_full_pair, gpu_layers=1)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {tuple(each for each in extras[name] if each.startswith("onnx>")) for name in ("cuda", "webgpu")}
    assert len(wanted) == 1 and len(wanted.pop()) == 1


@pytest.mark.parametrize("tree", [TreeLimits(33, 32, 3), TreeLimits(40, 4, 3, lookup=32)])
def test_trees_that_may_grow_too_large_are_refused_before_a_text(
    device: Device, tiny_full_pair: Path, tree: TreeLimits
) -> None:
    with pytest.raises(InputError, match=r"trees of .* are too large for layers on the GPU, .* or give --gpu-layers 0"):
        Engine.from_pretrained(tiny_full_pair, tree=tree, gpu_layers=1)
    with Engine.from_pretrained(tiny_full_pair, tree=TREE, gpu_layers=1) as engine:
        with pytest.raises(InputError, match="are too large for layers on the GPU"):
            engine.stream(PROMPT, 4, raw=True, tree=tree)
        engine.tree = tree
        with pytest.raises(InputError, match="are too large for layers on the GPU"):
            engine.stream(PROMPT, 4, raw=True)
        assert len(text(engine, PROMPT, 4, tree=TreeLimits(32, 40, 3, lookup=40))) == 4  # 32 nodes are no deeper
        assert len(text(engine, PROMPT, 4, tree=TreeLimits(40, 40, 1))) == 4  # a chain
    with pytest.raises(InputError, match="trees of 129 nodes and depth 4 are too large"):  # without a drafter
        FirstLayers.largest_tree.check(TreeLimits(129, 4, 3, lookup=0))
    assert device.downloads


def test_trees_that_a_grammar_makes_deep_fit_the_layers(device: Device, tiny_full_pair: Path) -> None:
    with Engine.from_pretrained(tiny_full_pair, tree=TreeLimits(60, 3, 5, lookup=0), gpu_layers=1) as engine:
        grammar = engine.constraint(regex="[ -~]{3}X{50}[a-z]{5}")
        plain = text(engine, PROMPT, 60, constraint=grammar, speculate=False)
        assert text(engine, PROMPT, 60, constraint=grammar) == plain
        assert text(engine, PROMPT, 60, constraint=grammar, tree=TreeLimits(60, 3, 1, lookup=0)) == plain
    assert device.downloads


@pytest.mark.parametrize("mixed", [False, True])
def test_the_plan_is_what_a_device_is_asked_for(tiny_target: Path, mixed: bool) -> None:
    """Weights and buffers; the activations are ONNX Runtime's own."""
    xml, device = tiny_target / "openvino_model.xml", Device()
    mix = FeatureMix((0,), np.ones((32, 32), np.float32), 1e-5) if mixed else None
    weights = list[int]()
    real = LayerSession.__init__

    def spied(self: LayerSession, graph: Any, *arguments: Any) -> None:
        weights.append(graph.weight_bytes)
        real(self, graph, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerSession, "__init__", spied)
        PagedModel(xml, take=TakeLayers(1, device, 256, texts=3), mix=mix)
    [planned] = plans(xml, device, 256, 3, mix)
    assert planned.count == 1 and planned.weights == weights[0]
    assert planned.state == pytest.approx(device.allocated, rel=0.05)


def test_auto_takes_what_the_drafter_leaves(
    device: Device, tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(tiny_full_pair)
    monkeypatch.setattr("dovetail.runtime.load.drafter_bytes", lambda *_, **__: 10**9)
    found = plans(tiny_full_pair / "target/openvino_model.xml", device, 256, 1)[0].total

    def taken(gpu_layers: int | str, vram: int) -> tuple[int, int | None]:
        take, left = first_layers(
            tiny_full_pair, manifest, gpu_layers, drafter_device="auto", vram=vram, fit=False, texts=1, threads=None
        )
        return take.count if take else 0, left

    assert taken("auto", 10**9 + found) == (1, 10**9) == taken(1, 10**9 + found)
    for given in ("auto", 1):
        with pytest.raises(DeviceError, match=r"1 layer: .* exceed .* beside the drafter: give --gpu-layers 0 or a"):
            taken(given, 10**9 + found - 1)


def test_beside_a_draft_model_the_limit_is_the_layers_alone(
    device: Device, tiny_full_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = list[bool]()

    def room(gpu: str, pair: Path, manifest: Manifest, vram: int, *, fit: bool) -> int:
        counted.append(manifest.drafter is not None)
        return 0

    monkeypatch.setattr("dovetail.runtime.load.drafter_bytes", room)
    for model in (None, tiny_full_pair):
        Engine.from_pretrained(
            tiny_full_pair, tree=TREE, gpu_layers=1, vram=10**9, draft_model=model, drafter_device="auto"
        ).close()
    assert counted == [True, False]


def test_the_most_layers_that_fit_are_taken() -> None:
    found = [LayerPlan(count, 100 * count, 10, 5, 0, 70) for count in (1, 2, 3)]
    assert [each and each.count for each in (within(found, room) for room in (114, 115, 314, 315, 999))] == [
        None, 1, 2, 3, 3,
    ]  # fmt: skip


def test_a_target_of_one_layer_has_none_for_a_gpu() -> None:
    with pytest.raises(DeviceError, match="this target has one layer, which the CPU runs: give --gpu-layers 0"):
        fitting([], None, 10**9, "")
    assert fitting([], 1, 10**9, "") == 1  # TakeLayers refuses it


def test_a_target_alone_can_have_layers_elsewhere(tiny_pair: Path) -> None:
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), take=TakeLayers(1, Device(), 256))
    assert target.layers == (1, "cpu") and target.bus_bytes == 0
