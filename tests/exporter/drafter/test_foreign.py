"""Drafters of other projects through the whole path: command line, graphs, the target's layers, text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from tests.models.formats import test_eagle as eagle
from tests.models.formats import test_eagle3 as eagle3
from torch import Tensor
from transformers import LlamaForCausalLM

from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter.export import FILES, load_drafter
from dovetail.exporter.drafter.parity import GraphRun
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.models.drafter import DraftModel
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel

VOCAB = {"vocab_size": 263}
TREE = TreeLimits(width=8, depth=4, top_k=3, lookup=0)
QWEN3 = {"model_type": "qwen3", "num_hidden_layers": 2, **VOCAB}
# name -> config, tensors, blocks of the target that it reads
FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Tensor], tuple[int, ...]]] = {
    "EAGLE-3": (
        eagle3.safeai(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 0]}, **VOCAB),
        eagle3.weights(eagle3.FLAGS, taps=2, vocab=263, embed=False), (1, 0),
    ),
    "EAGLE-3.1": (
        eagle3.safeai(
            fc_norm=True, norm_output=True, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]}, **VOCAB
        ),
        eagle3.weights(eagle3.FLAGS, taps=2, vocab=263, fc_norm=True), (0, 1),
    ),
    "speculators, two Qwen3 blocks": (
        eagle3.speculators(layer=QWEN3, norm_before_fc=True, eagle_aux_hidden_state_layer_ids=[1, 2]),
        eagle3.weights(replace(eagle3.ZERO, layers=2), taps=2, vocab=263, qk_norm=True, input_norm=True), (0, 1),
    ),
    "EAGLE, bias": (eagle.safeai(**VOCAB), eagle.weights(eagle3.FLAGS, vocab=263, fc_bias=True), ()),
    "research code": (
        eagle.safeai(**VOCAB), eagle.weights(eagle3.FLAGS, vocab=263, gated=True, rows=False), (),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A pair with a drafter of another project. layers: blocks of the target that the drafter reads."""

    pair: Path
    checkpoint: Path
    layers: tuple[int, ...]


@pytest.fixture(scope="module", params=FOREIGN)
def exported(request: pytest.FixtureRequest, tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`tiny_pair` with the drafter, added and compared with torch by the command line."""
    config, tensors, layers = FOREIGN[request.param]
    folder = tmp_path_factory.mktemp("foreign")
    checkpoint, pair = eagle3.write(folder / "drafter", config, tensors), folder / "pair"
    shutil.copytree(tiny_pair, pair)
    assert main(["drafter", str(pair), "--checkpoint", str(checkpoint)]) == 0
    return Exported(pair, checkpoint, layers)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_pair_passes_its_check(exported: Exported) -> None:
    assert main(["check", str(exported.pair)]) == 0
    facts = read_manifest(exported.pair).drafter
    assert facts and facts.feature_layers == exported.layers


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_its_text_is_that_of_plain_decoding(exported: Exported, sampling: dict[str, Any]) -> None:
    with Engine.from_pretrained(exported.pair, drafter_device="cpu", tree=TREE) as engine:
        drafted = engine.generate("the cat", max_new_tokens=40, raw=True, **sampling)
        plain = engine.generate("the cat", max_new_tokens=40, raw=True, speculate=False, **sampling)
    assert drafted.token_ids == plain.token_ids
    assert drafted.metrics.drafted > 40 and plain.metrics.drafted == 0


@pytest.mark.usefixtures("no_grad")
def test_the_runtime_reads_the_blocks_of_the_original_model(exported: Exported, tiny_llama: Path) -> None:
    """The mix in the graph against the torch mix over the blocks' outputs, of the graph and of the float32 model.

    INT8 weights move the tiny random model's last feature, which no mix touches, by 7%.
    """
    tokens = np.arange(40, 60)
    target = OpenVINOTarget.load(exported.pair, read_manifest(exported.pair))
    ours = target.prefill(target.open(), tokens).features

    model, outputs = LlamaForCausalLM.from_pretrained(tiny_llama).eval(), {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: outputs.update({index: output}))
    last = model(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states[-1][0]
    taps = [outputs[layer][0] for layer in exported.layers] or [last]
    drafter = load_drafter(exported.checkpoint, exported.pair / "target")
    assert isinstance(drafter, DraftModel)
    assert relative(ours, drafter.read(torch.cat(taps, dim=-1))) < 0.1
    if len(taps) > 1:
        wide = OpenVINOTarget(PagedModel(exported.pair / "target" / "openvino_model.xml", layers=exported.layers), 256)
        read = torch.from_numpy(wide.prefill(wide.open(), tokens).features[:, : 32 * len(taps)].copy())
        assert relative(ours, drafter.read(read)) < 0.01
        assert relative(ours, drafter.read(torch.cat(taps[::-1], dim=-1))) > 0.2


def relative(ours: np.ndarray, expected: Tensor) -> float:
    want = expected.numpy()
    return float(np.linalg.norm(ours - want) / np.linalg.norm(want))


@pytest.mark.usefixtures("no_grad")
def test_a_chain_is_accepted_as_far_after_the_export_as_before(tiny_pair: Path, tmp_path: Path) -> None:
    """The float16 graph on the runtime's features against torch on outputs of the target's blocks.

    The head is fitted to the target's own text, so that chains of all lengths are accepted.
    """
    with Engine.from_pretrained(tiny_pair) as engine:
        text = np.array(engine.generate("the cat", max_new_tokens=60, raw=True, speculate=False).token_ids)
    config = eagle3.safeai(
        fc_norm=True, norm_output=True, draft_vocab_size=263, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]},
        **VOCAB,
    )  # fmt: skip
    tensors = eagle3.weights(eagle3.FLAGS, taps=2, vocab=263, draft=263, fc_norm=True)
    checkpoint = eagle3.write(tmp_path / "drafter", config, tensors)
    wide = OpenVINOTarget(PagedModel(tiny_pair / "target" / "openvino_model.xml", layers=(0, 1)), 256)
    taps = torch.from_numpy(wide.prefill(wide.open(), text).features[:, :64].copy())
    known = torch.from_numpy(text)
    drafter = load_drafter(checkpoint, tiny_pair / "target")
    assert isinstance(drafter, DraftModel)
    g = drafter(drafter.read(taps)[None, :-2], known[None, 1:-1])[0]  # g[t] is to predict text[t + 2]
    wanted = torch.nn.functional.one_hot(known[2:], 263).float()
    tensors["lm_head.weight"] = (torch.linalg.lstsq(g, wanted).solution.T * 10).contiguous()
    eagle3.write(tmp_path / "drafter", config, tensors)
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    add_drafter(checkpoint, pair)

    drafter = load_drafter(checkpoint, pair / "target")
    assert isinstance(drafter, DraftModel)
    target = OpenVINOTarget.load(pair, read_manifest(pair))
    features = target.prefill(target.open(), text).features
    before, after = [], []
    for start in range(8, len(text) - 4):
        want = text[start + 1 : start + 4].tolist()
        logits = eagle3.drafted(drafter, taps[:start], known[1 : start + 1], 3)
        before.append(accepted([int(step.argmax()) for step in logits], want))
        graph = GraphRun(pair / "drafter" / FILES["cuda"], drafter, 64, np.zeros((1, 263), np.float32))
        answer = graph.extend(text[1 : start + 1], features[:start], last=True)
        chain = [int(answer.ids[0, 0])]
        for depth in (1, 2):
            rows, seen = [depth], [list(range(1, depth + 1))]
            answer = graph.level(rows, [depth - 1], np.array(chain[-1:]), depth, seen)
            chain.append(int(answer.ids[0, 0]))
        after.append(accepted(chain, want))
    assert before == after
    assert len(set(before)) > 1  # the comparison is of lengths that differ


def accepted(chain: list[int], want: list[int]) -> int:
    """How many tokens of a chain are the target's."""
    return next((index for index, pair in enumerate(zip(chain, want, strict=True)) if pair[0] != pair[1]), len(want))
