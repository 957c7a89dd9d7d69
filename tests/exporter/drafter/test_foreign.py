"""Drafters of other projects through the whole path: command line, graphs, the target's layers, text."""

from __future__ import annotations

import shutil
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
from dovetail.exporter.drafter.export import load_drafter
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget

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
    "EAGLE, bias": (eagle.safeai(**VOCAB), eagle.weights(eagle.FLAGS, vocab=263, fc_bias=True), ()),
    "research code": (
        eagle.safeai(num_hidden_layers=2, **VOCAB), eagle.weights(eagle.TWO, vocab=263, gated=True, rows=False), (),
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


@torch.no_grad()
def test_the_runtime_reads_the_blocks_of_the_original_model(exported: Exported, tiny_llama: Path) -> None:
    """The mix in the INT8 graph against the torch mix over outputs of the float32 model's blocks."""
    tokens = np.arange(40, 60)
    target = OpenVINOTarget.load(exported.pair, read_manifest(exported.pair))
    ours = target.prefill(target.open(), tokens).features

    model, outputs = LlamaForCausalLM.from_pretrained(tiny_llama).eval(), {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: outputs.update({index: output}))
    last = model(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states[-1][0]
    taps = [outputs[layer][0] for layer in exported.layers] or [last]
    drafter = load_drafter(exported.checkpoint, exported.pair / "target")
    assert relative(ours, drafter.read(torch.cat(taps, dim=-1))) < 0.05
    if len(taps) > 1:
        assert relative(ours, drafter.read(torch.cat(taps[::-1], dim=-1))) > 0.2


def relative(ours: np.ndarray, expected: Tensor) -> float:
    want = expected.numpy()
    return float(np.linalg.norm(ours - want) / np.linalg.norm(want))
