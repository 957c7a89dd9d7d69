"""A pair opened with another pair's target as its drafter: OpenVINO on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError, MismatchError, PairError
from dovetail.runtime.pair.manifest import file_entry, read_manifest, write_manifest
from dovetail.runtime.tree.limits import TreeLimits

pytestmark = pytest.mark.usefixtures("quick_costs")
PROMPT = "the quick brown fox"
Merges = tuple[tuple[str, str], ...]
MORE: Merges = (("t", "h"), ("h", "e"), ("i", "n"), ("th", "e"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes pairs of tiny Llamas by the order of their ids, their merges, and their weights; each once."""

    @cache
    def make(order: int | None = None, merges: Merges = (("t", "h"),), seed: int = 0, context: int = 256) -> Path:
        from dovetail.exporter.build.progress import quiet
        from dovetail.exporter.target.export import export_target

        folder, pair = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("pair") / "small"
        with quiet():
            import torch
            from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
            from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

            pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
            ids = np.random.default_rng(order).permutation(len(pieces)) if order else np.arange(len(pieces))
            tokenizer = Tokenizer(models.BPE({piece: int(i) for piece, i in zip(pieces, ids, strict=True)}, [*merges]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
            torch.manual_seed(seed)
            config = LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=len(pieces) + 1, max_position_embeddings=context, bos_token_id=len(pieces),
                eos_token_id=len(pieces), tie_word_embeddings=False, initializer_range=0.5,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            rows = torch.from_numpy(np.argsort([*ids, len(pieces)]))  # the piece that each id names
            for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
                weight.data = weight.data[rows].contiguous()
            model.save_pretrained(folder)
        export_target(str(folder), pair)
        return pair

    return make


def strangers(pair: Path, copy: Path) -> Path:
    """A copy of `pair` whose tokenizer calls every token by twice its name."""
    shutil.copytree(pair, copy)
    file, manifest = copy / "target" / "tokenizer.json", read_manifest(pair)
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {piece * 2: number for piece, number in content["model"]["vocab"].items()}
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    entry = file_entry(file)
    facts = {**vars(manifest.target), "tokenizer_sha256": entry.sha256}
    files = {**manifest.files, "target/tokenizer.json": entry}
    write_manifest(copy, type(manifest)(manifest.name, type(manifest.target)(**facts), None, files))
    return copy


@pytest.mark.parametrize("tree", [None, TreeLimits(width=10, depth=4, top_k=2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_drafts_for_itself(tiny_pair: Path, tree: TreeLimits | None, temperature: float) -> None:
    with Engine.from_pretrained(tiny_pair, draft_model=tiny_pair, tree=tree) as engine:
        assert engine.drafter_device == "CPU (draft model)" and engine.drafter_note == "draft model tiny"
        drafted = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2)
        plain = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2, speculate=False)
    assert drafted.token_ids == plain.token_ids
    if tree:  # a tiny target is as quick as its drafter: a scheduler drafts little
        assert drafted.metrics.acceptance_length > (4 if temperature == 0 else 1.5)


def test_costs_are_kept_for_the_two_models(tiny_pair: Path, quick_costs: Path) -> None:
    for _ in range(2):
        Engine.from_pretrained(tiny_pair, draft_model=tiny_pair).close()
    keys = [json.loads(file.read_text())["key"] for file in (quick_costs / "costs").iterdir()]
    assert [key["drafter"] == f"{key['target']}, 256 tokens" for key in keys if key["device"] == "model"] == [True]


@pytest.mark.parametrize("tree", [TreeLimits(width=10, depth=4, top_k=2, lookup=0), TreeLimits(width=6, top_k=1)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_model_by_other_ids_drafts_as_well(
    models: Callable[..., Path], tree: TreeLimits, temperature: float
) -> None:
    rounds, target = list[tuple[int, ...]](), models()
    for own in (target, models(order=7)):
        with Engine.from_pretrained(target, draft_model=own, tree=tree) as engine:
            drafted = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2)
            plain = engine.generate(PROMPT, 80, raw=True, temperature=temperature, seed=2, speculate=False)
            note = engine.drafter_note
        assert drafted.token_ids == plain.token_ids
        rounds.append((drafted.metrics.rounds, drafted.metrics.drafted, drafted.metrics.accepted))
    assert rounds[0] == rounds[1] and rounds[0][2] > 40
    assert note == "draft model small with 258 of the target's 258 tokens"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("theirs", "ours", "tree"),
    [(MORE, (("h", "e"),), TreeLimits(width=10, depth=4, top_k=2, lookup=0)), ((("h", "e"),), MORE, None)],
)
def test_a_model_with_other_tokens_changes_no_text(
    models: Callable[..., Path], theirs: Merges, ours: Merges, tree: TreeLimits | None, temperature: float
) -> None:
    """Its context is smaller too, so that it starts over within the answer."""
    own = models(order=3, merges=ours, seed=1, context=64)
    with Engine.from_pretrained(models(merges=theirs), draft_model=own, tree=tree) as engine:
        assert engine.drafter_note == f"draft model small with 258 of the target's {257 + len(theirs)} tokens"
        for prompt in (PROMPT, f"{PROMPT} the then in the inn", "then"):
            drafted = engine.generate(prompt, 80, raw=True, temperature=temperature, seed=2)
            plain = engine.generate(prompt, 80, raw=True, temperature=temperature, seed=2, speculate=False)
            assert drafted.token_ids == plain.token_ids
            assert drafted.metrics.drafted > 0 or tree is None


def test_too_few_common_tokens_are_told_before_the_model_is_opened(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = strangers(tiny_pair, tmp_path / "other")
    monkeypatch.delattr("dovetail.runtime.load.OpenVINOTarget")
    with pytest.raises(MismatchError, match="the draft model knows 0% of the target's tokens") as told:
        Engine.from_pretrained(tiny_pair, draft_model=other)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("flags", [{"drafter_device": "cuda"}, {"vram": "1GB"}, {"vram": "1GB", "fit": True}])
def test_flags_of_a_gpu_are_refused(tiny_pair: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a draft model runs on the CPU"):
        Engine.from_pretrained(tiny_pair, draft_model=tiny_pair, **flags)
    with pytest.raises(PairError, match="has no drafter"):
        Engine.from_pretrained(tiny_pair, **flags)


def test_a_draft_model_that_is_no_pair_is_named(tiny_pair: Path, tmp_path: Path) -> None:
    for given, problem in (
        (tmp_path / "none", "does not exist"), (str(tmp_path), "is no pair"), ("./none", "does not exist"),
        ("somebody/model", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(
            PairError, match=f"{Path(given)} {problem}: give the folder that dovetail-export draft-model"
        ) as told:
            Engine.from_pretrained(tiny_pair, draft_model=given)
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="draft model 3 is no path: give the folder of a pair"):
        Engine.from_pretrained(tiny_pair, draft_model=3)  # type: ignore[arg-type]  # what is tested
