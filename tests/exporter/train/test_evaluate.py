"""A drafter that claims too much is mended by the fit, an honest one is left alone, and the pair carries the fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the exporter needs torch")

import torch

from dovetail.exporter.drafter.export import export_drafter
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.evaluate import evaluate, fit_depth, reliability
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.runtime.errors import SourceError
from dovetail.runtime.pair.layout import CALIBRATION_NAME
from dovetail.runtime.policy.calibration import Calibration


def drawn(scale: float, shift: float, count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities q, and hits whose true probability is sigmoid(scale * logit(q) + shift)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-2.0, 2.5, count)
    hits = rng.random(count) < 1 / (1 + np.exp(-(scale * logits + shift)))
    return -np.logaddexp(0.0, -logits).astype(np.float32), hits


@pytest.mark.parametrize(("scale", "shift"), [(0.4, -0.8), (2.0, 0.5), (1.0, -1.5)])
def test_a_distorted_drafter_is_mended(scale: float, shift: float) -> None:
    fit = fit_depth(*drawn(scale, shift))
    assert fit.scale == pytest.approx(scale, abs=0.05) and fit.shift == pytest.approx(shift, abs=0.1)
    assert fit.error_before > 0.02 and fit.error_after < fit.error_before / 5


def test_an_honest_drafter_stays() -> None:
    logprobs, hits = drawn(1.0, 0.0)
    fit = fit_depth(logprobs, hits)
    assert fit.scale == pytest.approx(1, abs=0.05) and fit.shift == pytest.approx(0, abs=0.05)
    assert fit.error_before < 0.005 and fit.error_after < 0.005
    applied = Calibration(10, (fit,)).apply(1, logprobs)
    np.testing.assert_allclose(np.exp(applied), np.exp(logprobs), atol=0.02)


def test_bins_hold_every_candidate_once() -> None:
    q = np.array([0.0, 0.005, 0.01, 0.55, 0.9, 1.0])
    counts, claimed, observed = reliability(q, np.array([0, 1, 0, 1, 1, 1.0]))
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert claimed[[0, -1]].tolist() == pytest.approx([0.0025, 0.95])
    assert observed[[0, 1, 8, -1]].tolist() == [0.5, 0, 1, 1]


@pytest.mark.parametrize("hits", [[], [False] * 50, [True] * 50])
def test_too_little_to_go_by_stays_finite_and_tame(hits: list[bool]) -> None:
    fit = fit_depth(np.full(len(hits), np.log(0.3), np.float32), np.array(hits, bool))
    assert 0 <= fit.scale < 10 and abs(fit.shift) < 10
    assert fit.error_after <= fit.error_before


def test_a_drafter_that_is_right_when_it_doubts_is_not_reversed() -> None:
    fit = fit_depth(*drawn(-1.0, -2.0))
    assert fit.scale == 0 and fit.error_after < 0.01


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    torch.manual_seed(0)
    rows = torch.randn(20, 16)
    return Drafter(DrafterConfig(20, 12, 16, 16, 24, 2, 1, 8, 64), rows, rows[:12], torch.arange(12)).eval()


def conversations(lengths: list[int], prompts: list[int]) -> tuple[Corpus, np.ndarray]:
    rng = np.random.default_rng(1)
    total = sum(lengths)
    corpus = Corpus(rng.integers(0, 14, total), np.array(lengths), np.array(prompts))
    return corpus, rng.normal(size=(total, 16)).astype(np.float16)


@torch.no_grad()
def test_candidates_are_what_drafting_along_the_true_path_gives(drafter: Drafter) -> None:
    """Against a plain loop that feeds each chain the true tokens and the drafter's own features."""
    length, first, depth = 16, 3, 3
    corpus, features = conversations([length], [first + 1])
    claimed, hit = [0.0] * depth, [0] * depth
    for start in range(first, length - 2):
        f = torch.from_numpy(features[: start + 1].astype(np.float32))[None]
        for step in range(min(depth, length - 2 - start)):
            fed = torch.from_numpy(corpus.tokens[1 : start + step + 2])[None]
            out = drafter(f, fed)[:, -1:]
            best = torch.log_softmax(drafter.logits(out)[0, 0], -1).topk(10)
            claimed[step] += float(best.values.exp().sum())
            hit[step] += int((drafter.d2t[best.indices] == corpus.tokens[start + step + 2]).sum())
            f = torch.cat([f, out], 1)
    found = evaluate(drafter, corpus, features, depth).calibration
    assert found.top_k == 10
    for step, fit in enumerate(found.depths):
        counts = np.array(fit.counts)
        assert fit.candidates == counts.sum() == 10 * (length - 2 - first - step)
        assert counts @ np.array(fit.mean_q) == pytest.approx(claimed[step], abs=1e-3)
        assert counts @ np.array(fit.observed) == pytest.approx(hit[step], abs=1e-3)


def test_conversations_shorter_than_the_chain_still_count(drafter: Drafter) -> None:
    corpus, features = conversations([8, 5, 4, 3], [4, 3, 4, 1])
    found = evaluate(drafter, corpus, features, depth=6)
    assert (found.positions, found.acceptance_length) == (0, 1.0)
    # positions whose next token is known: 3, 4, 5; then 2; none; then 0
    assert [fit.candidates for fit in found.calibration.depths] == [50, 20, 10, 0, 0, 0]
    assert (found.calibration.depths[5].scale, found.calibration.depths[5].shift) == (1.0, 0.0)


def test_a_narrow_draft_vocabulary_gives_as_many_candidates_as_it_has() -> None:
    rows = torch.ones(20, 16)
    narrow = Drafter(DrafterConfig(20, 4, 16, 16, 24, 2, 1, 8, 64), rows, rows[:4], torch.arange(4))
    assert evaluate(narrow, *conversations([12], [4]), depth=2).calibration.top_k == 4


@pytest.fixture
def calibrated(tiny_drafter: Path, tmp_path: Path, drafter: Drafter) -> Path:
    """A checkpoint with a calibration beside its weights."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_drafter, folder)
    evaluate(drafter, *conversations([40], [4])).calibration.save(folder)
    return folder


def test_the_export_brings_the_calibration_along(calibrated: Path, tiny_target: Path, tmp_path: Path) -> None:
    export_drafter(calibrated, tiny_target, tmp_path / "drafter")
    assert (tmp_path / "drafter" / CALIBRATION_NAME).read_bytes() == (calibrated / CALIBRATION_NAME).read_bytes()
    assert Calibration.load(tmp_path / "drafter") == Calibration.load(calibrated)


@pytest.mark.parametrize("text", ["{", '{"top_k": 10, "depths": [], "colour": 1}'])
def test_a_damaged_calibration_stops_the_export_before_it_begins(
    calibrated: Path, tiny_target: Path, tmp_path: Path, text: str
) -> None:
    (calibrated / CALIBRATION_NAME).write_text(text)
    with pytest.raises(SourceError, match=CALIBRATION_NAME) as caught:
        export_drafter(calibrated, tiny_target, tmp_path / "drafter")
    assert "\n" not in str(caught.value) and not (tmp_path / "drafter").exists()


@torch.no_grad()
def test_blocks_read_beside_the_last_feature_are_mixed_in_once() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 16)
    config = DrafterConfig(20, 12, 16, 16, 24, 2, 1, 8, 64, feature_layers=(0, 1))
    wide = Drafter(config, rows, rows[:12], torch.arange(12))
    assert wide.mix is not None
    wide.mix.folded().normal_()
    plain = Drafter(replace(config, feature_layers=()), rows, rows[:12], torch.arange(12))
    plain.load_state_dict({name: value for name, value in wide.state_dict().items() if not name.startswith("mix.")})
    corpus, _ = conversations([20, 14], [4, 5])
    features = torch.randn(34, 48).half()
    mixed = wide.read(features.float()).numpy()
    assert evaluate(wide, corpus, features.numpy(), depth=3) == evaluate(plain, corpus, mixed, depth=3)
