"""Drafts of sampled answers: a drafter that is told the noise finds what the target will draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.drafter.session import DraftNoise
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.sampling import sampler as sampling
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text

HOT = SamplingParams(temperature=1.3, seed=4)
CHAIN = TreeLimits(width=5, depth=4, top_k=1, lookup=0)


class Deaf(ScriptedDrafter):
    """Does without the noise, as a session may."""

    def propose(
        self, seq: int, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        return super().propose(seq, limits, judge)


def metrics(drafter: Callable[[MarkovLogits], ScriptedDrafter], params: SamplingParams) -> GenerationMetrics:
    logits, meter = MarkovLogits(40, seed=2), Meter()
    talk = Sequence(ScriptedTarget(logits), drafter(logits))
    list(decode(talk, Request((1, 2, 3), 101, params, limits=CHAIN), meter))
    return meter.metrics()


def test_a_drafter_that_knows_the_targets_logits_knows_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft comes true, at every depth and in every round: the noise is that of the right positions."""
    monkeypatch.setattr(sampling, "TRUST", 1.0)
    assert metrics(ScriptedDrafter.copy_of, HOT).acceptance_length == 5
    assert metrics(Deaf.copy_of, HOT).acceptance_length < 2.5


def test_a_drafter_that_is_nearly_right_gains_most() -> None:
    def roughly(logits: MarkovLogits) -> ScriptedDrafter:
        return ScriptedDrafter.copy_of(logits, noise=1.0)

    def roughly_deaf(logits: MarkovLogits) -> ScriptedDrafter:
        return Deaf.copy_of(logits, noise=1.0)

    told, deaf = (metrics(drafter, HOT).acceptance_length for drafter in (roughly, roughly_deaf))
    assert told > 1.2 * deaf


def test_greedy_answers_have_no_noise_also_after_sampled_ones() -> None:
    heard: list[DraftNoise | None] = []

    class Listening(ScriptedDrafter):
        def extend(self, seq: int, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
            heard.append(noise)
            super().extend(seq, tokens, features, noise)

        def propose(
            self, seq: int, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
        ) -> DraftTree:
            heard.append(noise)
            return super().propose(seq, limits, judge, noise)

    logits = MarkovLogits(40)
    talk = Sequence(ScriptedTarget(logits), Listening.copy_of(logits))
    for params in (HOT, SamplingParams()):
        heard.clear()
        list(decode(talk, Request((1, 2, 3), 20, params, limits=CHAIN), Meter()))
        assert heard and all((noise is None) == params.greedy for noise in heard)


def test_the_tree_changes_nothing_of_what_is_drawn() -> None:
    """The target draws alike whether its drafter is told the noise or not."""
    logits, texts = MarkovLogits(40, seed=5), []
    for drafter in (ScriptedDrafter.copy_of(logits, noise=1.0), Deaf.copy_of(logits, noise=1.0)):
        talk = Sequence(ScriptedTarget(logits), drafter)
        steps = decode(talk, Request((1, 2, 3), 60, HOT, limits=TreeLimits(8, 4, 3)), Meter())
        texts.append([token for step in steps for token in step.tokens])
    text, sampler = [1, 2, 3], Sampler(HOT)
    while len(text) < 63:
        text.append(sampler.pick(logits(tuple(text)), len(text), text))
    assert texts == [text[3:]] * 2


def test_noise_crosses_the_bus_for_sampled_answers_alone(
    HostDevice: Callable[[], Any], pairs: Any, stream: Any
) -> None:
    """And what a device makes of it is what the CPU makes of it."""
    (tokens, features), vocabulary = stream, pairs.manifest.drafter.draft_vocab_size
    device, limits = HostDevice(), TreeLimits(width=6, depth=2, top_k=3, lookup=0)
    there, here = pairs.on(device), pairs.cpu()
    rng = np.random.default_rng(0)
    rows = {depth: 8 * rng.gumbel(size=pairs.manifest.target.vocab_size).astype(np.float32) for depth in (1, 2)}

    def noise(depth: int, ids: Any) -> FloatArray:
        return rows[depth][ids]

    def drafted(begin: int, given: DraftNoise | None) -> tuple[DraftTree, DraftTree, list[str], int]:
        device.calls.clear()
        before, trees = there.report.bus_bytes, []
        for session in (there, here):
            session.extend(SEQ, tokens[begin : begin + 5], features[begin : begin + 5], given)
            trees.append(session.propose(SEQ, limits, None, given))
        return trees[0], trees[1], list(device.calls), there.report.bus_bytes - before

    silent, _, calls, moved = drafted(0, None)
    assert calls == ["up", "down", "wait"] * 2
    loud, same, calls, more = drafted(5, noise)
    assert calls == ["up", "up", "down", "wait"] * 2
    assert 8 * vocabulary <= more - moved < 8 * vocabulary + 2 * 256
    assert loud.tokens.tolist() == same.tokens.tolist()
    best = max(there._runner.draft_ids.tolist(), key=rows[1].__getitem__)
    assert best in loud.tokens.tolist() and silent.tokens.tolist() != loud.tokens.tolist()
    again, plain, _, _ = drafted(10, None)  # the first greedy call wipes it
    assert again.tokens.tolist() == plain.tokens.tolist()
    assert drafted(15, None)[2] == ["up", "down", "wait"] * 2


def test_an_interrupt_leaves_no_noise_on_the_device(
    HostDevice: Callable[[], Any], pairs: Any, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tokens, features), limits = stream, TreeLimits(width=6, depth=2, top_k=3, lookup=0)
    device = HostDevice()
    session, fresh = pairs.on(device), pairs.on(HostDevice())
    loud = 8 * np.random.default_rng(0).gumbel(size=pairs.manifest.target.vocab_size).astype(np.float32)
    session.extend(SEQ, tokens[:5], features[:5], lambda depth, ids: loud[ids])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(device, "upload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.extend(SEQ, tokens[5:6], features[5:6])
    session.rewind(SEQ, 0)
    for one in (session, fresh):
        one.extend(SEQ, tokens[:6], features[:6])
    pairs.assert_alike(session.propose(SEQ, limits), fresh.propose(SEQ, limits))
