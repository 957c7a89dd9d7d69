"""Training: the target's own text goes in, a drafter that follows it comes out, interrupted or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors

from dovetail.exporter.corpus import Corpus, draft_vocabulary
from dovetail.exporter.evaluate import chain_acceptance
from dovetail.exporter.fit import FitOptions
from dovetail.exporter.synth import (
    BatchWriter,
    Conversation,
    Request,
    bare_prefix,
    chat_prompt,
    read_prompts,
    write_prompts,
)
from dovetail.exporter.train import TrainPlan, train
from dovetail.models import Drafter, DrafterConfig
from dovetail.runtime.errors import InputError, TrainError
from dovetail.runtime.paged import PagedModel
from dovetail.runtime.tokenizer import Tokenizer


def quiet(stage: str, done: float, total: float, note: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> PagedModel:
    return PagedModel(tiny_target / "openvino_model.xml")


@pytest.fixture(scope="module")
def corpus_file(model: PagedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 greedy conversations of the tiny target."""
    rng = np.random.default_rng(0)
    requests = [Request(tuple(map(int, rng.integers(0, 200, 6))), 0.0, 40) for _ in range(24)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    Corpus.of(BatchWriter(model, [], slots=8, max_length=64).write(requests, rng)).save(path)
    return path


def plan(corpus: Path, **changes: Any) -> TrainPlan:
    fit = FitOptions(epochs=4, unroll=2, window=48, batch=4, warmup=2, learning_rate=3e-3)
    return TrainPlan(corpora=(corpus,), draft_vocab=128, held_out=0.1, fit=fit, **changes)


def test_a_batch_writes_what_each_sequence_writes_alone(model: PagedModel) -> None:
    """Continuous batching changes the order of answers, not one token of them."""
    rng = np.random.default_rng(1)
    requests = [Request(tuple(map(int, rng.integers(0, 200, n))), 0.0, 12) for n in (3, 9, 5, 7, 4)]
    together = set(BatchWriter(model, [7], slots=3, max_length=40).write(requests, rng))
    alone = {c for r in requests for c in BatchWriter(model, [7], slots=2, max_length=40).write([r], rng)}
    assert together == alone
    assert all(c.tokens[-1] == 7 or len(c.tokens) - c.prompt_length == 12 for c in together)


def test_training_learns_and_says_so(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.CURVE_EVERY", 10)
    long = replace(plan(corpus_file), fit=FitOptions(epochs=16, unroll=2, window=48, warmup=2, learning_rate=3e-3))
    result = train(tiny_pair, tmp_path / "out", long, quiet)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["held_out"]["acceptance_length"] == result.acceptance_length
    assert log["updates"] == 16 * (22 // 4)
    first, last = log["curve"][0], log["curve"][-1]
    assert last["loss"] < 0.9 * first["loss"]
    assert all(late > early for late, early in zip(last["agreement"], first["agreement"], strict=True))
    assert load_file(tmp_path / "out" / "drafter.safetensors")["d2t"].shape == (128,)


@pytest.mark.parametrize("stage", ["features", "fit"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.train.CURVE_EVERY", 5)
    monkeypatch.setattr("dovetail.exporter.train.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("dovetail.exporter.features.PASS_TOKENS", 200)
    train(tiny_pair, tmp_path / "whole", plan(corpus_file), quiet)

    def interrupt(at: str, done: float, total: float, note: str) -> None:
        if at == stage and done > total / 4:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_pair, broken, plan(corpus_file), interrupt)
    assert not (broken / "drafter.safetensors").exists()
    with pytest.raises(TrainError, match="--resume"):
        train(tiny_pair, broken, plan(corpus_file), quiet)
    with pytest.raises(TrainError, match="other options"):
        train(tiny_pair, broken, plan(corpus_file, fusion="fc"), quiet, resume=True)
    train(tiny_pair, broken, plan(corpus_file), quiet, resume=True)
    whole, resumed = (load_file(tmp_path / name / "drafter.safetensors") for name in ("whole", "broken"))
    assert all((whole[key] == resumed[key]).all() for key in whole)
    with pytest.raises(TrainError, match="already holds a trained drafter"):
        train(tiny_pair, broken, plan(corpus_file), quiet, resume=True)


def test_the_target_writes_its_own_training_text(tiny_pair: Path, tmp_path: Path) -> None:
    """Prompts alone go in; the answers are the target's."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, quiet)
    corpus = Corpus.load(tmp_path / "out" / "work" / "corpus.npz")
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    assert len(corpus) == 12
    starts = corpus.offsets
    texts = {tokenizer.decode(list(corpus.tokens[starts[i] : starts[i] + corpus.prompt_lengths[i]])) for i in range(12)}
    assert len(texts) == 12 and all("say" in text for text in texts)
    assert tokenizer.decode(list(bare_prefix(tokenizer)), skip_special_tokens=False).endswith("user\n")


def test_a_prompt_too_long_to_answer_is_told_of(tiny_pair: Path, tmp_path: Path) -> None:
    prompts, told = tmp_path / "prompts.jsonl", []
    rows = [{"prompt": f"say {i}"} for i in range(8)] + [{"prompt": "x" * 1000}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, lambda stage, done, total, note: told.append(note))
    assert len(Corpus.load(tmp_path / "out" / "work" / "corpus.npz")) == 8
    assert any(note.startswith("1 left out") for note in told)


def test_a_target_that_is_given_nothing_writes_its_prompts(tiny_pair: Path, model: PagedModel) -> None:
    """From the bare chat prefix; only texts that the target itself ended count, each once."""
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    writer = BatchWriter(model, range(0, 258, 20), slots=8, max_length=128)
    seen: list[int] = []
    prompts = write_prompts(writer, tokenizer, 5, np.random.default_rng(3), seen.append)
    assert len(prompts) == len(set(prompts)) == 5 <= len(seen)
    assert all(len(prompt) >= 16 for prompt in prompts)


def test_a_prompt_is_encoded_as_the_engine_encodes_it(tiny_pair: Path) -> None:
    """A tokenizer that adds a BOS to raw text must not add a second one to a rendered template."""
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    inner = tokenizer._backend
    inner.post_processor = processors.TemplateProcessing(single="th $A", special_tokens=[("th", 0)])
    asked = chat_prompt(tokenizer, "hi")
    assert asked == tuple(tokenizer.encode_chat([{"role": "user", "content": "hi"}]))
    assert len(tokenizer.encode("hi")) == 1 + len(tokenizer.encode("hi", add_special_tokens=False))
    assert asked[: len(bare_prefix(tokenizer))] == bare_prefix(tokenizer)


@torch.no_grad()
def test_held_out_acceptance_is_what_drafting_each_chain_gives() -> None:
    """Against a plain loop that drafts every chain token by token."""
    torch.manual_seed(0)
    config = DrafterConfig(20, 4, 16, 16, 24, 2, 1, 8, 64)
    rows = torch.randn(20, 16)
    drafter = Drafter(config, rows, rows[:4], torch.arange(4))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 16)).astype(np.float16)
    tokens = rng.integers(0, 4, 24)
    corpus = Corpus(tokens, np.array([24]), np.array([6]))
    depth, kept, starts = 3, 0, range(5, 24 - 1 - 3)
    for start in starts:
        f = torch.from_numpy(features[: start + 1].astype(np.float32))[None]
        fed = torch.from_numpy(tokens[1 : start + 2])[None]
        for step in range(depth):
            out = drafter(f, fed)[:, -1:]
            token = int(drafter.logits(out).argmax())
            if token != tokens[start + step + 2]:
                break
            kept += 1
            f, fed = torch.cat([f, out], 1), torch.cat([fed, torch.tensor([[token]])], 1)
    found = chain_acceptance(drafter, corpus, features, depth)
    assert found.positions == len(starts)
    assert kept > 0
    assert found.acceptance_length == pytest.approx(1 + kept / len(starts))


def test_the_draft_vocabulary_is_what_answers_use_most() -> None:
    corpus = Corpus.of([Conversation((9, 9, 9, 9, 5, 5, 3), 4), Conversation((8, 5, 3, 3), 1)])
    assert draft_vocabulary(corpus, 2, 20).tolist() == [3, 5]
    assert draft_vocabulary(corpus, 4, 20).tolist() == [3, 5, 8, 9]
    assert draft_vocabulary(corpus, 6, 20).tolist() == [0, 1, 3, 5, 8, 9]
    with pytest.raises(TrainError, match="another target"):
        draft_vocabulary(corpus, 2, 9)


@pytest.mark.parametrize("row", ["{", "[]", '{"prompt": ""}', '{"prompt": 3}', '{"turns": []}', '{"question": "x"}'])
def test_a_bad_prompt_row_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + row + "\n")
    with pytest.raises(InputError, match=r"prompts\.jsonl line 3\b"):
        read_prompts(path)


def test_bad_plans_and_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to train on"):
        TrainPlan()
    with pytest.raises(TrainError, match="minutes 0"):
        TrainPlan(own_prompts=1, minutes=0)
    with pytest.raises(TrainError, match="unroll 0"):
        FitOptions(unroll=0)
    with pytest.raises(TrainError, match="epochs nan"):
        FitOptions(epochs=float("nan"))
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(TrainError, match="cannot read corpus"):
        Corpus.load(tmp_path / "bad.npz")
