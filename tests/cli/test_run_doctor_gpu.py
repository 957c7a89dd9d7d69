"""`doctor PAIR --gpu NAME` predicts a drafter on a GPU that is not there, and calls every figure a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from dovetail.runtime.devices.cuda import PROVIDER
from dovetail.runtime.doctor import diagnose, predict, predict_layers
from dovetail.runtime.doctor.estimate import CONTEXT
from dovetail.runtime.doctor.gpus import GPUS, find_gpu
from dovetail.runtime.doctor.ranges import Range
from dovetail.runtime.drafter.vram import plan_pair
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.manifest import DrafterFacts, file_entry, read_manifest, write_manifest
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.system import machine
from dovetail.runtime.target.layers.plan import LayerPlan
from dovetail.runtime.tune.cost_cache import CostKey, Measured

GRAPH = "drafter/drafter.fp16.onnx"
KERNELS = 5
COSTS = Costs(
    Curve((128, 1024), (1, 3, 8, 32), ((16.0, 17.0, 20.0, 40.0), (20.0, 21.0, 25.0, 60.0))),
    Curve((128, 1024), (1, 4, 128), ((1.5, 1.8, 15.0), (1.8, 2.5, 20.0))),
    switch_ms=1.0,
)
DATE = "2026-11-22T14:35:47+00:00"


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines there, without importing OpenVINO; no GPU, and much memory."""
    monkeypatch.setattr(diagnose, "openvino_devices", lambda: (("CPU",), ""))
    monkeypatch.setattr(diagnose, "onnxruntime_providers", lambda: ((PROVIDER, "CPUExecutionProvider"), ""))
    monkeypatch.setattr(diagnose, "nvidia_gpus", lambda: ())
    monkeypatch.setattr(diagnose, "try_cuda", lambda: (diagnose.Cuda("13.0"), "no NVIDIA driver"))
    monkeypatch.setattr(machine, "ram_mb", lambda: (16384, 8192))
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: 20.0)


@pytest.fixture
def gpu_pair(pair: Path) -> Path:
    """`pair` with a float16 graph: five nodes that start a kernel, a view, and a size that folds."""
    graph = helper.make_graph(
        [
            *(helper.make_node("Sigmoid", [f"x{i}"], [f"x{i + 1}"]) for i in range(KERNELS - 1)),
            helper.make_node("Unsqueeze", [f"x{KERNELS - 1}", "axes"], ["view"]),
            helper.make_node("Shape", ["x0"], ["size"]),
            helper.make_node("Cast", ["size"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["view", "number"], ["y"]),
        ],
        "drafter",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["slots"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [0])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), pair / GRAPH)
    manifest = read_manifest(pair)
    assert manifest.drafter
    files = {**manifest.drafter.files, "cuda": GRAPH}
    drafter = replace(manifest.drafter, files=files, workspace=(2**20, 1024))
    entries = {**manifest.files, GRAPH: replace(file_entry(pair / GRAPH), size=2**20)}
    write_manifest(pair, replace(manifest, drafter=drafter, files=entries))
    return pair


@pytest.fixture
def measured_pair(gpu_pair: Path) -> Path:
    Measured("tiny", CostKey.of(read_manifest(gpu_pair), "cpu", None), COSTS, 4.0, DATE).store()
    return gpu_pair


@pytest.fixture
def predicted(invoke, measured_pair: Path) -> Any:
    def predicted(gpu: str, *flags: str, pair: Path = measured_pair) -> dict[str, Any]:
        result = invoke("doctor", str(pair), "--gpu", gpu, *flags, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)["prediction"]
        return found

    return predicted


@pytest.mark.parametrize(
    ("named", "label"),
    [
        ("RTX 3050 4GB", "GeForce RTX 3050 Laptop 4 GB"),
        ("rtx3050 8gib", "GeForce RTX 3050 8 GB"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "GeForce RTX 3050 Laptop 4 GB"),
        ("RTX 4060", "GeForce RTX 4060 8 GB"),
        ("rtx 4060 mobile", "GeForce RTX 4060 Laptop 8 GB"),
        ("RTX 4060Ti", "GeForce RTX 4060 Ti 16 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("a100 40gb", "A100 PCIe 40 GB"),
        ("h200", "H200 SXM 141 GB"),
        ("T4", "Tesla T4 16 GB"),
        ("AMD Radeon RX 7600", "Radeon RX 7600 8 GB"),
    ],
)
def test_a_name_is_matched_without_case_spaces_and_maker(named: str, label: str) -> None:
    assert find_gpu(named).label == label


def test_every_gpu_is_found_by_its_own_name() -> None:
    assert [find_gpu(gpu.label) for gpu in GPUS] == list(GPUS)


def test_figures_are_of_a_named_page_and_of_a_known_bus() -> None:
    assert len({gpu.source for gpu in GPUS}) == len(GPUS)
    assert all(gpu.source.startswith("https://") and gpu.pcie[0] in predict.LANE_GB_S for gpu in GPUS)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("RTX 3050", "may be several GPUs: give e.g. GeForce RTX 3050 Laptop 4 GB, GeForce RTX 3050 6 GB, GeForce"),
        ("RTX 3050 5GB", "is not among the known GPUs: give e.g. GeForce RTX 3050 Laptop 4 GB"),
        ("h100", "may be several GPUs: give e.g. H100 PCIe 80 GB, H100 SXM 80 GB"),
        ("RTX 3050 -4GB", "is not among the known GPUs"),
        ("RTX 3050 4GB 8GB", "is not among the known GPUs"),
        pytest.param(f"RTX 3050 {'9' * 5000}GB", "is not among the known GPUs", id="long"),
        ("RTX 4095", "is not among the known GPUs: give e.g. GeForce RTX 4090 24 GB"),
        ("", "is not among the known GPUs"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_one_line_with_near_names(
    invoke, gpu_pair: Path, named: str, said: str
) -> None:
    with pytest.raises(InputError, match="GPU"):
        find_gpu(named)
    result = invoke("doctor", str(gpu_pair), "--gpu", named)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_gpu_needs_a_pair(invoke) -> None:
    result = invoke("doctor", "--gpu", "T4")
    assert result.exit_code == 2 and "--gpu T4 needs a pair" in result.stderr


def test_without_the_flag_nothing_is_predicted(invoke, gpu_pair: Path) -> None:
    assert json.loads(invoke("doctor", str(gpu_pair), "--json").stdout)["prediction"] is None
    assert "predict" not in invoke("doctor", str(gpu_pair)).stdout


def test_a_call_is_the_sum_of_kernels_bytes_bus_and_host(predicted) -> None:
    found = predicted("RTX 3050 4GB")
    assert found["predicted"] is True and found["problem"] is None and found["vram"]["fits"]
    assert found["gpu"] == {
        "name": "GeForce RTX 3050 Laptop", "memory_gb": 4, "bandwidth": 192.0, "pcie": [4, 8], "capability": [8, 6],
        "source": "https://www.techpowerup.com/gpu-specs/geforce-rtx-3050-mobile.c3788",
    }  # fmt: skip
    assert found["call"]["kernels"] == KERNELS
    # Weights without a table of 32 x 16 float16, and a state of (64 + 4096) x 2 x 2 x 4 and 65 x 16; then workspace
    least = 2**20 - 32 * 16 * 2 + ((64 + 4096) * 16 + 65 * 16) * 2
    assert found["call"]["read_mb"] == {
        "least": round(least / 2**20, 1), "most": round((least + 2**20 + 1024 * 4096) / 2**20, 1),
    }  # fmt: skip
    up = 8 * (8 * 8 + 64 * 2 + 16 * 2) + 8 * 4 * (4 + 4)  # of 8 rows: indexes, mask, features; children
    for end, read in (("least", least), ("most", least + 2**20 + 1024 * 4096)):
        us = KERNELS * getattr(predict.KERNEL_US, end) + getattr(predict.HOST_US, end)
        us += read / 192e3 + up / (8 * 16 * 128 / 130 / 8 * 1e3)
        assert found["call"]["ms"][end] == round(us / 1e3, 2)


def test_a_speed_is_the_target_s_measured_pass_and_predicted_calls(predicted) -> None:
    found = predicted("RTX 3050 4GB")
    for end, speed in (("least", found["fastest"]), ("most", found["slowest"])):
        tree = speed["tree"]
        assert speed["plain_tokens_per_s"] == 62.5 and speed["measured"] == DATE
        # Four nodes as in the estimate for this machine: a pass of 17.6 ms and three calls
        assert (tree["width"], tree["verify_ms"]) == (4, 17.6)
        assert tree["draft_ms"] == pytest.approx(3 * found["call"]["ms"][end], abs=0.02)
        assert tree["acceptance_length"] == pytest.approx((17.6 + tree["draft_ms"]) / 16, abs=0.01)
    assert found["tokens_per_s"].keys() == {"2", "3"}
    slow = found["slowest"]["tree"]
    assert found["tokens_per_s"]["2"]["least"] == pytest.approx(2e3 / (17.6 + slow["draft_ms"]), abs=0.1)


def test_costs_measured_with_the_drafter_on_a_gpu_serve_too(predicted, gpu_pair: Path, cache: Path) -> None:
    for file in (cache / "costs").iterdir():
        file.unlink()
    Measured("tiny", CostKey.of(read_manifest(gpu_pair), "cuda", None), COSTS, 4.0, DATE).store()
    assert predicted("L4")["fastest"]["plain_tokens_per_s"] == 62.5


def test_a_block_is_drafted_with_one_call(predicted, measured_pair: Path) -> None:
    manifest = read_manifest(measured_pair)
    assert manifest.drafter
    write_manifest(measured_pair, replace(manifest, drafter=replace(manifest.drafter, positions=5)))
    found = predicted("L4")
    assert found["slowest"]["tree"]["draft_ms"] == pytest.approx(found["call"]["ms"]["most"], abs=0.01)


def test_without_costs_the_report_says_how_to_measure_them(invoke, gpu_pair: Path) -> None:
    result = invoke("doctor", str(gpu_pair), "--gpu", "L4", "--json")
    found = json.loads(result.stdout)["prediction"]
    assert found["call"]["ms"]["least"] > 0 and found["fastest"] is found["slowest"] is found["tokens_per_s"] is None
    said = f"{gpu_pair} --gpu-layers 0 measures them"
    assert f"dovetail-run tune {said}" in invoke("doctor", str(gpu_pair), "--gpu", "L4").stdout


def test_every_line_of_the_text_says_that_it_is_a_prediction(invoke, measured_pair: Path) -> None:
    with_it = invoke("doctor", str(measured_pair), "--gpu", "rtx 3060 12gb").stdout.splitlines()
    without = invoke("doctor", str(measured_pair)).stdout.splitlines()
    more = [line for line in with_it if line not in without]
    assert len(more) == 5 and all(line.startswith("prediction  ") for line in more)
    assert "12288 MiB are on this GPU: it fits" in more[1] and f"({KERNELS} kernels" in more[2]
    assert "acceptance length of" in more[3] and "plain decoding 62.5" in more[4]


OTHERWISE = "the drafter would run on the CPU, or there with --drafter-device {} (no time is predicted for it)"
WEBGPU, INTEL = (OTHERWISE.format(ways) for ways in ("webgpu", "webgpu or openvino-gpu"))


@pytest.mark.parametrize(
    ("gpu", "flags", "said"),
    [
        ("GTX 1060", (), f"no code for compute capability 6.1: {WEBGPU}"),
        ("RX 7600", (), f"the GPU has no CUDA: {WEBGPU}"),
        ("Arc B580", (), f"the GPU has no CUDA: {INTEL}"),
        ("L4", ("--vram", "100MB"), "does not fit 95.4 MiB of VRAM"),
    ],
)
def test_a_drafter_that_cannot_run_there_has_a_reason_and_no_times(
    invoke, predicted, measured_pair: Path, gpu: str, flags: tuple[str, ...], said: str
) -> None:
    found = predicted(gpu, *flags)
    assert said in found["problem"] and found["call"] is found["fastest"] is found["tokens_per_s"] is None
    text = invoke("doctor", str(measured_pair), "--gpu", gpu, *flags).stdout
    assert f"under CUDA the drafter does not run there: {found['problem']}" in text


def test_a_drafter_larger_than_the_gpu_does_not_fit_whatever_the_limit(predicted, measured_pair: Path) -> None:
    manifest = read_manifest(measured_pair)
    assert manifest.drafter
    huge = replace(manifest.drafter, workspace=(2**32, 0))
    write_manifest(measured_pair, replace(manifest, drafter=huge))
    for flags in ((), ("--vram", "20GB")):
        found = predicted("RTX 3050 4GB", *flags)
        assert found["vram"]["fits"] is False and "4096 MiB are on this GPU" in found["problem"]
        assert predicted("RTX 3090", *flags)["vram"]["fits"] is True


def test_a_pair_that_does_not_tell_its_vram_is_told_to_be_exported_again(predicted, measured_pair: Path) -> None:
    manifest = read_manifest(measured_pair)
    assert manifest.drafter
    write_manifest(measured_pair, replace(manifest, drafter=replace(manifest.drafter, workspace=())))
    found = predicted("L4")
    assert "export the drafter again" in found["problem"] and found["call"] is None


def test_a_pair_without_a_drafter_or_without_its_gpu_graph_is_no_error(predicted, measured_pair: Path) -> None:
    manifest = read_manifest(measured_pair)
    assert manifest.drafter
    on_cpu = replace(manifest.drafter, files={"cpu": manifest.drafter.files["cpu"]})
    for drafter, said in ((on_cpu, "no drafter for a GPU"), (None, "the pair has no drafter")):
        write_manifest(measured_pair, replace(manifest, drafter=drafter))
        found = predicted("L4")
        assert said in found["problem"] and found["vram"] is None


def test_a_graph_that_cannot_be_read_does_not_run(predicted, measured_pair: Path) -> None:
    (measured_pair / GRAPH).write_bytes(b"no graph")
    found = predicted("L4")
    assert "export the drafter again" in found["problem"] and found["call"] is None


def test_without_onnx_runtime_there_is_its_error_and_no_prediction(
    invoke, measured_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnose, "onnxruntime_providers", lambda: ((), "ONNX Runtime cannot be imported (x)"))
    monkeypatch.setattr(predict, "count_kernels", lambda *_: pytest.fail("ONNX Runtime was used"))
    result = invoke("doctor", str(measured_pair), "--gpu", "L4", "--json")
    assert result.exit_code == 7 and json.loads(result.stdout)["prediction"] is None
    assert result.stderr == "error: ONNX Runtime cannot be imported (x)\n"


@given(
    times=st.floats(1, 100),
    gpu=st.sampled_from([gpu for gpu in GPUS if gpu.capability]),
    rows=st.sampled_from((8, 128)),
)
def test_more_bandwidth_is_never_slower(times: float, gpu: Any, rows: int) -> None:
    facts = DrafterFacts(
        blocks=1, hidden_size=16, feature_size=16, target_vocab_size=32, draft_vocab_size=8, num_kv_heads=2,
        head_size=4, top_k=4, tree_slots=64, max_context=512, tokenizer_sha256="0" * 64, files={"cpu": "x"},
    )  # fmt: skip
    faster = replace(gpu, bandwidth=gpu.bandwidth * times)
    assert predict.call_ms(facts, faster, rows, 100.0, 10**7) <= predict.call_ms(facts, gpu, rows, 100.0, 10**7)


def test_the_order_of_bandwidths_is_the_order_of_speeds(predicted) -> None:
    found = sorted(
        (predicted(gpu) for gpu in ("GTX 1650", "RTX 3090", "H200")), key=lambda each: each["gpu"]["bandwidth"]
    )
    for end in ("least", "most"):
        calls = [each["call"]["ms"][end] for each in found]
        speeds = [each["tokens_per_s"]["3"][end] for each in found]
        assert calls == sorted(calls, reverse=True) and speeds == sorted(speeds)


def test_a_table_that_the_head_may_share_is_read_whole(gpu_pair: Path) -> None:
    facts = read_manifest(gpu_pair).needed_drafter
    plan = plan_pair(read_manifest(gpu_pair))
    whole = replace(facts, draft_vocab_size=facts.target_vocab_size)
    assert predict.read_bytes(whole, plan)[0] - predict.read_bytes(facts, plan)[0] == 32 * 16 * 2


def test_a_real_graph_has_fewer_kernels_than_nodes(tiny_full_pair: Path) -> None:
    facts = read_manifest(tiny_full_pair).needed_drafter
    file = tiny_full_pair / facts.files["cuda"]
    nodes = onnx.load(file, load_external_data=False).graph.node
    views = sum(node.op_type in predict.VIEWS for node in nodes)
    kernels = predict.count_kernels(file, facts.tree_slots + 1024)
    assert views > 20 and abs(kernels - (len(nodes) - views)) < 8  # sizes fold, and a Softmax is split


def test_the_guide_states_the_constants() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "gpu.md").read_text(encoding="utf-8")
    for part, constant in (("a kernel", predict.KERNEL_US), ("host and wait", predict.HOST_US)):
        assert f"| {part} | {constant.least:g} us | {constant.most:g} us |" in page


@pytest.mark.parametrize(("gpu", "way", "most"), [("RTX 4060 8GB", "cuda", 9), ("RX 7600", "webgpu", 1)])
def test_layers_of_the_target_are_predicted_within_a_limit(
    invoke, tiny_full_pair: Path, gpu: str, way: str, most: int
) -> None:
    """The share of the layers in a pass of the CPU is left out, and a call of the GPU comes in its place."""
    ask = ("doctor", str(tiny_full_pair), "--gpu", gpu, "--vram", "7GB")
    without = json.loads(invoke(*ask, "--json").stdout)["prediction"]["layers"]
    assert without["pass_ms"] is None and without["call_ms"]["least"] > 0
    Measured("tiny", CostKey.of(read_manifest(tiny_full_pair), "cpu", None), COSTS, 4.0, DATE).store()
    found = json.loads(invoke(*ask, "--json").stdout)["prediction"]["layers"]
    plain, call, passes, plan = (found[name] for name in ("plain_ms", "call_ms", "pass_ms", "plan"))
    assert found["way"] == way and plan["count"] == 1 and plan["kernels"] > 40
    least, longest = predict_layers.LAUNCH_US
    for bound, launch, moved in (("least", least, 1), ("most", longest, most)):
        reading = plan["weights"] * moved / (find_gpu(gpu).bandwidth * 1e6)
        assert -0.005 <= call[bound] - plan["kernels"] * launch / 1e3 <= reading + 0.005
        assert 0 < passes[bound] - call[bound] < plain  # what stays on the CPU
    told = invoke(*ask).stdout
    assert f"by {way} beside the drafter, first layers: 1 layer: " in told
    assert f"a plain pass then {passes['least']:g} to {passes['most']:g} ms; {plain:g} ms without a GPU" in told
    assert json.loads(invoke(*ask[:4], "--json").stdout)["prediction"]["layers"] is None


@pytest.mark.parametrize(("weights", "most"), [("int8", 90.0), ("int4", 170.0), ("fp32", 10.0)])
def test_a_larger_layer_takes_longer_the_more_it_is_copied(
    monkeypatch: pytest.MonkeyPatch, tiny_full_pair: Path, weights: str, most: float
) -> None:
    """Ten of twenty layers of 100 MB, after an embedding of 100 MB, at 100 GB/s."""
    megabytes = [LayerPlan(count, (100 + 100 * count) * 10**6, 0, 0, 10**8, 0) for count in range(1, 20)]
    monkeypatch.setattr(predict_layers, "plans", lambda *_: megabytes)
    monkeypatch.setattr(predict_layers, "drafter_bytes", lambda *_, **__: 0)
    manifest = read_manifest(tiny_full_pair)
    manifest = replace(manifest, target=replace(manifest.target, num_layers=20, weight_format=weights))
    slow = replace(find_gpu("RTX 4060 8GB"), bandwidth=100.0)
    found = predict_layers.predict_layers(tiny_full_pair, manifest, slow, 1100 * 10**6, COSTS)
    assert found.plan == megabytes[9] and found.call_ms == Range(10.0, most)
    plain = COSTS.target.at(CONTEXT, 1)
    left = plain * (1 - 1000 / 2100)  # the head reads 100 MB too
    assert found.pass_ms == Range(round(left + 10, 2), round(left + most, 2))


def test_layers_that_do_not_fit_are_told_so(invoke, tiny_full_pair: Path) -> None:
    told = invoke("doctor", str(tiny_full_pair), "--gpu", "RTX 4060 8GB", "--vram", "516MiB").stdout
    assert "no first layer of the target runs there by cuda: no layer fits beside the drafter" in told
