"""Training: the target's own text goes in, a drafter that follows it comes out, interrupted or not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors

from dovetail.exporter.corpus import Conversation, Corpus, draft_vocabulary
from dovetail.exporter.evaluate import evaluate
from dovetail.exporter.features import FeatureStore, Part, to_float16
from dovetail.exporter.fit import Batches, FitOptions, unrolled_loss
from dovetail.exporter.overlap import Forbidden
from dovetail.exporter.synth import (
    BatchWriter,
    Request,
    bare_prefix,
    chat_prompt,
    fingerprint,
    write_prompts,
)
from dovetail.exporter.text import TextWriter, split
from dovetail.exporter.train import TrainPlan, train
from dovetail.models import Drafter, DrafterConfig
from dovetail.runtime.errors import TrainError
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
    monkeypatch.setattr("dovetail.exporter.fitting.CURVE_EVERY", 10)
    long = replace(plan(corpus_file), fit=FitOptions(epochs=16, unroll=2, window=48, warmup=2, learning_rate=3e-3))
    result = train(tiny_pair, tmp_path / "out", long, quiet)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["held_out"]["acceptance_length"] == result.acceptance_length
    assert log["updates"] == 16 * (23 // 4)
    assert len([point for point in log["curve"] if "held_out" in point]) >= 4
    assert log["curve"][-1]["held_out"] == round(result.acceptance_length, 3)
    assert (tmp_path / "out" / "calibration.json").exists()
    first, last = log["curve"][0], log["curve"][-1]
    assert last["loss"] < 0.9 * first["loss"]
    assert all(late > early for late, early in zip(last["agreement"], first["agreement"], strict=True))
    assert load_file(tmp_path / "out" / "drafter.safetensors")["d2t"].shape == (128,)


@pytest.mark.parametrize("stage", ["features", "fit"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny_pair: Path, corpus_file: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.fitting.CURVE_EVERY", 5)
    monkeypatch.setattr("dovetail.exporter.fitting.SAVE_SECONDS", 0.0)
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
    corpus = Corpus.load(tmp_path / "out" / "work" / "text" / "answers-0000.npz")
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    assert len(corpus) == 12
    starts = corpus.offsets
    texts = {tokenizer.decode(list(corpus.tokens[starts[i] : starts[i] + corpus.prompt_lengths[i]])) for i in range(12)}
    assert len(texts) == 12 and all("say" in text for text in texts)
    assert tokenizer.decode(list(bare_prefix(tokenizer)), skip_special_tokens=False).endswith("user\n")


def test_text_interrupted_goes_on_to_the_same_text(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.exporter.text.PART_PROMPTS", 6)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)

    def interrupt(stage: str, done: float, total: float, note: str) -> None:
        if stage == "answers" and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_pair, tmp_path / "broken", made, interrupt)
    train(tiny_pair, tmp_path / "broken", made, quiet, resume=True)
    train(tiny_pair, tmp_path / "whole", made, quiet)
    whole, broken = (load_file(tmp_path / name / "drafter.safetensors") for name in ("whole", "broken"))
    assert all((whole[key] == broken[key]).all() for key in whole)


def test_a_prompt_too_long_to_answer_is_told_of(tiny_pair: Path, tmp_path: Path) -> None:
    prompts, told = tmp_path / "prompts.jsonl", []
    rows = [{"prompt": f"say {i}"} for i in range(8)] + [{"prompt": "x" * 1000}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, lambda stage, done, total, note: told.append(note))
    assert len(Corpus.load(tmp_path / "out" / "work" / "text" / "answers-0000.npz")) == 8
    assert any(note.startswith("1 left out") for note in told)


def test_the_target_writes_its_own_prompts(tiny_pair: Path, model: PagedModel) -> None:
    """From the bare chat prefix and an opening; only texts that the target itself ended count, each once."""
    tokenizer = Tokenizer.from_folder(tiny_pair / "target")
    writer = BatchWriter(model, range(0, 258, 20), slots=8, max_length=128)
    seen: set[str] = set()
    prompts = write_prompts(writer, tokenizer, ["", "the cat"], 20, np.random.default_rng(3), seen)
    assert prompts and all(len(prompt) >= 16 for prompt in prompts)
    assert len({fingerprint(prompt) for prompt in prompts}) == len(prompts) == len(seen)
    assert 0 < sum(prompt.startswith("the cat") for prompt in prompts) < len(prompts)
    assert not write_prompts(writer, tokenizer, ["", "the cat"], 20, np.random.default_rng(3), seen)


def test_features_that_come_with_the_text_are_those_of_a_later_pass(model: PagedModel, tmp_path: Path) -> None:
    """Row for row, but for what a pass over other rows rounds; the last token's row is never read."""
    rng = np.random.default_rng(4)
    requests = [Request(tuple(map(int, rng.integers(0, 200, n))), 0.0, 12) for n in (3, 9, 5, 40)]
    written = list(BatchWriter(model, [7], slots=3, max_length=64, keep_features=True).write(requests, rng))
    corpus = Corpus.of(written)
    store = FeatureStore(tmp_path, [Part("a", corpus)], model.feature_size, lambda: model, 1e9)
    store.hold(0, lambda tokens: None)
    for conversation, start, end in zip(written, corpus.offsets, corpus.offsets[1:], strict=False):
        assert conversation.features is not None
        later = store[slice(int(start), int(end) - 1)].astype(np.float32)
        difference = conversation.features.astype(np.float32) - later
        assert np.linalg.norm(difference) < 0.1 * np.linalg.norm(later)  # another width, another kernel: 4% here


def test_features_cut_off_anywhere_are_completed(
    model: PagedModel, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a pass, within a row, or never begun: bit for bit; a part without conversations has no file."""
    monkeypatch.setattr("dovetail.exporter.features.PASS_TOKENS", 200)
    corpus = Corpus.load(corpus_file)
    parts = [Part("none", Corpus.join([])), Part("a", corpus)]
    size = 2 * model.feature_size
    contents = []
    for cut in (None, 0, size * int(corpus.offsets[5]), size * int(corpus.offsets[5]) + 3 * size + 1):
        store = FeatureStore(tmp_path, parts, model.feature_size, lambda: model, 1e9)
        if cut is not None:
            os.truncate(tmp_path / "a.f16", cut)
        store.hold(0, lambda tokens: None)
        contents.append(np.array(store[slice(0, len(corpus.tokens))]))
    assert [file.name for file in tmp_path.iterdir()] == ["a.f16"]
    assert all(np.array_equal(other, contents[0]) for other in contents[1:])


def test_features_stay_within_their_disk(model: PagedModel, corpus_file: Path, tmp_path: Path) -> None:
    """Parts take turns; each batch reads the rows that an unlimited store holds."""
    corpus = Corpus.load(corpus_file)
    cuts = [0, 7, 15, 24]
    parts = [Part(f"p{i}", corpus.select(np.arange(cuts[i], cuts[i + 1]))) for i in range(3)]
    size = 2 * model.feature_size * len(corpus.tokens)
    whole = FeatureStore(tmp_path / "whole", parts, model.feature_size, lambda: model, 1e9)
    tight = FeatureStore(tmp_path / "tight", parts, model.feature_size, lambda: model, size * 0.7)
    assert len(whole.groups) == 1 and len(tight.groups) == 2
    whole.hold(0, lambda tokens: None)
    drafter = tiny_drafter(model.feature_size)
    options = FitOptions(batch=2, window=48)
    batches = Batches(corpus, tight, np.arange(24), drafter, options)
    reference = Batches(corpus, whole, np.arange(24), drafter, options)
    held: list[int] = []

    def hold(group: int) -> None:
        tight.hold(group, lambda tokens: None)
        held.append(group)

    seen = set()
    for (step, windows), (_, rows) in zip(batches.stream(0, hold), batches.order(0), strict=False):
        seen |= set(rows.tolist())
        assert torch.equal(windows.features, reference.batch(rows).features)
        assert sum(f.stat().st_size for f in (tmp_path / "tight").glob("*.f16")) <= size * 0.7
        if step == batches.per_epoch - 1:
            break
    assert held == [0, 1] and len(seen) >= 22
    assert batches.order(1)[0][0] == 1, "an epoch begins with the group whose features are there"
    with pytest.raises(TrainError, match="--disk"):
        FeatureStore(tmp_path / "none", parts, model.feature_size, lambda: model, 100)


def tiny_drafter(width: int, layers: tuple[int, ...] = ()) -> Drafter:
    torch.manual_seed(0)
    config = DrafterConfig(264, 64, width, width, 2 * width, 4, 2, width // 4, 256, feature_layers=layers)
    rows = torch.randn(264, width)
    return Drafter(config, rows, rows[:64], torch.arange(64))


def test_text_that_repeats_a_benchmark_is_left_out(tiny_pair: Path, tmp_path: Path) -> None:
    """Thirteen words in a row, whatever the layout; the run says how many conversations it cost."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    forbidden = Forbidden([words, "a prompt of just seven words here"])
    assert forbidden.touches(f"Begin: {words.upper().replace(' ', ', ')}.")
    assert forbidden.touches("x a prompt, of just -- seven words here y")
    assert not forbidden.touches(words.replace("seven", "sept"))
    assert not Forbidden(["hi there"]).touches("hi there")
    prompts, benchmark = tmp_path / "prompts.jsonl", tmp_path / "bench.jsonl"
    rows = [f"say {i}" for i in range(11)] + [f"please {words}"]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    benchmark.write_text(json.dumps({"turns": ["hello", words]}) + "\n")
    fit = FitOptions(epochs=1, unroll=1, window=64, batch=2)
    made = TrainPlan(prompts=prompts, exclude=(benchmark,), max_new_tokens=8, draft_vocab=64, fit=fit)
    train(tiny_pair, tmp_path / "out", made, quiet)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["corpus"]["left_out_for_overlap"] == 1
    assert log["corpus"]["trained_on"]["conversations"] + log["corpus"]["held_out_conversations"] == 11


def test_minutes_are_all_that_is_needed(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target writes text for a third of the time; fitting fixes its number of updates early and keeps it."""
    monkeypatch.setattr("dovetail.exporter.text.PART_PROMPTS", 8)
    monkeypatch.setattr("dovetail.exporter.train.BatchWriter", BatchWriterThatStops)
    made = TrainPlan(minutes=0.05, max_new_tokens=24, draft_vocab=64, fit=FitOptions(unroll=1, window=64, batch=2))
    stages: list[str] = []
    train(tiny_pair, tmp_path / "out", made, lambda stage, *rest: stages.append(stage))
    assert {"prompts", "answers", "features", "fit", "evaluate"} <= set(stages)
    log = json.loads((tmp_path / "out" / "training.json").read_text())
    assert log["updates"] >= 20 and log["corpus"]["conversations"] >= 8


class BatchWriterThatStops(BatchWriter):
    """A random model seldom ends a text by itself: more tokens count as the end."""

    def __init__(self, model: PagedModel, stop: Any, **options: Any):
        super().__init__(model, [*stop, *range(0, 258, 20)], slots=8, max_length=128, **options)


@pytest.mark.parametrize(
    "options",
    [
        FitOptions(unroll=2, teacher_top_k=4),
        FitOptions(unroll=1, regression=10.0),
        FitOptions(unroll=2, optimizer="muon", learning_rate=1e-2),
    ],
    ids=["top-k teacher", "the paper's loss", "muon"],
)
def test_every_recipe_learns(tiny_pair: Path, corpus_file: Path, tmp_path: Path, options: FitOptions) -> None:
    fit = replace(options, epochs=16, window=48, warmup=2, learning_rate=max(3e-3, options.learning_rate))
    train(tiny_pair, tmp_path / "out", replace(plan(corpus_file), fit=fit), quiet)
    curve = json.loads((tmp_path / "out" / "training.json").read_text())["curve"]
    assert curve[-1]["agreement"][0] > 1.3 * curve[0]["agreement"][0]


def test_the_paper_s_loss_adds_the_distance_of_features(model: PagedModel, corpus_file: Path, tmp_path: Path) -> None:
    corpus = Corpus.load(corpus_file)
    store = FeatureStore(tmp_path, [Part("a", corpus)], model.feature_size, lambda: model, 1e9)
    store.hold(0, lambda tokens: None)
    drafter = tiny_drafter(model.feature_size)
    windows = Batches(corpus, store, np.arange(24), drafter, FitOptions()).batch(np.arange(4))
    plain, _ = unrolled_loss(drafter, windows, FitOptions(unroll=1))
    both, _ = unrolled_loss(drafter, windows, FitOptions(unroll=1, regression=2.0))
    g = drafter(windows.features, windows.tokens)[windows.answer].detach()
    distance = torch.nn.functional.smooth_l1_loss(g, windows.following[windows.answer])
    assert float((both - plain).detach()) == pytest.approx(2 * float(distance), rel=1e-4)


def test_a_drafter_goes_on_from_another(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    train(tiny_pair, tmp_path / "first", plan(corpus_file), quiet)
    go_on = replace(
        plan(corpus_file, init=tmp_path / "first"), fit=FitOptions(epochs=0.2, window=48, batch=4, unroll=2)
    )
    train(tiny_pair, tmp_path / "second", go_on, quiet)
    first, second = (json.loads((tmp_path / n / "training.json").read_text())["curve"] for n in ("first", "second"))
    assert second[0]["loss"] < first[0]["loss"]
    with pytest.raises(TrainError, match="cannot"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path), quiet)
    with pytest.raises(TrainError, match="give --fusion dgf"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path / "first", fusion="fc"), quiet)
    with pytest.raises(TrainError, match="leave out --last-feature"):
        train(tiny_pair, tmp_path / "third", plan(corpus_file, init=tmp_path / "first", feature_layers=False), quiet)


def test_a_smaller_disk_is_no_other_run(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    """The remedy of a disk that is too small can be followed: the text stays."""
    with pytest.raises(TrainError, match="--disk"):
        train(tiny_pair, tmp_path / "out", plan(corpus_file, disk_gb=1e-6), quiet)
    train(tiny_pair, tmp_path / "out", plan(corpus_file), quiet, resume=True)


def test_the_same_prompt_is_never_held_out_and_trained_on(tiny_pair: Path, corpus_file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.npz"
    shutil.copyfile(corpus_file, twice)
    made = replace(plan(corpus_file), corpora=(corpus_file, twice), fit=FitOptions(epochs=0.2, unroll=1, window=48))
    train(tiny_pair, tmp_path / "out", made, quiet)
    log = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    assert log["left_out_as_doubles"] == 24
    assert log["trained_on"]["conversations"] + log["held_out_conversations"] == 24


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

    monkeypatch.setattr("dovetail.exporter.text.write_prompts", ask)
    monkeypatch.setattr("dovetail.exporter.text.PART_PROMPTS", 6)
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


def text_writer(pair: Path, folder: Path, progress: Any = quiet) -> TextWriter:
    tokenizer = Tokenizer.from_folder(pair / "target")
    xml = pair / "target" / "openvino_model.xml"
    return TextWriter(folder, folder, 0, tokenizer, lambda: BatchWriter(PagedModel(xml), [7]), 0, 8, progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 12), int)}, "must be lists"),
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


def test_enormous_values_stay_finite() -> None:
    assert np.isfinite(to_float16(np.array([1e6, -1e9, 1.5], np.float32))).all()


def test_a_given_corpus_is_cut_into_parts(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.exporter.text.PART_TOKENS", 100)
    corpus = Corpus.load(corpus_file)
    parts = split("given-0", corpus)
    assert len(parts) > 5 and len({part.name for part in parts}) == len(parts)
    assert np.array_equal(np.concatenate([part.corpus.tokens for part in parts]), corpus.tokens)
    assert all(len(part.corpus.tokens) <= 100 for part in parts)


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
    found = evaluate(drafter, corpus, features, depth)
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


def test_bad_plans_and_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to train on"):
        TrainPlan()
    with pytest.raises(TrainError, match="minutes 0"):
        TrainPlan(own_prompts=1, minutes=0)
    with pytest.raises(TrainError, match="unroll 0"):
        FitOptions(unroll=0)
    with pytest.raises(TrainError, match="epochs nan"):
        FitOptions(epochs=float("nan"))
    with pytest.raises(TrainError, match="optimizer 'sgd'"):
        FitOptions(optimizer="sgd")
    with pytest.raises(TrainError, match="disk_gb 0"):
        TrainPlan(own_prompts=1, disk_gb=0)
    with pytest.raises(TrainError, match="minutes inf"):
        TrainPlan(minutes=float("inf"))
    with pytest.raises(TrainError, match="--own-prompts"):
        TrainPlan(prompts=tmp_path / "prompts.jsonl", openings=("Write",))
