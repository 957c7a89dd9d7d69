"""Runs of the loop under a grammar, and the target alone to compare with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.limits import TreeLimits

LIMITS = TreeLimits(width=8, depth=4, top_k=3)
DRAFTERS: dict[str, Callable[[MarkovLogits], ScriptedDrafter | None]] = {
    "none": lambda logits: None,
    "perfect": ScriptedDrafter.copy_of,
    "noisy": lambda logits: ScriptedDrafter.copy_of(logits, noise=2.0, seed=3),
    "hostile": ScriptedDrafter.hostile_to,
}


def run(
    target: ScriptedTarget, drafter: Drafter | None, request: Request
) -> tuple[tuple[int, ...], str, GenerationMetrics]:
    sequence, meter = Sequence(target, drafter), Meter()
    steps = list(decode(sequence, request, meter))
    assert steps[-1].finish and sequence.matcher is None
    return tuple(chain.from_iterable(step.tokens for step in steps)), steps[-1].finish, meter.metrics()


def autoregressive(logits: MarkovLogits, request: Request) -> tuple[tuple[int, ...], str]:
    """The target alone, token by token, and a new matcher that reads the whole answer each time."""
    sampler = Sampler(request.sampling, prompt_tokens=len(request.prompt))
    text, answer = request.prompt, tuple[int, ...]()
    while len(answer) < request.max_new_tokens:
        assert request.constraint
        matcher = request.constraint.begin()
        assert all(matcher.advance(token) for token in answer)
        if answer and matcher.complete:
            return answer, "stop"
        token = sampler.pick(logits(text), len(text), text, matcher.allowed())
        if token in request.stop_tokens:
            return answer, "stop"
        text, answer = (*text, token), (*answer, token)
        matcher.advance(token)
        if matcher.complete:
            return answer, "stop"
    return answer, "length"
