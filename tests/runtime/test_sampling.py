"""Sampling: processors as transformers orders them, noise keyed by position, bad values refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime import sampling
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.sampling import Sampler, SamplingParams, philox_noise


def random_logits(seed: int, vocab: int = 50) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


@pytest.fixture(params=[1, 2, 4, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities that are summed before one is looked for among them: some blocks are empty, the last is short."""
    monkeypatch.setattr(sampling, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("seed", range(10))
def test_inverse_cdf_intervals_are_the_probabilities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(9, 0.5))
    probs[rng.integers(9)] = probs[2:4] = 0.0
    edges = np.concatenate([[0.0], probs.cumsum()]) / probs.sum()
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = [low + 1e-14, (low + high) / 2, high - 1e-14] if high - low > 1e-12 else []
        for uniform in inside:
            assert Sampler(SamplingParams(temperature=1.0), noise=lambda _, u=uniform: float(u)).draw(probs, 0) == index


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_tokens_without_probability_are_never_drawn(uniform: float) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0), noise=lambda _: uniform)
    for total in (1.0, 0.1, 3e-5):
        probs = np.array([0.0, 0.3, 0.7, 0.0]) * total
        assert sampler.draw(probs, 0) in (1, 2)


def test_noise_depends_on_seed_and_position_alone() -> None:
    forward = [philox_noise(5)(position) for position in range(100)]
    backward = [philox_noise(5)(position) for position in reversed(range(100))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 100 and all(0 <= uniform < 1 for uniform in forward)
    assert set(forward).isdisjoint(philox_noise(6)(position) for position in range(100))
    assert abs(np.mean([philox_noise(seed)(9) for seed in range(2000)]) - 0.5) < 0.03


def test_frequencies_follow_the_distribution() -> None:
    logits = random_logits(1, 5)
    sampler = Sampler(SamplingParams(temperature=0.8, seed=3))
    drawn = np.bincount([sampler.pick(logits, position, []) for position in range(20_000)], minlength=5) / 20_000
    assert np.abs(drawn - sampler.distribution(logits, [])).max() < 0.015


def test_greedy_is_the_argmax_and_reads_no_noise() -> None:
    def silent(position: int) -> float:
        raise AssertionError("greedy decoding draws nothing")

    for seed in range(20):
        logits = random_logits(seed)
        sampler = Sampler(SamplingParams(), noise=silent)
        assert sampler.pick(logits, 4, [1, 2]) == logits.argmax()
        assert sampler.distribution(logits, []).argmax() == logits.argmax()
        assert sampler.distribution(logits, []).sum() == 1


def test_a_tiny_temperature_is_greedy() -> None:
    for seed in range(20):
        logits = random_logits(seed)
        assert Sampler(SamplingParams(temperature=5e-324, seed=0)).pick(logits, seed, []) == logits.argmax()


def test_penalty_counts_a_repeated_token_once_and_leaves_the_logits_alone() -> None:
    logits = np.array([2.0, -1.0, 1.5], np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingParams(temperature=1.0, repetition_penalty=2.0, seed=0))
    expected = np.exp([1.0, -2.0, 1.5])
    assert sampler.distribution(logits, [0, 1, 0, 0]) == pytest.approx(expected / expected.sum(), abs=1e-15)
    assert Sampler(SamplingParams(repetition_penalty=2.0)).pick(logits, 0, [0, 1, 0]) == 2
    assert (logits == before).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_is_the_fewest_best_tokens_on_a_large_vocabulary(top_p: float) -> None:
    for seed, scale in ((0, 0.1), (1, 2.0), (2, 8.0)):
        logits = (random_logits(seed, 5000) * scale).astype(np.float32)
        probs = Sampler(SamplingParams(temperature=1.0, top_p=top_p, seed=0)).distribution(logits, [])
        raw = np.exp(logits.astype(np.float64))
        ranked = np.sort(raw / raw.sum())[::-1]
        kept = int((probs > 0).sum())
        assert ranked[:kept].sum() >= top_p - 1e-12 and ranked[: kept - 1].sum() < top_p
        assert probs.sum() == pytest.approx(1, abs=1e-12)


def test_of_tied_tokens_the_nucleus_takes_the_first() -> None:
    probs = Sampler(SamplingParams(temperature=1.0, top_p=0.6, seed=0)).distribution(np.zeros(4, np.float32), [])
    assert probs == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_processors_agree_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.85, min_p=0.05, repetition_penalty=1.4, seed=0)
    chain = [
        process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        process.TemperatureLogitsWarper(params.temperature),
        process.TopKLogitsWarper(params.top_k),
        process.TopPLogitsWarper(params.top_p),
        process.MinPLogitsWarper(params.min_p),
    ]
    for seed in range(20):
        logits = random_logits(seed)
        context = np.random.default_rng(seed).integers(0, 50, 30)
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for processor in chain:
            scores = processor(torch.from_numpy(context)[None], scores)
        expected = scores.softmax(-1)[0].numpy()
        assert np.abs(Sampler(params).distribution(logits, context.tolist()) - expected).max() < 1e-9


def test_a_seed_is_drawn_when_sampling_needs_one() -> None:
    assert SamplingParams().seeded().seed is None
    assert SamplingParams(temperature=1.0, seed=4).seeded().seed == 4
    drawn = {SamplingParams(temperature=1.0).seeded().seed for _ in range(5)}
    assert None not in drawn and len(drawn) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_an_error(temperature: float, bad: float) -> None:
    logits = random_logits(0)
    logits[3] = bad
    with pytest.raises(DeviceError, match="best logit"):
        Sampler(SamplingParams(temperature=temperature)).pick(logits, 0, [])


BAD: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, -1e-9, math.nan, math.inf, "hot", None, True),
    "top_k": (-1, 2.5, "3", True, None),
    "top_p": (0, 0.0, -0.1, 1.01, math.nan, "1"),
    "min_p": (-0.1, 1.1, math.nan, None),
    "repetition_penalty": (0, -1.0, math.nan, math.inf),
    "seed": (-1, 2**63, 1.5, "x", True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_parameters_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} {value!r} is out of range: give ") and "\n" not in message
