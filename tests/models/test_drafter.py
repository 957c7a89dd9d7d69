"""The drafter module: unrolled steps are drafting, and a checkpoint holds what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.models.checkpoint import CheckpointError
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.models.formats.dovetail import load_checkpoint, save_checkpoint

CONFIG = DrafterConfig(
    vocab_size=60,
    draft_vocab_size=24,
    hidden_size=32,
    feature_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def make_drafter(config: DrafterConfig, seed: int = 0) -> Drafter:
    torch.manual_seed(seed)
    d2t = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    embedding = torch.randn(config.vocab_size, config.hidden_size)
    return Drafter(config, embedding, embedding[d2t].clone(), d2t)


@pytest.mark.parametrize("fusion", ["dgf", "fc"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
@torch.no_grad()
def test_unrolled_steps_equal_drafting_a_chain(fusion: str, blocks: int, start: int) -> None:
    """Step j at position t is what drafting from t - j on the drafter's own features gives."""
    drafter = make_drafter(replace(CONFIG, fusion=fusion, blocks=blocks))
    features, tokens = torch.randn(2, 12, 32), torch.randint(0, 60, (2, 12))
    caches: list = [[] for _ in drafter.layers]
    steps = [drafter.step(features, tokens, caches)]
    own = torch.nn.functional.pad(steps[0], (0, 0, 1, 0))[:, start:-1]
    for _ in range(3):
        out = drafter.step(own, tokens[:, start:], caches, start)
        steps.append(torch.nn.functional.pad(out, (0, 0, start, 0)))
        own = torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]
    root = 7
    chain = features.clone()
    for j in range(1, 4):
        chain[:, root + j] = steps[j - 1][:, root + j - 1]
        drafted = drafter(chain, tokens)[:, root + j]
        torch.testing.assert_close(drafted, steps[j][:, root + j], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_rows_that_only_lend_their_keys_change_nothing_else(blocks: int) -> None:
    drafter = make_drafter(replace(CONFIG, blocks=blocks))
    features, tokens = torch.randn(2, 9, 32), torch.randint(0, 60, (2, 9))
    whole: list = [[] for _ in drafter.layers]
    lending: list = [[] for _ in drafter.layers]
    expected = drafter.step(features, tokens, whole)[:, 5:]
    torch.testing.assert_close(drafter.step(features, tokens, lending, lend=5), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(lending, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_outputs_never_see_the_future() -> None:
    drafter = make_drafter(CONFIG)
    features, tokens = torch.randn(1, 10, 32), torch.randint(0, 60, (1, 10))
    before = drafter(features, tokens)
    features[:, 6:], tokens[:, 6:] = 0, 0
    torch.testing.assert_close(drafter(features, tokens)[:, :6], before[:, :6])


@torch.no_grad()
def test_gated_fusion_is_the_papers_formula() -> None:
    """Written out with the paper's (in, out) matrices."""
    fusion = make_drafter(CONFIG).fusion
    f, e = torch.randn(5, 32), torch.randn(5, 32)
    w1, w2, wz = (getattr(fusion, name).weight.T for name in ("w1", "w2", "wz"))
    norm = (
        e
        / (e.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()
        * fusion.get_parameter("input_layernorm.weight")
    )
    h1, h2 = f @ w1, torch.nn.functional.silu(norm @ w2)
    z = torch.sigmoid(torch.cat([h1, h2], -1) @ wz)
    torch.testing.assert_close(fusion(f, e), z * h1 + (1 - z) * h2)


def test_checkpoint_round_trip_keeps_only_what_was_trained(tmp_path: Path) -> None:
    drafter = make_drafter(CONFIG)
    save_checkpoint(drafter, tmp_path, torch.float32)
    stored = load_file(tmp_path / "drafter.safetensors")
    assert set(stored) == {name for name, _ in drafter.named_parameters()} | {"d2t"}
    loaded = load_checkpoint(tmp_path, drafter.embed_tokens, drafter.embed_tokens)
    f, tokens = torch.randn(1, 6, 32), torch.randint(0, 60, (1, 6))
    torch.testing.assert_close(loaded.logits(loaded(f, tokens)), drafter.logits(drafter(f, tokens)))


@pytest.mark.parametrize("damage", ["extra key", "missing key", "shape", "truncated", "no d2t", "d2t range"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    drafter = make_drafter(CONFIG)
    save_checkpoint(drafter, tmp_path)
    path = tmp_path / "drafter.safetensors"
    tensors = load_file(path)
    if damage == "extra key":
        tensors["fc.weight"] = torch.zeros(2)
    elif damage == "missing key":
        del tensors["fusion.w1.weight"]
    elif damage == "shape":
        tensors["fusion.w1.weight"] = torch.zeros(32, 16)
    elif damage == "no d2t":
        del tensors["d2t"]
    elif damage == "d2t range":
        tensors["d2t"][0] = 60
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, drafter.embed_tokens, drafter.embed_tokens)
    assert "\n" not in str(caught.value)


def test_another_targets_head_is_refused(tmp_path: Path) -> None:
    drafter = make_drafter(CONFIG)
    save_checkpoint(drafter, tmp_path)
    other = torch.randn(80, 32)
    with pytest.raises(CheckpointError, match="use the target that it was trained for"):
        load_checkpoint(tmp_path, other, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "sum"}, "choose one of"),
        ({"blocks": 0}, "from 1 to 64"),
        ({"blocks": 2**40}, "blocks 1099511627776 is out of range"),
        ({"blocks": None}, "blocks None"),
        ({"hidden_size": "x"}, "hidden_size 'x'"),
        ({"hidden_size": -1}, "hidden_size -1"),
        ({"vocab_size": 1.5}, "vocab_size 1.5"),
        ({"vocab_size": float("inf")}, "vocab_size inf"),
        ({"intermediate_size": True}, "intermediate_size True"),
        ({"draft_vocab_size": []}, "draft_vocab_size \\[\\]"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"num_attention_heads": 10_000_000}, "num_attention_heads 10000000"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"max_position_embeddings": 10**19}, "max_position_embeddings"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"rope_theta": float("nan")}, "rope_theta nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000"),
        ({"feature_layers": None}, "feature_layers None"),
        ({"feature_layers": [0, 2.5]}, "feature_layers 2.5"),
        ({"feature_layers": [2**40]}, "feature_layers 1099511627776"),
        ({"draft_vocab_size": 61}, "1..60"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"feature_size": 64}, "lm_head"),
    ],
)
def test_configs_check_themselves(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "[1]", '{"blocks": 1}', '{"\\ud800": 1}'])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot read drafter checkpoint") as caught:
        load_checkpoint(tmp_path, torch.zeros(60, 32), torch.zeros(60, 32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"intermediate_size": 2**22, "blocks": 64}, {"head_dim": 2**14}])
def test_a_config_larger_than_memory_is_refused_by_its_tensors(tmp_path: Path, change: dict) -> None:
    rows = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size)
    d2t = torch.arange(CONFIG.draft_vocab_size)
    save_checkpoint(Drafter(CONFIG, rows, rows[d2t], d2t), tmp_path)
    replace(CONFIG, **change).save(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_checkpoint(tmp_path, rows, rows)


def test_an_unknown_config_key_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        DrafterConfig.from_dict({"colour": 1})


TARGET = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ],
    ids=["theta", "default", "llama3", "llama3, older", "linear", "yarn", "dynamic", "longrope", "by layer"],
)  # fmt: skip
def test_a_drafter_turns_by_its_targets_theta_however_the_target_scales(rope: dict) -> None:
    config = DrafterConfig.for_target({**TARGET, **rope}, 8, "dgf", 1)
    assert config == DrafterConfig.for_target({**TARGET, "rope_theta": 5e5}, 8, "dgf", 1)
    assert (config.rope_theta, config.max_position_embeddings) == (5e5, 128)
