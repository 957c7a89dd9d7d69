"""A drafter's export: rows from the target's IR, two graphs that match torch, INT8 throughout, capturable.

One tiny pair is built through the command line; the tests look at what it wrote.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import click.testing
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

import onnx
import onnx_ir as ir
import openvino as ov
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

from dovetail.exporter.cli import drafter as cli_drafter
from dovetail.exporter.drafter import export as exporting
from dovetail.exporter.drafter import int8 as onnx_int8
from dovetail.exporter.drafter.export import FILES, export_drafter, load_drafter, save
from dovetail.exporter.drafter.graph import to_onnx
from dovetail.exporter.drafter.parity import DYNAMIC_OPS, TOLERANCES, check_parity, check_static, folded
from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter, DraftModel
from dovetail.models.formats.dovetail import save_checkpoint
from dovetail.runtime.drafter.vram import BUCKETS
from dovetail.runtime.errors import ExportError, SourceError
from dovetail.runtime.pair.check import check_pair, verify_files
from dovetail.runtime.pair.layout import DATA_SUFFIX
from dovetail.runtime.pair.manifest import (
    Manifest,
    TargetFacts,
    file_entry,
    read_manifest,
    write_manifest,
)

V, H, K = 90, 32, 40
CONFIG = DrafterConfig(
    vocab_size=V, draft_vocab_size=K, hidden_size=H, feature_size=H, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, blocks=2,
)  # fmt: skip


def compressed(weight: np.ndarray, kind: str) -> ov.Output:
    """A weight [N, C] as compression writes it: (values - zero point) * scale, or a plain constant."""
    if kind in ("f32", "f16"):
        constant = ops.constant(weight.astype(np.float32 if kind == "f32" else np.float16))
        return ops.convert(constant, "f32").output(0)
    low, levels = weight.min(axis=1, keepdims=True), {"u8": 255, "u4": 15}[kind]
    scale = (weight.max(axis=1, keepdims=True) - low) / levels
    zero = np.rint(-low / scale)
    values = np.clip(np.rint(weight / scale) + zero, 0, levels).astype(np.uint8)
    dtype = ov.Type.u8 if kind == "u8" else ov.Type.u4
    shifted = ops.subtract(
        ops.convert(ops.constant(values, dtype), "f32"), ops.convert(ops.constant(zero.astype(np.uint8), dtype), "f32")
    )
    return ops.multiply(shifted, ops.constant(scale.astype(np.float32))).output(0)


def write_target(folder: Path, embed: np.ndarray, head: np.ndarray | None, kind: str, transpose_b: bool = True) -> Path:
    """The least that a target needs here: an embedding, an lm_head, a tokenizer file."""
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    table = compressed(embed, kind)
    x = ops.gather(table, ops.convert(ids, "i32"), ops.constant(np.int64(0)))
    weight = table if head is None else compressed(head, kind)
    if not transpose_b:
        weight = ops.transpose(weight, ops.constant(np.array([1, 0]))).output(0)
    logits = ops.result(ops.matmul(ops.relu(x), weight, False, transpose_b))
    logits.output(0).get_tensor().set_names({"logits"})
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(ov.Model([logits], [ids]), folder / "openvino_model.xml", compress_to_fp16=False)
    (folder / "tokenizer.json").write_text("{}")
    return folder / "openvino_model.xml"


def write_checkpoint(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    d2t = torch.randperm(V)[:K]
    save_checkpoint(Drafter(CONFIG, torch.zeros(V, H), torch.zeros(K, H), d2t), folder)
    return folder


def write_target_pair(pair: Path) -> None:
    rng = np.random.default_rng(0)
    write_target(pair / "target", rng.standard_normal((V, H)), rng.standard_normal((V, H)), "u8")
    files = {f"target/{path.name}": file_entry(path) for path in sorted((pair / "target").iterdir())}
    digest = files["target/tokenizer.json"].sha256
    facts = TargetFacts("llama", H, H, V, 1, 128, "int8", ("tap",), (1,), digest)
    stages: dict[str, dict[str, dict[str, object]]] = {"target": {"inputs": {}, "facts": {}}}
    write_manifest(pair, Manifest("tiny", facts, None, files, provenance={"stages": stages}))


def run_cli(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli_drafter.command, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "tiny"
    write_target_pair(folder)
    result = run_cli(folder, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output + str(result.exception)
    return folder


@pytest.fixture(scope="module")
def drafter(pair: Path, checkpoint: Path) -> Drafter:
    module = load_drafter(checkpoint, pair / "target")
    assert isinstance(module, Drafter)
    return module


def test_the_command_makes_a_whole_pair(pair: Path) -> None:
    manifest = read_manifest(pair)
    check_pair(manifest)
    verify_files(pair, manifest)
    assert manifest.drafter is not None
    assert manifest.drafter.files == {"cuda": "drafter/drafter.fp16.onnx", "cpu": "drafter/drafter.int8.onnx"}
    assert (manifest.drafter.blocks, manifest.drafter.draft_vocab_size, manifest.drafter.top_k) == (2, K, 10)
    names = {"config.json", *(graph + suffix for graph in FILES.values() for suffix in ("", DATA_SUFFIX))}
    assert {file.name for file in (pair / "drafter").iterdir()} == names
    assert manifest.provenance["drafter"]["checkpoint"]


def test_another_drafter_needs_force(pair: Path, tmp_path: Path) -> None:
    before = (pair / "dovetail.json").read_bytes()
    result = run_cli(pair, "--checkpoint", write_checkpoint(tmp_path / "other", seed=1))
    assert isinstance(result.exception, ExportError)
    assert "--force" in str(result.exception)
    assert (pair / "dovetail.json").read_bytes() == before


@pytest.mark.parametrize(("device", "precision"), [("cuda", "float16"), ("cpu", "int8")])
@pytest.mark.parametrize("seed", [1, 2])
def test_files_match_torch(pair: Path, drafter: Drafter, device: str, precision: str, seed: int) -> None:
    file = pair / "drafter" / FILES[device]
    report = check_parity(drafter, file, TOLERANCES[precision], tree_slots=exporting.TREE_SLOTS, seed=seed)
    assert report.failures == ()
    assert report.top1 >= (1.0 if device == "cuda" else 0.8)


@pytest.mark.parametrize(("name", "part"), [("block_quantize", 0), ("block_quantize", 1), ("quantize_rows", 0)])
def test_parity_sees_a_mistake_of_the_quantiser(
    pair: Path, drafter: Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: int
) -> None:
    right, file = getattr(onnx_int8, name), tmp_path / FILES["cpu"]

    def wrong(*arguments: object) -> tuple[np.ndarray, ...]:
        found = list(right(*arguments))
        found[part] = found[part] * np.float32(2) if part else found[part][::-1].copy()
        return tuple(found)

    monkeypatch.setattr(onnx_int8, name, wrong)
    onnx_int8.quantize(model := to_onnx(drafter, torch.float32, tree_slots=64, top_k=10))
    save(model, file)
    assert check_parity(drafter, file, TOLERANCES["int8"], tree_slots=64).failures


def test_a_drafter_that_magnifies_rounding_is_not_taken_for_a_mistake(
    pair: Path, checkpoint: Path, tmp_path: Path
) -> None:
    sharp, tolerance = load_drafter(checkpoint, pair / "target"), TOLERANCES["int8"]
    assert isinstance(sharp, DraftModel)
    with torch.no_grad():
        for module in sharp.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 2
    file = tmp_path / FILES["cpu"]
    onnx_int8.quantize(model := to_onnx(sharp, torch.float32, tree_slots=64, top_k=10))
    save(model, file)
    assert check_parity(sharp, file, replace(tolerance, int8=False), tree_slots=64).failures
    assert not check_parity(sharp, file, tolerance, tree_slots=64).failures
    with torch.no_grad():
        weight = sharp.get_parameter("layers.0.mlp.up_proj.weight")
        weight.copy_(weight.flip(0))
    assert check_parity(sharp, file, tolerance, tree_slots=64).failures


@pytest.mark.parametrize("broken", ["layers.1.self_attn.k_proj", "layers.0.mlp.up_proj", "fusion.wz"])
def test_parity_sees_a_wrong_weight(pair: Path, checkpoint: Path, broken: str) -> None:
    other = load_drafter(checkpoint, pair / "target")
    assert isinstance(other, DraftModel)
    with torch.no_grad():
        parameter = other.get_parameter(f"{broken}.weight")
        parameter.copy_(parameter.flip(0))
    report = check_parity(other, pair / "drafter" / FILES["cuda"], TOLERANCES["float16"], tree_slots=64)
    assert report.failures


def test_parity_sees_a_wrong_draft_vocabulary(pair: Path, drafter: Drafter) -> None:
    other = Drafter(CONFIG, drafter.embed_tokens, drafter.head, drafter.d2t.roll(1))
    other.load_state_dict(drafter.state_dict())
    report = check_parity(other, pair / "drafter" / FILES["cuda"], TOLERANCES["float16"], tree_slots=64)
    assert report.failures


def test_every_linear_layer_and_the_embedding_are_int8(pair: Path, drafter: Drafter) -> None:
    model = onnx.load(pair / "drafter" / FILES["cpu"])
    linears = sum(isinstance(module, torch.nn.Linear) for module in drafter.modules()) + 1  # and the head
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["MatMulNBits"] == linears
    assert counts["Gemm"] == 0
    assert counts["MatMul"] == 2 * CONFIG.blocks  # attention: no weights
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and not t.name.endswith(".scale")]
    assert all(np.prod(tensor.dims) <= CONFIG.hidden_size for tensor in floats)  # norms and scalars


@pytest.mark.parametrize("name", FILES.values())
def test_weights_lie_beside_the_graph(pair: Path, name: str) -> None:
    """So that they are mapped: of the embedding only what is looked up comes into memory."""
    model = onnx.load(pair / "drafter" / name, load_external_data=False)
    [table] = [tensor for tensor in model.graph.initializer if tensor.dims == [V, H]]
    assert table.data_location == TensorProto.EXTERNAL


def test_float16_file_holds_no_float32_weight(pair: Path) -> None:
    model = onnx.load(pair / "drafter" / FILES["cuda"])
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[1] > 1}
    assert kinds == {TensorProto.FLOAT16}


@pytest.mark.parametrize("tokens", BUCKETS)
def test_every_bucket_is_static_and_free_of_control_flow(pair: Path, tokens: int) -> None:
    check_static(pair / "drafter" / FILES["cuda"], tokens=tokens, slots=64 + 128)


# Operators for which ONNX Runtime has CUDA kernels in the types used here (its docs/OperatorKernels.md, opset 20).
CUDA_KERNELS = {
    "Add", "Cast", "Concat", "Cos", "Div", "Exp", "Gather", "Gemm", "Less", "LogSoftmax", "MatMul", "Mul", "Neg", "Pow",
    "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "ScatterND", "Sigmoid", "Sin", "Slice", "Softmax",
    "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.mark.parametrize("tokens", BUCKETS)
def test_no_node_of_any_bucket_is_left_to_the_cpu(pair: Path, tokens: int) -> None:
    """What is placed where only a GPU can tell, and the session refuses; here: nothing without a CUDA kernel."""
    graph = folded(pair / "drafter" / FILES["cuda"], tokens, slots=64 + 128).graph
    assert {node.op_type for node in graph.node} <= CUDA_KERNELS
    assert not {node.domain for node in graph.node} - {"", "ai.onnx"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_onnx_runtime_computes_a_norm_in_one_node(pair: Path, tmp_path: Path, device: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(str(pair / "drafter" / FILES[device]), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    assert "SimplifiedLayerNormalization" in kinds and "ReduceMean" not in kinds


def test_fixing_slots_alone_leaves_no_shape_arithmetic(pair: Path, tmp_path: Path) -> None:
    """One CUDA session serves all buckets: only `tokens` is free there, and nothing may compute with it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.add_free_dimension_override_by_name("slots", 192)
    ort.InferenceSession(str(pair / "drafter" / FILES["cuda"]), options, providers=["CPUExecutionProvider"])
    ops_left = {node.op_type for node in onnx.load(tmp_path / "folded.onnx", load_external_data=False).graph.node}
    assert not ops_left & DYNAMIC_OPS


def test_a_data_dependent_graph_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens"])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [1, None])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"], name="which")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "dynamic.onnx")
    with pytest.raises(ExportError, match="NonZero 'which'"):
        check_static(tmp_path / "dynamic.onnx", tokens=8, slots=8)


def linear_graph(behind_transpose: bool) -> ir.Model:
    """y = x W^T, written in a way that the INT8 writer does not know."""
    weight = numpy_helper.from_array(np.ones((6, 4) if behind_transpose else (4, 6), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "t" if behind_transpose else "w"], ["y"], name="layer")]
    if behind_transpose:
        nodes.insert(0, helper.make_node("Transpose", ["w"], ["t"]))
    shapes: tuple[tuple[str, list[str | int]], ...] = (("x", ["n", 4]), ("y", ["n", 6]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("behind_transpose", [True, False])
def test_a_linear_layer_that_stays_float_fails_the_export(behind_transpose: bool) -> None:
    with pytest.raises(ExportError, match="'layer' kept its float weights"):
        onnx_int8.quantize(linear_graph(behind_transpose))


@pytest.mark.parametrize("columns", [32, 40, 7])
def test_block_quantisation_is_within_half_a_step(columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    weight[0] = 0
    values, scales = onnx_int8.block_quantize(weight, 32)
    restored = ((values.astype(np.float32) - 128) * scales[..., None]).reshape(5, -1)[:, :columns]
    steps = np.repeat(scales, 32, axis=1)[:, :columns]
    assert (np.abs(restored - weight) <= steps * 0.501).all()


def test_a_failed_check_leaves_nothing_behind(
    pair: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(drafter: object, device: str, folder: Path, *_: object) -> None:
        for file in (pair / "drafter").glob(f"{FILES[device]}*"):
            shutil.copyfile(file, folder / file.name)

    monkeypatch.setattr(exporting, "_write", copy)
    other = write_checkpoint(tmp_path / "other", seed=3)  # the files are another drafter's: parity must fail
    with pytest.raises(ExportError, match="differs from torch") as caught:
        export_drafter(other, pair / "target", tmp_path / "out" / "drafter")
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in FILES.values())  # all failures, not the first
    assert list((tmp_path / "out" / "drafter").iterdir()) == []
    said: list[str] = []
    facts = export_drafter(
        checkpoint, pair / "target", tmp_path / "out" / "drafter", progress=lambda stage, *_: said.append(stage)
    )
    assert facts == replace(facts, files={d: f"drafter/{n}" for d, n in FILES.items()})
    assert any("first child" in line for line in said)


def test_an_interrupt_while_torch_is_loaded_ends_the_export_at_once() -> None:
    """torch's export asks for torch._dynamo in an except clause, which loads all of it after an interrupt."""
    code = """
import importlib.abc, sys, torch
from dovetail.exporter.drafter import graph
from dovetail.models.drafter import Drafter
from dovetail.models.config import DrafterConfig
class Interrupting(importlib.abc.MetaPathFinder):
    asked = 0
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo.symbolic_convert":
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt
sys.meta_path.insert(0, finder := Interrupting())
drafter = Drafter(DrafterConfig(9, 9, 8, 8, 8, 2, 2, 4, 64), torch.zeros(9, 8), torch.zeros(9, 8), torch.arange(9))
try:
    graph.to_onnx(drafter, torch.float32, tree_slots=64, top_k=10)
except KeyboardInterrupt:
    print(finder.asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_unusable_checkpoints_are_source_errors(pair: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        load_drafter(tmp_path / "nowhere", pair / "target")
    small = np.ones((V - 1, H), np.float32)
    write_target(tmp_path / "small", small, None, "f32")
    with pytest.raises(SourceError, match="target"):
        load_drafter(checkpoint, tmp_path / "small")
    (tmp_path / "small" / "openvino_model.xml").write_text("<net>")
    with pytest.raises(ExportError, match="cannot read"):
        load_drafter(checkpoint, tmp_path / "small")


@pytest.mark.parametrize("kind", ["f32", "f16", "u8", "u4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("transpose_b", [True, False])
def test_rows_come_back_from_any_weight_format(tmp_path: Path, kind: str, tied: bool, transpose_b: bool) -> None:
    rng = np.random.default_rng(0)
    embed, head = rng.standard_normal((2, 20, 8)).astype(np.float32)
    xml = write_target(tmp_path, embed, None if tied else head, kind, transpose_b)
    got_embed, got_head = read_embedding_and_head(xml)
    step = {"f32": 1e-7, "f16": 2e-3, "u8": 6 / 255, "u4": 6 / 15}[kind]
    np.testing.assert_allclose(got_embed, embed, atol=step)
    np.testing.assert_allclose(got_head, embed if tied else head, atol=step)
    assert got_embed.dtype == got_head.dtype == np.float32


def test_a_target_without_an_embedding_is_refused(tmp_path: Path) -> None:
    x = ops.parameter([-1, 8], np.float32, name="inputs_embeds")
    x.output(0).get_tensor().set_names({"inputs_embeds"})
    logits = ops.result(ops.matmul(x, ops.constant(np.ones((20, 8), np.float32)), False, True))
    logits.output(0).get_tensor().set_names({"logits"})
    ov.save_model(ov.Model([logits], [x]), tmp_path / "openvino_model.xml")
    with pytest.raises(ExportError, match="input_ids"):
        read_embedding_and_head(tmp_path / "openvino_model.xml")
