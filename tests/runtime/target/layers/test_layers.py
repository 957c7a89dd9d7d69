"""The first layers in ONNX Runtime: the hidden states that OpenVINO computes, the same bits in any pass, few bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.devices.cuda import cuda_problem
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.exactness import largest_difference
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.graph import HIDDEN
from dovetail.runtime.target.layers import attention
from dovetail.runtime.target.layers.attention import DEPTH, NODES, ROWS, TAIL, begin, prefixes, slots_for
from dovetail.runtime.target.layers.device import LayerDevice, OrtDevice, WebGpuLayers
from dovetail.runtime.target.layers.session import LayerSession
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.draft_tree import DraftTree

CONTEXT = 256
TEXT = np.random.default_rng(5).integers(0, 200, 240)
# Without activations in 8 bits, which amplify what another order of additions rounds otherwise.
EXACT = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}


def take(**options: Any) -> TakeLayers:
    return TakeLayers(1, OrtDevice.cpu(**options), CONTEXT)


STAR = DraftTree(np.arange(30), np.array([-1, *[0] * 29]), np.zeros(30, np.float32))


def grown(seed: int, nodes: int) -> DraftTree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(int(rng.integers(max(0, node - 4), node)) for node in range(1, nodes))])
    return DraftTree(rng.integers(0, 200, nodes), parents, np.zeros(nodes, np.float32))


@pytest.fixture
def target(tiny_pair: Path) -> OpenVINOTarget:
    return OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, take=take())


CUDA = cuda_problem()
DEVICES = [
    "cpu", "compressed", "webgpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(CUDA is not None, reason=f"no GPU: {CUDA}")]),
]  # fmt: skip


@pytest.fixture
def device(request: pytest.FixtureRequest) -> LayerDevice:
    if request.param == "webgpu":
        request.getfixturevalue("swiftshader")
        return WebGpuLayers(software=True)
    return OrtDevice.cuda() if request.param == "cuda" else OrtDevice.cpu(compressed=request.param == "compressed")


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_hidden_states_are_those_of_openvino(tiny_target: Path, device: LayerDevice) -> None:
    xml = tiny_target / "openvino_model.xml"
    whole = OpenVINOTarget(PagedModel(xml, properties=EXACT, layers=[0]), CONTEXT)
    cut = PagedModel(xml, properties=EXACT, take=TakeLayers(1, device, CONTEXT))
    assert cut.front
    cut.front.open(1)
    seq = whole.open()
    for start in range(0, 240, 80):
        part = TEXT[start : start + 80]
        hidden = cut.front.read(1, start, part).hidden
        expected = whole.prefill(seq, part).features[:, : hidden.shape[1]]
        assert np.abs(expected).max() > 10  # which a difference of 1e-3 is small against
        np.testing.assert_allclose(hidden, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("context", [20, 97])
def test_a_row_has_the_same_bits_on_every_device(tiny_pair: Path, device: LayerDevice, context: int) -> None:
    take = TakeLayers(1, device, CONTEXT)
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, take=take)
    assert largest_difference(target, context) == 0


@pytest.mark.parametrize("device", DEVICES[2:], indirect=True)
def test_a_fork_on_a_gpu_copies_what_the_text_had(tiny_pair: Path, device: LayerDevice) -> None:
    take = TakeLayers(1, device, CONTEXT, texts=2)
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, take=take)
    source, tree = target.open(), grown(1, 8)
    target.prefill(source, TEXT[:70])
    found = []
    for seq in (target.fork(source, 64), target.open()):
        target.prefill(seq, TEXT[target.length(seq) : 70])
        found.append(np.array(target.verify({seq: tree})[seq].logits))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("context", [8, 31, 95, 97, 127, 128, 130, 200])
def test_a_row_has_the_same_bits_where_the_first_part_grows(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    monkeypatch.setattr(attention, "LEAST_PREFIX", 64)  # rows at positions 128 and 192 get the next size
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, take=take())
    assert largest_difference(target, context) == 0


def test_a_tail_holds_every_node_of_a_tree() -> None:
    positions = np.arange(2000)
    assert (begin(positions) <= np.maximum(positions - DEPTH, 0)).all()  # no node of a tree lies before it
    assert (positions - begin(positions) < TAIL).all()
    assert prefixes(1000) == [256, 512, 1024] and prefixes(2000)[-1] < slots_for(2000)


def test_a_tree_of_several_calls_has_the_bits_of_chains(target: OpenVINOTarget) -> None:
    tree = grown(3, 2 * ROWS + 7)
    seq = target.open()
    target.prefill(seq, TEXT[:100])
    found = np.array(target.verify({seq: tree})[seq].logits)
    for path in tree.paths():
        chain = target.verify({seq: DraftTree.chain(tree.tokens[path])})[seq].logits
        assert (chain == found[path]).all()


@pytest.mark.parametrize("nodes", [NODES + 1, DEPTH + 2])
def test_a_tree_beyond_the_bounds_is_refused(target: OpenVINOTarget, nodes: int) -> None:
    """All nodes below the root, or a chain with one more node beside it."""
    parents = np.zeros(nodes, np.int64) - (np.arange(nodes) == 0)
    if nodes < NODES:
        parents = np.append(np.arange(-1, nodes - 1), 0)
    seq = target.open()
    tree = DraftTree(np.arange(len(parents)), parents, np.zeros(len(parents), np.float32))
    with pytest.raises(InputError, match=r"is too large for layers on the GPU, .* lower --width or --depth"):
        target.verify({seq: tree})


def test_a_context_that_is_full_is_the_user_s_error_and_not_the_device_s(target: OpenVINOTarget) -> None:
    seq = target.open()
    target.prefill(seq, TEXT)
    for _ in range(2):
        with pytest.raises(ContextOverflow, match="257 tokens exceed the context of 256"):
            target.prefill(seq, TEXT[:17])
    with pytest.raises(ContextOverflow):
        target.verify({seq: DraftTree.chain(TEXT[:17])})
    target.prefill(seq, TEXT[:12])
    star = DraftTree(np.arange(40), np.array([-1, 0, 1, 2, *[0] * 36]), np.zeros(40, np.float32))
    assert len(target.verify({seq: star})[seq].logits) == 40  # more slots than the context has
    assert target.layers == (1, "cpu")


def test_a_text_whose_buffer_another_took_is_read_again(tiny_pair: Path) -> None:
    target = OpenVINOTarget.load(tiny_pair, read_manifest(tiny_pair), threads=1, take=take())
    texts = [target.open() for _ in range(3)]  # one buffer for all
    trees = {seq: grown(seq, 9) for seq in texts}
    alone = {}
    for seq in texts:
        target.prefill(seq, TEXT[seq : seq + 40])
        alone[seq] = np.array(target.verify({seq: trees[seq]})[seq].logits)
    together = {seq: np.array(each.logits) for seq, each in target.verify(trees).items()}
    for seq in texts:
        assert (together[seq] == alone[seq]).all()
        target.commit(seq, trees[seq].paths()[-1])
    again = {seq: np.array(each.logits) for seq, each in target.verify(trees).items()}
    for seq in texts:
        assert (np.array(target.verify({seq: trees[seq]})[seq].logits) == again[seq]).all()


@pytest.mark.parametrize("made", [True, False], ids=["after the call", "before the call"])
def test_a_call_with_moves_that_is_interrupted_is_made_up_for(
    target: OpenVINOTarget, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """Moves made twice would take rows of the next tree."""
    seq, tree, star = target.open(), grown(4, 12), STAR
    path = max((path for path in tree.paths() if not np.array_equal(path, np.arange(len(path)))), key=len)

    def committed() -> None:
        target.rewind(seq, 0)
        target.prefill(seq, TEXT[:40])
        target.verify({seq: tree})
        target.commit(seq, path)

    committed()
    expected = np.array(target.verify({seq: star})[seq].logits)
    committed()
    run = LayerSession.run

    def interrupted(self: LayerSession, *arguments: Any) -> Any:
        if made:
            run(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerSession, "run", interrupted)
        target.verify({seq: star})
    assert (np.array(target.verify({seq: star})[seq].logits) == expected).all()


def test_tokens_that_an_interrupted_pass_had_committed_are_dropped(target: OpenVINOTarget) -> None:
    front = target.model.front
    assert front
    front.open(7)
    expected = front.read(7, 0, TEXT[:50]).hidden
    front.rewind(7, 0)
    front.read(7, 0, TEXT[100:140])  # OpenVINO's part of this pass did not come to its end
    np.testing.assert_array_equal(front.read(7, 0, TEXT[:50]).hidden, expected)
    assert front.tokens(7).tolist() == TEXT[:50].tolist()


@pytest.mark.parametrize("norm", ["none", "each"])
def test_features_that_a_drafter_reads_of_these_layers_come_with_them(tiny_target: Path, norm: str) -> None:
    """One layer of the mix runs elsewhere, and one does not."""
    rng, xml = np.random.default_rng(1), tiny_target / "openvino_model.xml"
    mix = FeatureMix((0, 1), rng.standard_normal((32, 64)).astype(np.float32), 1e-5, norm)
    found = []
    for elsewhere in (None, take()):
        target = OpenVINOTarget(PagedModel(xml, properties=EXACT, mix=mix, take=elsewhere), CONTEXT)
        found.append(np.array(target.prefill(target.open(), TEXT[:50]).features))
    np.testing.assert_allclose(found[1], found[0], atol=1e-3 * np.abs(found[0]).max())


def test_a_mix_whose_norm_spans_layers_on_both_sides_is_refused(tiny_target: Path) -> None:
    mix = FeatureMix((0, 1), np.ones((32, 64), np.float32), 1e-5, "all")
    with pytest.raises(InputError, match="reads layer 0 normed with others: give --gpu-layers 0 or less"):
        PagedModel(tiny_target / "openvino_model.xml", mix=mix, take=take())


@pytest.mark.parametrize(("rows", "mixed"), [(1, False), (12, False), (12, True), (60, True)])
def test_few_bytes_cross_the_bus(tiny_target: Path, rows: int, mixed: bool) -> None:
    mix = FeatureMix((0,), np.ones((32, 32), np.float32), 1e-5) if mixed else None
    target = OpenVINOTarget(PagedModel(tiny_target / "openvino_model.xml", mix=mix, take=take()), CONTEXT)
    seq = target.open()
    target.prefill(seq, TEXT[:33])
    before = target.bus_bytes
    target.verify({seq: grown(1, rows)})
    assert 0 < target.bus_bytes - before < 2 * rows * 32 * 4 + 4096


def test_the_cut_graph_holds_neither_the_embedding_nor_the_layers(tiny_target: Path) -> None:
    xml = tiny_target / "openvino_model.xml"
    whole, cut = PagedModel(xml), PagedModel(xml, take=take())
    names = {name for port in cut.compiled.inputs for name in port.get_names()}
    assert HIDDEN in names and "input_ids" not in names
    assert cut.block_bytes == whole.block_bytes / 2  # the keys and values of one of two layers
    embedding = 265 * 32  # bytes
    assert constants(whole) - constants(cut) > embedding


def constants(model: PagedModel) -> int:
    """Bytes of the constants of a compiled model."""
    nodes = [node for node in model.compiled.get_runtime_model().get_ops() if kind(node) == "Const"]
    return sum(int(np.prod(node.get_output_shape(0))) * node.get_output_element_type(0).size for node in nodes)


def kind(node: Any) -> str:
    return str(node.get_rt_info()["layerType"].astype(str))


@pytest.mark.parametrize(
    ("count", "message"),
    [(2, "--gpu-layers 2 leaves no layer to the CPU: this target has 2, give 1 or fewer"), (9, "leaves no layer")],
)
def test_more_layers_than_the_target_has_are_refused(tiny_target: Path, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PagedModel(tiny_target / "openvino_model.xml", take=TakeLayers(count, OrtDevice.cpu(), CONTEXT))


@pytest.mark.parametrize("change", ["operator", "window", "tokens"])
def test_a_graph_that_cannot_be_translated_is_refused_by_name(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from openvino import opset13 as ops

    from dovetail.runtime.target import graph, paged

    messages = {
        "operator": "cannot compute HardSigmoid .* of this target: leave out --gpu-layers",
        "window": "attention, which has a sliding window, sinks or ALiBi: leave out --gpu-layers",
        "tokens": "later layers of this target read the tokens again: leave out --gpu-layers",
    }

    def changed(model: Any) -> None:
        to_paged(model)
        first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension")
        if change == "window":
            first.input(10).replace_source_output(ops.constant(np.int32(16)).output(0))
        elif change == "operator":
            swish = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Swish")
            odd = ops.hard_sigmoid(swish.input_value(0), np.float32(0.2), np.float32(0.5)).output(0)
            for reader in swish.output(0).get_target_inputs():
                reader.replace_source_output(odd)
        else:
            ids = next(port for port in model.get_parameters() if "input_ids" in port.output(0).get_names())
            last = [node for node in model.get_ordered_ops() if node.get_type_name() == "Swish"][-1]
            zero = ops.reshape(ops.multiply(ops.convert(ids, "f32"), np.float32(0)), np.array([-1, 1, 1]), False)
            last.input(0).replace_source_output(ops.add(last.input_value(0), zero).output(0))

    to_paged = graph.to_paged
    monkeypatch.setattr(paged, "to_paged", changed)
    with pytest.raises(InputError, match=messages[change]) as told:
        PagedModel(tiny_target / "openvino_model.xml", take=take())
    assert "\n" not in str(told.value)


def test_values_that_are_no_numbers_are_a_failure_of_the_device(target: OpenVINOTarget) -> None:
    assert target.model.front
    device = target.model.front._session._device  # type: ignore[attr-defined]  # the scripted fault's place
    download: Callable[..., None] = device.download

    def spoiled(to: Any, sources: Any) -> None:
        download(to, sources)
        to[HIDDEN][:] = np.nan

    device.download = spoiled
    target.model.front.open(5)
    with pytest.raises(DeviceError, match="the layers on CPU returned values that are no numbers: leave out"):
        target.model.front.read(5, 0, TEXT[:5])
