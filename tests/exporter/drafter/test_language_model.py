"""A small language model as the drafter of a pair: the command line from end to end, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tests.exporter.drafter.test_malformed import digest
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from dovetail.exporter.cli.main import main
from dovetail.exporter.drafter.export import FILES, load_drafter
from dovetail.exporter.drafter.parity import TOLERANCES, check_parity
from dovetail.models.drafter import DraftModel
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.cli.inspect import inspect
from dovetail.runtime.doctor.estimate import estimate_pair
from dovetail.runtime.errors import MismatchError, SourceError
from dovetail.runtime.pair.manifest import read_manifest

TREE = TreeLimits(width=10, depth=4, top_k=2, lookup=0)
PROMPT = "the quick brown fox"
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 3}}
SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": None,
}  # fmt: skip
# Of another width than the target's 32, and with other padding than its 263 rows for 259 tokens.
OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Qwen2, tied, more rows": (Qwen2Config, {"vocab_size": 272, "tie_word_embeddings": True}),
    "Qwen3, fewer rows": (Qwen3Config, {"vocab_size": 259, "tie_word_embeddings": False}),
    "Llama, as many rows": (LlamaConfig, {"vocab_size": 263, "tie_word_embeddings": False, "attention_bias": True}),
}


def small_model(folder: Path, tokenizer: Path, kind: str) -> Path:
    """A model with the tokenizer of another folder."""
    made, settings = OTHERS[kind]
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(made(**{**SIZES, **settings}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    model.save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_copy_of_the_target_is_accepted_nearly_always(language_pair: Path, sampling: str) -> None:
    options = SAMPLINGS[sampling]
    with Engine.from_pretrained(language_pair, drafter_device="cpu", tree=TREE) as engine:
        drafted = engine.generate(PROMPT, max_new_tokens=100, raw=True, **options)
        plain = engine.generate(PROMPT, max_new_tokens=100, raw=True, speculate=False, **options)
    assert drafted.token_ids == plain.token_ids and plain.metrics.drafted == 0
    # A round that accepts all has 5 tokens: 4 levels of the tree, and the target's own.
    assert drafted.metrics.acceptance_length > (4 if sampling == "greedy" else 3)


def test_the_pair_passes_its_check_and_says_what_it_is(language_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = read_manifest(language_pair).needed_drafter
    assert facts.reads_tokens and facts.blocks == 2 and not facts.feature_layers and "features" not in facts.files
    capsys.readouterr()
    assert main(["check", str(language_pair)]) == 0
    assert "a language model (LlamaForCausalLM)" in capsys.readouterr().out
    said = CliRunner().invoke(inspect, [str(language_pair)]).output
    assert "a language model (LlamaForCausalLM), 2 block(s), hidden 32, reads tokens alone" in said
    assert "not possible" not in said
    shown = CliRunner().invoke(inspect, [str(language_pair), "--json"]).output
    assert json.loads(shown)["drafter"]["reads_tokens"] is True


def test_doctor_estimates_its_memory(language_pair: Path) -> None:
    manifest = read_manifest(language_pair)
    sizes: dict[str, Any] = {"available_mb": 8192, "bandwidth": 20.0, "vram": None}
    on_gpu = estimate_pair(language_pair, manifest, free_vram_mb=2048, **sizes)
    assert on_gpu.drafter_device == "cuda" and on_gpu.vram and on_gpu.vram.plan
    assert on_gpu.vram.plan["context"] == 1024 and "drafter_kv" not in on_gpu.ram.parts_mb
    on_cpu = estimate_pair(language_pair, manifest, free_vram_mb=None, **sizes)
    # keys and values of 2 blocks, 2 heads of 8, in 4 bytes, of 64 tree slots and 1024 tokens
    assert on_cpu.drafter_device == "cpu"
    assert on_cpu.ram.parts_mb["drafter_kv"] == pytest.approx(2 * 2 * 2 * 8 * 4 * (64 + 1024) / 2**20, abs=0.1)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_width_drafts(
    kind: str, tiny_pair: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, checkpoint = shutil.copytree(tiny_pair, tmp_path / "pair"), small_model(tmp_path / "small", tiny_llama, kind)
    rows = OTHERS[kind][1]["vocab_size"]
    assert main(["check", str(pair), str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "reads none, but tokens alone" in said and "width of layers" not in said
    assert f"{min(rows, 263)} of 263 tokens" in said
    assert main(["drafter", str(pair), "--checkpoint", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert ("setting: vocab_size" in said) == (rows != 263)
    facts = read_manifest(pair).needed_drafter
    assert (facts.hidden_size, facts.feature_size, facts.draft_vocab_size) == (48, 48, min(rows, 263))
    assert main(["check", str(pair)]) == 0
    graph = onnx.load(pair / "drafter" / FILES["cuda"], load_external_data=False).graph
    tied = OTHERS[kind][1]["tie_word_embeddings"]  # embedding and head are then one
    assert ("drafter.head" in {weight.name for weight in graph.initializer}) != tied
    for options in SAMPLINGS.values():
        with Engine.from_pretrained(pair, drafter_device="cpu", tree=TREE) as engine:
            drafted = engine.generate(PROMPT, max_new_tokens=40, raw=True, **options)
            plain = engine.generate(PROMPT, max_new_tokens=40, raw=True, speculate=False, **options)
        assert drafted.token_ids == plain.token_ids and drafted.metrics.drafted > 40


def test_the_graphs_are_compared_with_torch(language_pair: Path, soft_llama: Path) -> None:
    """A weight of the module that the file does not have shows in both files."""
    module = load_drafter(soft_llama, language_pair / "target")
    assert isinstance(module, DraftModel)
    for device, precision in (("cuda", "float16"), ("cpu", "int8")):
        file = language_pair / "drafter" / FILES[device]
        fine = check_parity(module, file, TOLERANCES[precision], tree_slots=64)
        assert not fine.failures and fine.feature_error is None
        blocks: Any = module.blocks()
        weight = blocks[1].self_attn["k_proj"].weight.data
        right = weight.clone()
        weight.copy_(right.flip(0))
        assert check_parity(module, file, TOLERANCES[precision], tree_slots=64).failures
        weight.copy_(right)


def test_a_limit_of_vram_is_kept_or_refused(
    tiny_pair: Path, soft_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """512 MiB are CUDA's own; the rest has no room for weights, keys, values and activations."""
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    assert main(["drafter", str(pair), "--checkpoint", str(soft_llama), "--vram", "513MiB"]) == 5
    assert "does not fit 513.0 MiB of VRAM" in capsys.readouterr().err
    assert read_manifest(pair).drafter is None
    assert main(["drafter", str(pair), "--checkpoint", str(soft_llama), "--vram", "520MiB"]) == 0
    assert read_manifest(pair).needed_drafter.vram == 520 << 20


def test_a_broken_tokenizer_is_the_checkpoints_own(
    tiny_pair: Path, soft_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, checkpoint = shutil.copytree(tiny_pair, tmp_path / "pair"), shutil.copytree(soft_llama, tmp_path / "small")
    (checkpoint / "tokenizer.json").write_text("{")
    assert main(["drafter", str(pair), "--checkpoint", str(checkpoint)]) != 0
    said = capsys.readouterr().err
    assert "download it again" in said and "export the target" not in said


def renamed(folder: Path) -> None:
    """Give two tokens each other's ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def test_a_changed_tokenizer_is_no_longer_the_same_drafter(
    tiny_pair: Path, soft_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, checkpoint = shutil.copytree(tiny_pair, tmp_path / "pair"), shutil.copytree(soft_llama, tmp_path / "small")
    add = ["drafter", str(pair), "--checkpoint", str(checkpoint)]
    for _ in range(2):  # the second is a no-op
        assert main(add) == 0
    assert "tokenizer.json" in read_manifest(pair).provenance["drafter"]["files"]
    renamed(checkpoint)
    capsys.readouterr()
    assert main([*add, "--force"]) == SourceError.exit_code
    assert "the same ids are other tokens" in capsys.readouterr().err


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return damage


Q = "model.layers.1.self_attn.q_proj.weight"
OTHERWISE = "give the model to dovetail-run --draft-model"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (renamed, f"does not fit the target in /target: the same ids are other tokens: {OTHERWISE}"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        f"/target: the checkpoint has no tokenizer.json to compare: {OTHERWISE}",
    ),
    "a tokenizer that is no JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"), "does not fit the target in /target: "
    ),
    "another architecture": (config(architectures=["Gemma2ForCausalLM"]), OTHERWISE),
    "a tensor is missing": (tensors(lambda held: held.pop(Q)), f"{Q.removeprefix('model.')} is missing"),
    "a tensor is left over": (tensors(lambda held: held.update(x=torch.ones(2))), "x is left over"),
    "a wrong shape": (tensors(lambda held: held.update({Q: held[Q][:-1].clone()})), "is [31, 32], not [32, 32]"),
    "NaN": (tensors(lambda held: held[Q].mul_(torch.nan)), "holds values that are no numbers"),
    "a sliding window": (
        config(sliding_window=64, use_sliding_window=True), "sliding_window 64 is not supported"
    ),
    "Mistral's sliding window": (
        config(architectures=["MistralForCausalLM"], sliding_window=64),
        f"sliding_window 64 is not supported: {OTHERWISE}",
    ),
    "no blocks": (config(num_hidden_layers=0), "num_hidden_layers 0 is out of range"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "cannot read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_draft_is_refused_and_the_pair_stays(
    case: str, tiny_pair: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = DAMAGED[case]
    folder = shutil.copytree(tiny_llama, tmp_path / "small")
    damage(folder)
    before = digest(tiny_pair)
    assert main(["drafter", str(tiny_pair), "--checkpoint", str(folder)]) == SourceError.exit_code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    message = message.replace(str(tmp_path), "").replace(str(tiny_pair.parent), "")
    assert said in message.replace("/tiny/target", "/target") and len(message) < 500
    assert digest(tiny_pair) == before and not list(tiny_pair.parent.glob(".*.build/pair/drafter"))
    if case not in ("truncated", "NaN"):  # `check` reads no values
        code = main(["check", str(tiny_pair), str(folder)])
        assert code in (SourceError.exit_code, MismatchError.exit_code)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_check_refuses_another_tokenizer_with_the_other_way(
    tiny_pair: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "small")
    renamed(folder)
    assert main(["check", str(tiny_pair), str(folder)]) == MismatchError.exit_code
    out, err = capsys.readouterr()
    assert "refused  tokenizer" in out and err.strip().endswith(f"(tokenizer): {OTHERWISE}")


def test_it_is_still_a_draft_model(tiny_llama: Path, tiny_pair: Path) -> None:
    """The folder that `dovetail-export drafter` reads is no drafter for `draft-model`, which reads models."""
    from dovetail.exporter.pairs.draft_model import check_no_drafter

    check_no_drafter(str(tiny_llama), None, tiny_llama)
    with Engine.from_pretrained(tiny_pair, draft_model=tiny_pair, tree=TREE) as engine:
        assert np.ptp(engine.generate(PROMPT, 10, raw=True).token_ids) > 0
