"""What OnnxDrafter cannot open or run is refused, in one typed line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is the torch drafter")

import onnx
from tests.runtime.drafter.onnx.tiny import SEQ, Tiny

from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.errors import DeviceError, InputError, PairError


def test_unusable_files_and_devices(tiny: Tiny) -> None:
    (tiny.pair / "broken.onnx").write_bytes((tiny.pair / "f32.onnx").read_bytes()[:5000])
    with pytest.raises(DeviceError, match=r"broken\.onnx"):
        tiny.open("broken.onnx")
    with pytest.raises(DeviceError, match=r"missing\.onnx"):
        tiny.open("missing.onnx")
    with pytest.raises(InputError, match="tpu"):
        open_drafter(tiny.pair, tiny.manifest("f32.onnx"), device="tpu")
    with pytest.raises(PairError, match="no drafter"):
        open_drafter(tiny.pair, replace(tiny.manifest("f32.onnx"), drafter=None))


def renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename an input or an output everywhere in the graph."""
    for names in (node.input for node in model.graph.node), (node.output for node in model.graph.node):
        for those in names:
            those[:] = [new if name == old else name for name in those]
    for port in (*model.graph.input, *model.graph.output):
        port.name = new if port.name == old else port.name


def endless(model: onnx.ModelProto) -> None:
    """Put a Loop that never ends before the output `top_ids`."""
    helper, kind = onnx.helper, onnx.TensorProto
    renamed(model, "top_ids", "found_ids")
    model.graph.output[1].name = "top_ids"
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Identity", ["ids"], ["same"])], "body",
        [helper.make_tensor_value_info(name, one, ()) for name, one in (("n", kind.INT64), ("go", kind.BOOL))]
        + [helper.make_tensor_value_info("ids", kind.INT32, None)],
        [helper.make_tensor_value_info("more", kind.BOOL, ()), helper.make_tensor_value_info("same", kind.INT32, None)],
    )  # fmt: skip
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("Loop", ["", "always", "found_ids"], ["top_ids"], body=body))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: renamed(model, "features", "features\u2028"), "has no 'features'"),
        (lambda model: renamed(model, "bank", "vault"), "has no 'bank'"),
        (lambda model: renamed(model, "top_ids", "ids"), "has no 'top_ids'"),
        (lambda model: renamed(model, "kv.1.out", "kv.2.out"), "has no 'kv.1.out'"),
        (lambda model: model.graph.output.pop(), "has no 'kv.1.out'"),
        (lambda model: model.graph.input.append(model.graph.input[0]), "Duplicate|cannot load"),
        (lambda model: renamed(model, "noise", "sound"), "unknown input 'sound'"),
        (endless, "holds a Loop"),
    ],
)
def test_a_graph_of_another_kind_is_refused_when_it_is_opened(tiny: Tiny, spoil, said: str) -> None:
    model = onnx.load(tiny.pair / "f32.onnx")
    spoil(model)
    onnx.save(model, tiny.pair / "spoilt.onnx")
    with pytest.raises(DeviceError, match=said) as caught:
        tiny.open("spoilt.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"blocks": 1}, "unknown input 'kv.1'"),
        ({"blocks": 64}, "no 'kv.10'"),
        ({"num_kv_heads": 4096}, "kv.0"),
        ({"head_size": 16}, "kv.0"),
        ({"feature_size": 2**20}, "features"),
        ({"top_k": 4096}, "top_logprobs"),
        ({"tree_slots": 4096}, "tree_mask"),
        ({"draft_vocab_size": 2**24}, "noise"),
    ],
)
def test_sizes_that_are_not_the_graph_s_are_refused_before_memory_is_taken(tiny: Tiny, facts: dict, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        open_drafter(tiny.pair, tiny.manifest("f32.onnx", **facts), device="cpu", threads=1)


def test_a_context_beyond_memory_is_refused(tiny: Tiny) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 30), before[1]))
    try:
        with pytest.raises(DeviceError, match="context of 134217728 tokens does not fit into memory"):
            open_drafter(tiny.pair, tiny.manifest("f32.onnx", max_context=2**27), device="cpu", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"\xff" * 64])
def test_what_is_no_graph_is_refused(tiny: Tiny, content: bytes) -> None:
    (tiny.pair / "none.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match=r"none\.onnx") as caught:
        tiny.open("none.onnx")
    assert "\n" not in str(caught.value)


def test_a_failure_in_a_run_is_one_typed_line(
    tiny: Tiny, stream, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    session = tiny.open()
    session.extend(SEQ, stream[0][:5], stream[1][:5])
    text = session._texts[SEQ]
    text.length = 10**6  # rows far outside the buffer
    with pytest.raises(DeviceError, match="the drafter failed") as caught:
        session._extend([(text, stream[0][:1], stream[1][:1])])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
