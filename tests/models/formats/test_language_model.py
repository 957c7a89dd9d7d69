"""Language models as drafters equal transformers' own forward pass; what is not one of them is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from dovetail.models.checkpoint import CheckpointError, UnknownFormat
from dovetail.models.formats import language_model
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.models.language import LanguageDrafter
from dovetail.models.layers import StepCache

V = 60  # the target's vocabulary
TARGET = {"hidden_size": 48, "num_hidden_layers": 5, "vocab_size": V}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "vocab_size": V, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A config class of transformers, and what differs from SIZES."""

    config: type[PreTrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "Llama": Kind(LlamaConfig),
    "Llama, tied": Kind(LlamaConfig, {"tie_word_embeddings": True}),
    "Llama, biases": Kind(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "Llama, scaled RoPE": Kind(LlamaConfig, {"rope_parameters": LLAMA3}),
    "Llama, more rows": Kind(LlamaConfig, {"vocab_size": V + 7}),
    "Llama, more rows, tied": Kind(LlamaConfig, {"vocab_size": V + 7, "tie_word_embeddings": True}),
    "Llama, fewer rows": Kind(LlamaConfig, {"vocab_size": V - 7}),
    "Llama, fewer rows, tied": Kind(LlamaConfig, {"vocab_size": V - 7, "tie_word_embeddings": True}),
    "Llama, one group, wide heads": Kind(LlamaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
    "Mistral": Kind(MistralConfig, {"sliding_window": None}),
    "Mistral, a window beyond the context": Kind(MistralConfig, {"sliding_window": 128}),
    "Qwen2": Kind(Qwen2Config),
    "Qwen2, tied": Kind(Qwen2Config, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "Qwen3": Kind(Qwen3Config),
    "Qwen3, tied, biases": Kind(Qwen3Config, {"tie_word_embeddings": True, "attention_bias": True}),
}


def write(folder: Path, kind: Kind) -> Path:
    """A model of this kind with random weights, none of them 0 or 1, as transformers saves it."""
    torch.manual_seed(1)
    config = kind.config(**{**SIZES, **kind.settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.copy_(torch.rand_like(value) + 0.5 if "norm" in name else torch.randn_like(value) * 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = write(tmp_path_factory.mktemp("model"), KINDS[name])
        return folders[name]

    return make


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def read(folder: Path) -> LanguageDrafter:
    """The drafter for a target of another width, whose rows are of no use."""
    module = find_checkpoint(folder).read(TargetParts(TARGET, torch.zeros(0), torch.zeros(0)))
    assert isinstance(module, LanguageDrafter)
    return module.eval()


def logits(module: LanguageDrafter, tokens: Tensor) -> Tensor:
    """Logits [T, K] after each of the tokens [T]. The features are noise that nobody may read."""
    return module.logits(module(torch.randn(1, len(tokens), module.shape.feature_size) * 100, tokens[None]))[0]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", KINDS)
def test_the_drafter_computes_what_transformers_does(name: str, made: Callable[[str], Path]) -> None:
    folder = made(name)
    module, model = read(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    drafts = min(V, model.config.vocab_size)
    tokens = torch.randint(0, drafts, (40,), generator=torch.Generator().manual_seed(2))
    want = model(tokens[None]).logits[0, :, :drafts]
    got = logits(module, tokens)
    assert got.shape == (40, drafts) and module.embed_tokens.shape == (V, 32)
    assert (got - want).abs().max() < 1e-4 * want.std()
    assert module.d2t.tolist() == list(range(drafts))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["Llama, biases", "Qwen2, tied", "Qwen3"])
def test_a_chain_is_drafted_as_transformers_writes_it(name: str, made: Callable[[str], Path]) -> None:
    """Unrolled steps, in which a drafted token attends to the drafted tokens before it."""
    folder = made(name)
    module, model = read(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    known = torch.tensor([7, 3, 11, 5, 2])
    want = model.generate(known[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(known) :]
    chain = list[int]()
    for depth in range(6):
        tokens = torch.cat([known, torch.tensor(chain, dtype=torch.long)])[None]
        x = torch.zeros(1, len(known) + depth, 32)
        caches: list[StepCache] = [[] for _ in module.blocks()]
        for _ in range(depth + 1):
            x = module.step(x.roll(1, dims=1), tokens, caches)
        chain.append(int(module.logits(x[0, -1]).argmax()))
    assert chain == want.tolist()


def test_rows_that_only_one_of_both_has_are_left_out(made: Callable[[str], Path]) -> None:
    for name in ("Llama, fewer rows", "Llama, fewer rows, tied"):
        module = read(made(name))
        assert module.shape.draft_vocab_size == V - 7 and not module.embed_tokens[V - 7 :].any()
    found = find_checkpoint(made("Llama, more rows"))
    (choice,) = found.needs(TARGET).choices
    assert choice == f"vocab_size {V + 7} is not the target's {V}: it drafts the first {V} tokens"
    assert find_checkpoint(made("Llama")).needs(TARGET).choices == ()


def test_a_narrower_drafter_proposes_its_tokens_alone(made: Callable[[str], Path]) -> None:
    module = read(made("Llama, tied"))
    small = module.narrowed(torch.arange(V) % 3 == 0)
    assert small.d2t.tolist() == list(range(0, V, 3)) and small.shape.draft_vocab_size == V // 3
    assert small.embed_tokens is module.embed_tokens


def test_the_format_is_named(made: Callable[[str], Path]) -> None:
    found = find_checkpoint(made("Qwen2"))
    assert (found.format.name, found.description) == ("language-model", "a language model (Qwen2ForCausalLM)")
    needs = found.needs(TARGET)
    assert (needs.vocab_size, needs.draft_vocab_size, needs.layers, needs.max_context) == (V, V, (), 128)


Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return damage


def put(name: str, make: Callable[[Tensor], Tensor]) -> Damage:
    return tensors(lambda content: content.update({name: make(content[name]).contiguous()}))


Q, Q_BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.bias"
# what is wrong -> kind, damage, part of the message
DAMAGED: dict[str, tuple[str, Damage, str]] = {
    "a tensor is missing": ("Llama", tensors(lambda held: held.pop(Q)), "layers.1.self_attn.q_proj.weight is missing"),
    "a bias is missing": ("Qwen2", tensors(lambda held: held.pop(Q_BIAS)), "layers.2.self_attn.q_proj.bias is missing"),
    "a norm of heads is missing": (
        "Qwen3", tensors(lambda held: held.pop("model.layers.0.self_attn.k_norm.weight")), "k_norm.weight is missing"
    ),
    "the head is missing": ("Llama", tensors(lambda held: held.pop("lm_head.weight")), "lm_head.weight is missing"),
    "a tensor is left over": (
        "Llama", tensors(lambda held: held.update({"model.layers.0.x": torch.ones(2)})), "layers.0.x is left over"
    ),
    "biases that the architecture lacks": ("Llama, biases", config(attention_bias=False), "bias is left over"),
    "a wrong shape": ("Llama", put(Q, lambda x: x[:-1]), "layers.1.self_attn.q_proj.weight is [31, 32], not [32, 32]"),
    "other rows than the config's": ("Llama", config(vocab_size=V + 1), f"embed_tokens.weight is [{V}, 32]"),
    "other rows of the head": ("Llama", put("lm_head.weight", lambda x: x[1:]), f"lm_head.weight is [{V - 1}, 32]"),
    "NaN": ("Llama", put(Q, lambda x: x * torch.nan), "holds values that are no numbers"),
    "whole numbers": ("Llama", put(Q, lambda x: x.to(torch.int8)), "is I8"),
    "a tied head of its own": ("Llama", config(tie_word_embeddings=True), "lm_head in "),
    "more layers than weights": ("Llama", config(num_hidden_layers=60), "is missing"),
    "an absurd number of layers": ("Llama", config(num_hidden_layers=2**40), "num_hidden_layers 1099511627776"),
    "an absurd width": ("Llama", config(intermediate_size=2**22), "does not fit its config"),
    "a sliding window": ("Mistral", config(sliding_window=64), "sliding_window 64 is not supported: give the model to"),
    "a window that Qwen2 uses": (
        "Qwen2", config(use_sliding_window=True, sliding_window=64), "sliding_window 64 is not supported"
    ),
    "a default window that Qwen2 uses": (
        "Qwen2", config(use_sliding_window=True, sliding_window=4096, max_position_embeddings=8192),
        "sliding_window 4096 is not supported",
    ),
    "a window that is a text": ("Mistral", config(sliding_window="64"), "sliding_window '64' is out of range"),
    "layers of another kind": (
        "Qwen3", config(layer_types=["linear_attention", "full_attention", "full_attention"]), "layer_types ['linear"
    ),
    "a RoPE for each kind of layer": (
        "Llama", config(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "RoPE by kind of layer"
    ),
    "an activation": ("Llama", config(hidden_act="gelu"), "'gelu' is not supported: give the model to dovetail-run"),
    "a RoPE that depends on the length": (
        "Llama", config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "RoPE 'dynamic'"
    ),
    "a switch that is a text": ("Llama", config(tie_word_embeddings="no"), "tie_word_embeddings 'no'"),
    "quantised": ("Llama", config(quantization_config={"quant_method": "gptq"}), "is a quantised checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    name, damage, said = DAMAGED[case]
    folder = shutil.copytree(made(name), tmp_path / "model")
    damage(folder)
    with pytest.raises((CheckpointError, ValueError)) as error:
        read(folder)
    message = str(error.value)
    assert said in message and "\n" not in message and len(message.replace(str(tmp_path), "")) < 500


def test_mistral_without_a_window_in_its_config_has_transformers_default(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers leaves 4096 out of no config, but hand-written configs do."""
    folder = shutil.copytree(made("Mistral"), tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    content.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 8192}))
    with pytest.raises(ValueError, match="sliding_window 4096 is not supported"):
        read(folder)


def test_a_model_that_the_machine_cannot_convert_is_refused(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "ram_mb", lambda: (0, 0))
    with pytest.raises(ValueError, match=r"0.0 billion parameters take about .* GB .*: give the model to dovetail-run"):
        read(made("Llama"))


@pytest.mark.parametrize("kind", ["Gemma2ForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"])
def test_another_architecture_is_refused_with_the_other_way(
    kind: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(made("Llama"), tmp_path / "model")
    config(architectures=[kind])(folder)
    with pytest.raises(UnknownFormat, match=r"a language model of another architecture.*--draft-model"):
        find_checkpoint(folder)
