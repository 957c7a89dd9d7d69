"""Sampling: processors as transformers orders them, noise keyed by position, bad values refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.sampling.noise import gumbel_noise
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import TRUST, Sampler


def random_logits(seed: int, vocab: int = 50) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def test_noise_is_gumbel_its_tail_included() -> None:
    noise = np.concatenate([gumbel_noise(5)(position, 200_000) for position in range(20)])
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    for value in (-1.5, -0.5, 0.0, 1.0, 3.0, 6.0, 9.0, 12.0):
        above = -math.expm1(-math.exp(-value))
        deviation = math.sqrt(above * (1 - above) / len(noise))
        assert abs(float((noise > value).mean()) - above) < 5 * deviation, value


def test_noise_depends_on_seed_and_position_alone() -> None:
    forward = [gumbel_noise(5)(position, 500) for position in range(60)]
    backward = [gumbel_noise(5)(position, 500) for position in reversed(range(60))]
    assert (np.stack(forward) == np.stack(backward[::-1])).all()
    rows = np.stack([*forward, *(gumbel_noise(seed)(9, 500) for seed in range(6, 66))])
    alike = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(alike).max() < 0.25  # 5.6 deviations: neighbours in position, and seeds, share nothing


def test_the_noise_of_a_position_is_drawn_once() -> None:
    asked: list[int] = []

    def noise(position: int, size: int) -> NDArray[np.float32]:
        asked.append(position)
        return gumbel_noise(0)(position, size)

    sampler, ids = Sampler(SamplingParams(temperature=0.5, seed=0), noise), np.array([3, 1])
    assert (sampler.ahead(8, ids) == 0).all()  # the vocabulary is not known yet
    logits = random_logits(0)
    sampler.pick(logits, 7, [])
    for position in range(8, 50):
        for depth in range(4):
            ahead = sampler.ahead(position + depth, ids)
            assert ahead == pytest.approx(TRUST * 0.5 * gumbel_noise(0)(position + depth, 50)[ids], rel=1e-6)
        sampler.pick(logits, position, [])
    assert asked == list(range(7, 53))
    assert len(sampler._noise) <= 16


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=1.7, seed=3),
    SamplingParams(temperature=1.0, top_k=3, seed=3),
    SamplingParams(temperature=1.0, top_p=0.8, seed=3),
    SamplingParams(temperature=0.7, min_p=0.1, repetition_penalty=1.3, seed=3),
])  # fmt: skip
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits, sampler = random_logits(1, 5), Sampler(params)
    drawn = np.bincount([sampler.pick(logits, position, [1]) for position in range(20_000)], minlength=5) / 20_000
    expected = sampler.distribution(logits, [1])
    assert np.abs(drawn - expected).max() < 0.015
    assert (drawn[expected == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e4, 1e300])
def test_a_huge_temperature_draws_all_tokens_alike(temperature: float) -> None:
    sampler, logits = Sampler(SamplingParams(temperature=temperature, seed=0)), random_logits(1, 4)
    drawn = np.bincount([sampler.pick(logits, position, []) for position in range(8_000)], minlength=4) / 8_000
    assert np.abs(drawn - 0.25).max() < 0.025
    assert np.isfinite(sampler.ahead(9, np.arange(4))).all()


def test_greedy_is_the_argmax_and_reads_no_noise() -> None:
    def silent(position: int, size: int) -> NDArray[np.float32]:
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


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.array([2.0, -1.0, 1.5, 0.25], np.float32)
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25, seed=0)
    sampler = Sampler(params, prompt_tokens=2)
    expected = np.exp([2.0, -1.0 - 0.5 - 0.5, 1.5 - 0.25 - 0.5, 0.25])  # vLLM: logits - frequency * count - presence
    assert sampler.distribution(logits, [0, 0, 1, 2, 1]) == pytest.approx(expected / expected.sum(), abs=1e-15)
    assert sampler.distribution(logits, [0, 3]) == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=1e-7)
    assert Sampler(SamplingParams(frequency_penalty=1.0), prompt_tokens=1).pick(logits, 4, [2, 0, 0, 0]) == 2


def test_a_bias_comes_before_the_penalties() -> None:
    logits = np.array([2.0, -1.0, 1.5], np.float32)
    params = SamplingParams(temperature=1.0, logit_bias={1: 3.0, 0: -100}, repetition_penalty=2.0, seed=0)
    expected = np.exp([-98.0 * 2.0, 2.0 / 2.0, 1.5])
    assert Sampler(params).distribution(logits, [0, 1]) == pytest.approx(expected / expected.sum(), abs=1e-15)
    assert Sampler(SamplingParams(logit_bias={1: 100})).pick(logits, 0, []) == 1
    assert logits.tolist() == [2.0, -1.0, 1.5]
    with pytest.raises(InputError, match="token id 3, the target 3 tokens"):
        Sampler(SamplingParams(logit_bias={3: 1.0})).pick(logits, 0, [])


def test_a_bias_is_kept_in_a_form_that_hashes() -> None:
    given = {7: -100, 3: 1.5}
    params = SamplingParams(logit_bias=given)
    given[9] = 4.0
    assert params.logit_bias == ((3, 1.5), (7, -100))
    assert params == SamplingParams(logit_bias=params.logit_bias) and len({params, SamplingParams()}) == 2
    assert dataclasses.replace(params, top_k=3).logit_bias == params.logit_bias
    assert SamplingParams(**dataclasses.asdict(params)) == params
    assert params.reshapes and not SamplingParams(temperature=1.0, top_k=4).reshapes


@pytest.mark.parametrize("params", [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=0.9, top_k=7, top_p=0.8, min_p=0.02, presence_penalty=0.3, seed=5),
])  # fmt: skip
def test_allowed_tokens_alone_are_chosen_as_if_the_others_had_no_logit(params: SamplingParams) -> None:
    rng = np.random.default_rng(0)
    for position in range(60):
        logits, context = random_logits(position), rng.integers(0, 50, 9).tolist()
        allowed = np.sort(rng.choice(50, int(rng.integers(1, 50)), replace=False))
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        sampler = Sampler(params, prompt_tokens=4)
        assert sampler.pick(logits, position, context, allowed) == sampler.pick(masked, position, context)


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
    params = SamplingParams(
        temperature=0.7, top_k=20, top_p=0.85, min_p=0.05, repetition_penalty=1.4, logit_bias={3: 2.0, 8: -1.5}, seed=0
    )
    chain = [
        process.SequenceBiasLogitsProcessor([[[token], value] for token, value in dict(params.logit_bias).items()]),
        process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        process.PrefixConstrainedLogitsProcessor(lambda batch, ids: list(range(0, 50, 2)), 1),
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
        masked = np.where(np.arange(50) % 2, np.float32(-np.inf), logits)  # the order of mask and penalties is free
        assert np.abs(Sampler(params).distribution(masked, context.tolist()) - expected).max() < 1e-7


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
    "presence_penalty": (2.1, -2.1, math.nan, "1", None, True),
    "frequency_penalty": (2.1, -2.1, math.inf, "1", None),
    "seed": (-1, 2**63, 1.5, "x", True),
}


@pytest.mark.parametrize("bias", [
    None, 3, "x", [1, 2], {"1": 2.0}, {-1: 2.0}, {2**31: 1.0}, {True: 1.0}, {1.0: 1.0}, {1: 100.5}, {1: math.nan},
    {1: "2"}, {1: None}, ((1, 2, 3),), (1,),
])  # fmt: skip
def test_a_bad_bias_is_refused(bias: Any) -> None:
    with pytest.raises(InputError, match=r"logit_bias.*: give [^\n]*$"):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_parameters_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} {value!r} is out of range") and ": give " in message and "\n" not in message
