"""Training text: what the target asks and answers, in any batch and after any stop; a bad corpus is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from dovetail.exporter.train.corpus import Corpus, TrainingText, draft_vocabulary
from dovetail.exporter.train.text import TextWriter, split
from dovetail.exporter.train.writer import (
    BatchWriter,
    bare_prefix,
    chat_prompt,
    draw,
    fingerprint,
    write_prompts,
)
from dovetail.runtime.errors import TrainError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.target.paged import Batch, PagedModel
from dovetail.runtime.text.tokenizer import Tokenizer


def test_a_batch_writes_what_each_sequence_writes_alone(model: PagedModel) -> None:
    """Continuous batching changes the order of answers, not one token of them."""
    rng = np.random.default_rng(1)
    requests = [Request(tuple(map(int, rng.integers(0, 200, n))), 12) for n in (3, 9, 5, 7, 4)]
    together = set(BatchWriter(model, [7], slots=3, max_length=40).write(requests, rng))
    alone = {c for r in requests for c in BatchWriter(model, [7], slots=2, max_length=40).write([r], rng)}
    assert together == alone
    assert all(c.tokens[-1] == 7 or len(c.tokens) - c.prompt_length == 12 for c in together)


def by_hand(model: PagedModel, requests: list[Request], slots: int, stop: int, rng: Any) -> Iterator[TrainingText]:
    """Continuous batching on passes that are put together here: a slot has two blocks, and draws in its turn."""
    waiting, held = iter(requests), list[Any]([None] * slots)
    model.reserve(2 * slots)
    while True:
        held = [slot or next(([request, list(request.prompt), 0] for request in waiting), None) for slot in held]
        if not (active := [(index, slot) for index, slot in enumerate(held) if slot]):
            return
        new = [tokens[cached:] for _, (_, tokens, cached) in active]
        begins = np.cumsum([0, *map(len, new)]).astype(np.int32)
        batch = Batch(
            tokens=np.concatenate(new).astype(np.int64),
            positions=np.concatenate([np.arange(cached, len(tokens)) for _, (_, tokens, cached) in active]),
            past=np.array([cached for _, (_, _, cached) in active], np.int32),
            begins=begins,
            blocks=np.concatenate([[2 * index, 2 * index + 1] for index, _ in active]).astype(np.int32),
            block_begins=np.arange(0, 2 * len(active) + 1, 2, dtype=np.int32),
            wanted=(begins[1:] - 1).astype(np.int64),
        )
        logits, _ = model.run(batch)
        for row, (index, slot) in enumerate(active):
            request, tokens, _ = slot
            slot[2] = len(tokens)
            heat = request.sampling.temperature
            tokens.append(draw(logits[row], heat, rng) if heat else int(logits[row].argmax()))
            if tokens[-1] == stop or len(tokens) - len(request.prompt) == request.max_new_tokens:
                held[index] = None
                yield TrainingText(tuple(tokens), len(request.prompt))


def test_a_seed_gives_the_text_of_passes_that_are_put_together_by_hand(model: PagedModel) -> None:
    """Text for training stays what it was: the same rows in every pass, and the same draws for the same tokens."""
    rng = np.random.default_rng(2)
    requests = [
        Request(tuple(rng.integers(0, 200, n).tolist()), 20, SamplingParams(temperature=(n % 3) / 2))
        for n in rng.integers(2, 30, 24)
    ]
    writer = BatchWriter(model, [7], slots=5, max_length=64)
    written = list(writer.write(requests, np.random.default_rng(9)))
    assert written == list(by_hand(model, requests, 5, 7, np.random.default_rng(9))) and len(written) == 24


def test_the_target_writes_its_own_prompts(tiny_pair: Path, model: PagedModel) -> None:
    """From the bare chat prefix and an opening; only texts that the target itself ended count, each once."""
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    writer = BatchWriter(model, range(0, 258, 20), slots=8, max_length=128)
    seen: set[str] = set()
    prompts = list(write_prompts(writer, tokenizer, ["", "the cat"], 20, np.random.default_rng(3), seen))
    assert prompts and all(len(prompt) >= 16 for prompt in prompts)
    assert len({fingerprint(prompt) for prompt in prompts}) == len(prompts) == len(seen)
    assert 0 < sum(prompt.startswith("the cat") for prompt in prompts) < len(prompts)
    assert not list(write_prompts(writer, tokenizer, ["", "the cat"], 20, np.random.default_rng(3), seen))


def test_a_later_part_asks_what_an_unbroken_run_asked(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the target wrote beyond a part's share counts as never written, also in memory."""
    written = iter(range(10_000))
    kinds: list[set[str]] = []

    def ask(writer: Any, tokenizer: Any, openings: Any, count: int, rng: Any, seen: set[str]) -> list[str]:
        kinds.append(set(seen))
        prompts = [f"prompt number {next(written)}" for _ in range(count)]
        seen.update(map(fingerprint, prompts))
        return prompts

    monkeypatch.setattr("dovetail.exporter.train.text.write_prompts", ask)
    monkeypatch.setattr("dovetail.exporter.train.text.PART_PROMPTS", 6)
    writer = text_writer(tiny_pair, tmp_path)
    parts = writer.own(12, [""])
    assert [len(part.corpus) for part in parts] == [6, 6]
    kept = json.loads((tmp_path / "own-0000.prompts.json").read_text())
    assert kinds[1] == set(map(fingerprint, kept))


def test_prompts_without_time_are_told_of_and_left_out(tiny_pair: Path, tmp_path: Path) -> None:
    told: list[str] = []
    writer = text_writer(tiny_pair, tmp_path, lambda stage, done, total, note: told.append(note))
    parts = writer.answers([f"say {i}" for i in range(200)], seconds=0.01)
    assert [len(part.corpus) for part in parts] == [64]
    assert "no time for the last 136 prompts" in told
    again = text_writer(tiny_pair, tmp_path).answers([f"say {i}" for i in range(200)], seconds=0.01)
    assert [part.name for part in again] == [part.name for part in parts]


def text_writer(pair: Path, folder: Path, progress: Any = lambda *told: None) -> TextWriter:
    tokenizer = Tokenizer.from_folder(pair / "target")
    xml = pair / "target" / "openvino_model.xml"
    return TextWriter(folder, folder, 0, tokenizer, lambda: BatchWriter(PagedModel(xml), [7]), 0, 8, progress)


def test_a_prompt_is_encoded_as_the_engine_encodes_it(tiny_pair: Path) -> None:
    """A tokenizer that adds a BOS to raw text must not add a second one to a rendered template."""
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    inner = tokenizer._backend
    inner.post_processor = processors.TemplateProcessing(single="th $A", special_tokens=[("th", 0)])
    asked = chat_prompt(tokenizer, "hi")
    assert asked == tuple(tokenizer.encode_chat([{"role": "user", "content": "hi"}]))
    assert len(tokenizer.encode("hi")) == 1 + len(tokenizer.encode("hi", add_special_tokens=False))
    assert asked[: len(bare_prefix(tokenizer))] == bare_prefix(tokenizer)


def test_a_given_corpus_is_cut_into_parts(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.exporter.train.text.PART_TOKENS", 100)
    corpus = Corpus.load(corpus_file)
    parts = split("given-0", corpus)
    assert len(parts) > 5 and len({part.name for part in parts}) == len(parts)
    assert np.array_equal(np.concatenate([part.corpus.tokens for part in parts]), corpus.tokens)
    assert all(len(part.corpus.tokens) <= 100 for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 12), int)}, "no list"),
        ({"tokens": np.full(24, -3)}, "token -3"),
        ({"lengths": np.array([12, 13])}, "add up to 25"),
        ({"prompt_lengths": np.array([0, 4])}, "conversation 0"),
        ({"prompt_lengths": np.array([4, 40])}, "40 prompt tokens of 12"),
    ],
)
def test_a_corpus_checks_itself(change: dict[str, Any], message: str) -> None:
    whole = {"tokens": np.arange(24), "lengths": np.array([12, 12]), "prompt_lengths": np.array([4, 4])}
    with pytest.raises(TrainError, match=message):
        Corpus(**{**whole, **change})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"])
def test_a_file_that_is_no_corpus_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(TrainError, match=r"bad\.npz"):
        Corpus.load(tmp_path / "bad.npz")


def test_an_array_is_no_corpus(tmp_path: Path) -> None:
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.arange(4))
    with pytest.raises(TrainError, match=r"array\.npz"):
        Corpus.load(tmp_path / "array.npz")


def test_the_draft_vocabulary_is_what_answers_use_most() -> None:
    corpus = Corpus.of([TrainingText((9, 9, 9, 9, 5, 5, 3), 4), TrainingText((8, 5, 3, 3), 1)])
    assert draft_vocabulary(corpus, 2, 20).tolist() == [3, 5]
    assert draft_vocabulary(corpus, 4, 20).tolist() == [3, 5, 8, 9]
    assert draft_vocabulary(corpus, 6, 20).tolist() == [0, 1, 3, 5, 8, 9]
    with pytest.raises(TrainError, match="another target"):
        draft_vocabulary(corpus, 2, 9)
