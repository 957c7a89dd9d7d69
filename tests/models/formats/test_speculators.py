"""speculators' own EAGLE-3 model, saved by itself, drafts the same as the module that Dovetail reads.

Its forward pass unrolls drafting over a text whose tokens it is given; DraftModel.step does the same.
Runs where the package `speculators` is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")
theirs = pytest.importorskip("speculators.models.eagle3", reason="the comparison needs the package speculators")

from tests.models.formats.test_eagle3 import D, K, V, target_parts
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from dovetail.models.drafter import DraftModel
from dovetail.models.formats.registry import find_checkpoint
from dovetail.models.layers import StepCache

STEPS = 4
SIZES: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": V, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "attn_implementation": "eager",
}  # fmt: skip
THETA = {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}
LLAMA3 = {
    "rope_parameters": {
        "rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}  # fmt: skip
# name -> the blocks' config, settings of the drafter
SETTINGS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(num_hidden_layers=1, **SIZES), {}),
    "llama, llama3 RoPE": (LlamaConfig(num_hidden_layers=1, **SIZES, **LLAMA3), {}),
    "llama, biases": (LlamaConfig(num_hidden_layers=1, attention_bias=True, mlp_bias=True, **SIZES), {}),
    "llama, two layers": (LlamaConfig(num_hidden_layers=2, **SIZES, **THETA), {}),
    "qwen3": (Qwen3Config(num_hidden_layers=1, **SIZES), {}),
    "qwen3, two layers": (Qwen3Config(num_hidden_layers=2, **SIZES, **THETA), {"norm_output": True}),
    "normed residual": (LlamaConfig(num_hidden_layers=1, **SIZES), {"norm_before_residual": True}),
    "norm before fc": (LlamaConfig(num_hidden_layers=1, **SIZES), {"norm_before_fc": True}),
    "fc norms": (LlamaConfig(num_hidden_layers=1, **SIZES), {"fc_norm": True}),
    "normed output": (LlamaConfig(num_hidden_layers=1, **SIZES), {"norm_output": True, "fc_norm": True}),
    "all tokens": (LlamaConfig(num_hidden_layers=1, **SIZES), {"draft_vocab_size": V}),
    "five layers of the target": (
        LlamaConfig(num_hidden_layers=1, **SIZES), {"eagle_aux_hidden_state_layer_ids": [1, 2, 4, 6, 7]}
    ),
}  # fmt: skip


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_unrolled_step_is_that_of_speculators(name: str, tmp_path: Path) -> None:
    layer, settings = SETTINGS[name]
    settings = {"draft_vocab_size": K, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], **settings}
    torch.manual_seed(0)
    model = theirs.Eagle3DraftModel(theirs.Eagle3SpeculatorConfig(transformer_layer_config=layer, **settings)).eval()
    for key, parameter in model.named_parameters():
        parameter.copy_(torch.rand(parameter.shape) + 0.5 if "norm" in key else torch.randn(parameter.shape) * 0.25)
    if settings["draft_vocab_size"] < V:
        ids = torch.randperm(V)[:K].sort().values
        t2d = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
        model.load_vocab_mappings(t2d, ids - torch.arange(K))
    model.save_pretrained(tmp_path)

    heads: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output[0]))
    taps = torch.randn(12, len(settings["eagle_aux_hidden_state_layer_ids"]) * D)
    tokens = torch.randint(0, V, (12,))
    model(taps[None], tokens[None], torch.zeros(1, 12, dtype=torch.long), ttt_steps=STEPS)

    ours = find_checkpoint(tmp_path).read(target_parts({})).eval()
    assert isinstance(ours, DraftModel)
    f, worst = ours.read(taps)[None], 0.0
    caches: list[StepCache] = [[] for _ in ours.blocks()]
    for step in range(STEPS):
        f = ours.step(f, tokens[None], caches)
        got, want = ours.logits(f[0, step:]), heads[step][: len(tokens) - step]
        worst = max(worst, float((got - want).abs().max()))
        f = torch.nn.functional.pad(f, (0, 0, 1, 0))[:, :-1]
    print(f"{name}: largest difference {worst:.1e}, logits of deviation {torch.cat(heads).std():.2f}")
    assert worst < 1e-4 and torch.cat(heads).std() > 0.1
