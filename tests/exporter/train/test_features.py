"""The target's features: written, completed, kept within their disk; the loss and acceptance read from them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.exporter.train.batches import Batches
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.evaluate import evaluate
from dovetail.exporter.train.features import FeatureStore, Part, to_float16
from dovetail.exporter.train.loss import unrolled_loss
from dovetail.exporter.train.plan import FitOptions
from dovetail.exporter.train.writer import BatchWriter
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.runtime.errors import TrainError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.target.paged import PagedModel


def test_features_that_come_with_the_text_are_those_of_a_later_pass(model: PagedModel, tmp_path: Path) -> None:
    """Row for row, but for what a pass over other rows rounds; the last token's row is never read."""
    rng = np.random.default_rng(4)
    requests = [Request(tuple(map(int, rng.integers(0, 200, n))), 12) for n in (3, 9, 5, 40)]
    written = list(BatchWriter(model, [7], slots=3, max_length=64).write(requests, rng, keep_features=True))
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
    monkeypatch.setattr("dovetail.exporter.train.features.PASS_TOKENS", 200)
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
    trainee = in_training(tiny_drafter(model.feature_size))
    options = FitOptions(batch=2, window=48)
    batches = Batches(corpus, tight, np.arange(24), trainee, options)
    reference = Batches(corpus, whole, np.arange(24), trainee, options)
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


def test_enormous_values_stay_finite() -> None:
    assert np.isfinite(to_float16(np.array([1e6, -1e9, 1.5], np.float32))).all()


def test_the_paper_s_loss_adds_the_distance_of_features(model: PagedModel, corpus_file: Path, tmp_path: Path) -> None:
    corpus = Corpus.load(corpus_file)
    store = FeatureStore(tmp_path, [Part("a", corpus)], model.feature_size, lambda: model, 1e9)
    store.hold(0, lambda tokens: None)
    drafter = tiny_drafter(model.feature_size)
    trainee = in_training(drafter)
    windows = Batches(corpus, store, np.arange(24), trainee, FitOptions()).batch(np.arange(4))
    plain, _ = unrolled_loss(trainee, windows, FitOptions(unroll=1))
    both, _ = unrolled_loss(trainee, windows, FitOptions(unroll=1, regression=2.0))
    g = drafter(windows.features, windows.tokens)[windows.answer].detach()
    distance = torch.nn.functional.smooth_l1_loss(g, windows.following[windows.answer])
    assert float((both - plain).detach()) == pytest.approx(2 * float(distance), rel=1e-4)


def in_training(drafter: Drafter) -> Trainee:
    return Trainee(drafter, drafter.head)


def tiny_drafter(width: int, layers: tuple[int, ...] = ()) -> Drafter:
    torch.manual_seed(0)
    config = DrafterConfig(264, 64, width, width, 2 * width, 4, 2, width // 4, 256, feature_layers=layers)
    rows = torch.randn(264, width)
    return Drafter(config, rows, rows[:64], torch.arange(64))


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
