"""The loop on scripted sessions: speculative equals plain, and it may be abandoned at any point."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.loop.sequence import Request, Sequence, Step
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.target.session import Target, TargetPass
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

VOCAB = 7


LIMITS = TreeLimits(width=8, depth=4, top_k=3)
GREEDY = SamplingParams()
HOT = SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=11)


def random_tree(prefix: tuple[int, ...], limits: TreeLimits, judge: Judge | None, noise: object) -> DraftTree:
    """Any tree of the width asked for, deeper than allowed at times, siblings with one token included."""
    rng = np.random.default_rng([len(prefix), *prefix[-3:]])
    count = int(rng.integers(1, limits.width + 1))
    parents = [-1, *(int(rng.integers(0, node)) for node in range(1, count))]
    tokens = [prefix[-1], *rng.integers(0, VOCAB, count - 1).tolist()]
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(count, np.float32))


DRAFTERS: dict[str, Callable[[MarkovLogits], ScriptedDrafter]] = {
    "perfect": ScriptedDrafter.copy_of,
    "noisy": lambda logits: ScriptedDrafter.copy_of(logits, noise=2.0, seed=3),
    "hostile": ScriptedDrafter.hostile_to,
    "random": lambda logits: ScriptedDrafter(random_tree),
}


def talk(seed: int = 0, drafter: str | None = "noisy", max_context: int = 4096, capacity: int = 1 << 20) -> Sequence:
    logits = MarkovLogits(VOCAB, seed)
    made = DRAFTERS[drafter](logits) if drafter else None
    if made:
        made.capacity = capacity
    return Sequence(ScriptedTarget(logits, max_context), made)


def drafter_of(conversation: Sequence) -> ScriptedDrafter:
    assert conversation.window and isinstance(conversation.window.drafter, ScriptedDrafter)
    return conversation.window.drafter


def run(conversation: Sequence, request: Request) -> tuple[tuple[int, ...], str, GenerationMetrics]:
    meter = Meter()
    steps = list(decode(conversation, request, meter))
    assert all(step.finish is None for step in steps[:-1])
    tokens = tuple(token for step in steps for token in step.tokens)
    assert consistent(conversation) and steps[-1].finish
    assert meter.new_tokens == len(tokens)
    return tokens, steps[-1].finish, meter.metrics()


def consistent(conversation: Sequence) -> bool:
    """What the sessions hold is what the conversation says, and a prefix of its tokens."""
    target, window = conversation.target, conversation.window
    assert isinstance(target, ScriptedTarget)
    held = [target.texts[conversation.id] == conversation.tokens[: conversation.length]]
    if window is not None:
        drafter = drafter_of(conversation)
        held += [drafter.length(conversation.id) == window.length]
        if read := drafter.texts.get(conversation.id):
            tokens = conversation.tokens[window.start : window.start + window.length + 1]
            held += [drafter.starts[conversation.id] == window.start, read == tokens]
    return all(held)


def autoregressive(request: Request, seed: int = 0, max_context: int = 4096) -> tuple[int, ...]:
    """The target alone, one token after the other, without sessions."""
    logits, sampler, text = MarkovLogits(VOCAB, seed), Sampler(request.sampling), request.prompt
    while len(text) < min(len(request.prompt) + request.max_new_tokens, max_context):
        token = sampler.pick(logits(text), len(text), text)
        if token in request.stop_tokens:
            break
        text += (token,)
    return text[len(request.prompt) :]


@pytest.mark.parametrize("drafter", [None, *DRAFTERS])
@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, repetition_penalty=1.5), HOT])
def test_speculative_equals_plain_token_for_token(drafter: str | None, sampling: SamplingParams) -> None:
    shapes = (
        LIMITS,
        TreeLimits(12, 6, 1, lookup=0),
        TreeLimits(2, 1, 1, lookup=0),
        TreeLimits(30, 3, 5, lookup=0),
        TreeLimits(1, 0, 1, lookup=0),
    )
    for seed, limits in itertools.product(range(4), shapes):
        request = Request((1, 2, 3), 40, sampling, frozenset({6}) if seed % 2 else frozenset(), limits)
        tokens, finish, _ = run(talk(seed, drafter), request)
        assert tokens == autoregressive(request, seed)
        assert finish == ("length" if len(tokens) == 40 else "stop")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    limits=st.builds(TreeLimits, st.integers(1, 20), st.integers(0, 7), st.integers(1, 7)),
    temperature=st.sampled_from([0.0, 0.5, 1.3]),
    max_new_tokens=st.integers(1, 30),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    max_context=st.integers(10, 50),
    scheduled=st.booleans(),
)
def test_speculative_equals_plain_whatever_is_asked(
    seed: int,
    prompt: list[int],
    limits: TreeLimits,
    temperature: float,
    max_new_tokens: int,
    drafter: str,
    max_context: int,
    scheduled: bool,
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=seed)
    scheduler = ScriptedPolicy(seed) if scheduled else None
    request = Request(tuple(prompt), max_new_tokens, sampling, frozenset({0}), limits, scheduler)
    tokens, _, metrics = run(talk(seed, drafter, max_context), request)
    assert tokens == autoregressive(request, seed, max_context)
    assert metrics.new_tokens == len(tokens)


@pytest.mark.parametrize("top_k", [1, 3])
def test_repeated_text_saves_rounds_where_the_drafter_does_not(top_k: int) -> None:
    """A greedy Markov text runs in circles; a chain stays a chain."""
    request = Request((1, 2), 41, GREEDY, limits=TreeLimits(9, 4, top_k, lookup=8))
    tokens, _, metrics = run(talk(drafter="hostile"), request)
    assert tokens == autoregressive(request)
    assert metrics.rounds < 25
    assert metrics.drafted <= 8 * metrics.rounds


def test_a_perfect_drafter_saves_rounds_and_a_hostile_one_costs_none() -> None:
    request = Request((1, 2), 41, GREEDY, limits=TreeLimits(5, 4, 1, lookup=0))
    _, _, perfect = run(talk(drafter="perfect"), request)
    assert perfect.rounds == 8 and perfect.drafted == perfect.accepted == 32
    assert perfect.acceptance_length == 5 and perfect.accepted_per_position == (8, 8, 8, 8)
    _, _, hostile = run(talk(drafter="hostile"), request)
    assert hostile.rounds == 40 and hostile.accepted == 0 and hostile.acceptance_length == 1
    _, _, plain = run(talk(drafter="perfect"), replace(request, limits=None))
    assert plain.rounds == 40 and plain.drafted == 0 and plain.accepted_per_position == ()


def test_metrics_add_up() -> None:
    _, _, metrics = run(talk(), Request((1, 2, 3), 30, GREEDY, limits=LIMITS))
    assert metrics.accepted == sum(metrics.accepted_per_position)
    assert metrics.new_tokens == 30 == 1 + metrics.rounds + metrics.accepted
    parts = metrics.prefill_ms + metrics.draft_ms + metrics.verify_ms + metrics.other_ms
    assert metrics.total_ms == pytest.approx(parts) and min(metrics.draft_ms, metrics.verify_ms) > 0
    assert metrics.decode_ms == pytest.approx(metrics.total_ms - metrics.time_to_first_token_ms)
    assert metrics.tokens_per_second == pytest.approx(29 / metrics.decode_ms * 1e3)
    _, _, one = run(talk(), Request((1,), 1, GREEDY, limits=LIMITS))
    assert (one.rounds, one.acceptance_length, one.tokens_per_second, one.draft_ms) == (0, 1, 0, 0)


def test_accepted_tokens_beyond_the_end_are_not_counted() -> None:
    free = autoregressive(Request((1, 2), 20))
    stop = next(token for i, token in enumerate(free) if token not in free[:i] and i % 5 in (2, 3) and i > 1)
    index = free.index(stop)
    request = Request((1, 2), 20, GREEDY, frozenset({stop}), TreeLimits(5, 4, 1, lookup=0))
    conversation = talk(drafter="perfect")
    tokens, finish, metrics = run(conversation, request)
    assert tokens == free[:index] and finish == "stop"
    assert metrics.accepted + metrics.rounds == index  # the token after the last round's path does not count
    assert conversation.target.length(conversation.id) == 2 + index  # all that was emitted, nothing after it


@pytest.mark.parametrize("drafter", [None, *DRAFTERS])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_never_past_max_new_tokens(drafter: str | None, count: int) -> None:
    request = Request((1, 2), count, GREEDY, limits=LIMITS)
    tokens, finish, _ = run(talk(drafter=drafter), request)
    assert len(tokens) == count and finish == "length"


@pytest.mark.parametrize("drafter", [None, *DRAFTERS])
@pytest.mark.parametrize("room", [1, 2, 3, 9])
@pytest.mark.parametrize("scheduled", [False, True])
def test_never_past_the_context(drafter: str | None, room: int, scheduled: bool) -> None:
    curve = Curve((0,), (1, 32), ((1.0, 1.1),))  # wide passes are nearly free
    limits, scheduler = (BOUNDS, Scheduler(Costs(curve, curve))) if scheduled else (LIMITS, None)
    # ScriptedTarget refuses more than fits
    request = Request((1, 2, 3, 4), 100, GREEDY, limits=limits, scheduler=scheduler)
    tokens, finish, _ = run(talk(drafter=drafter, max_context=4 + room), request)
    assert len(tokens) == room and finish == "length"


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    conversation = talk(max_context=4)
    for length in (4, 5):
        with pytest.raises(ContextOverflow, match=f"{length} tokens .* context of 4 "):
            list(decode(conversation, Request((1,) * length, 5), Meter()))


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        Request((), 5)
    for count in (0, -1, 2.5, True, None):
        with pytest.raises(InputError, match=f"max_new_tokens {count}"):
            Request((1,), count)  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("capacity", [5, 20, 33])
def test_beyond_the_drafters_capacity_drafting_goes_on(capacity: int) -> None:
    """ScriptedDrafter refuses more pairs than it can hold."""
    for prompt in ((1, 2, 3), (1, 2, 3) * 20):
        request = Request(prompt, 80, GREEDY, limits=LIMITS)
        conversation = talk(drafter="perfect", capacity=capacity)
        tokens, _, metrics = run(conversation, request)
        assert tokens == autoregressive(request)
        assert 0 < drafter_of(conversation).length(conversation.id) <= capacity and metrics.acceptance_length > 3


def test_prompts_are_read_in_chunks() -> None:
    prompt = tuple(np.random.default_rng(0).integers(0, VOCAB, 600).tolist())
    conversation = talk()
    request = Request(prompt, 10, GREEDY, limits=LIMITS)
    assert run(conversation, request)[0] == autoregressive(request)
    assert isinstance(conversation.target, ScriptedTarget)
    assert [count for call, count in conversation.target.calls if call == "prefill"] == [256, 256, 88]


def test_of_a_long_prompt_the_drafter_reads_the_end() -> None:
    prompt = tuple(np.random.default_rng(0).integers(0, VOCAB, 2000).tolist())
    conversation = talk(drafter="perfect")
    request = Request(prompt, 60, GREEDY, limits=LIMITS)
    tokens, _, metrics = run(conversation, request)
    assert tokens == autoregressive(request)
    assert metrics.acceptance_length > 3
    read = sum(count for call, count in drafter_of(conversation).calls if call == "extend")
    assert conversation.window is not None
    assert 256 <= read < 256 + 60 and conversation.window.start == 2000 - 256


def test_what_long_goes_undrafted_is_dropped() -> None:
    conversation = talk()
    list(
        decode(
            conversation,
            Request((1, 2, 3), 1500, GREEDY, limits=replace(LIMITS, lookup=0), scheduler=ScriptedPolicy(7, draft=0.0)),
            Meter(),
        )
    )
    assert conversation.waiting == 256
    again = Request((*conversation.tokens, 4), 20, GREEDY, limits=LIMITS)
    assert run(conversation, again)[0] == autoregressive(again)


def test_the_first_token_does_not_wait_for_the_drafter() -> None:
    conversation = talk(drafter="perfect")
    steps = decode(conversation, Request((1, 2, 3), 20, GREEDY, limits=LIMITS), Meter())
    next(steps)
    assert not [call for call, _ in drafter_of(conversation).calls if call == "extend"]
    next(steps)
    assert [call for call, _ in drafter_of(conversation).calls if call != "rewind"][:2] == ["extend", "propose"]


def next_prompt(tokens: list[int], kind: str) -> tuple[int, ...]:
    rng = np.random.default_rng(len(tokens))
    turn = tuple(rng.integers(0, VOCAB, 5).tolist())
    cut = int(rng.integers(1, len(tokens)))
    return {"longer": (*tokens, *turn), "same": tuple(tokens[:3]), "branch": (*tokens[:cut], *turn), "new": turn}[kind]


@pytest.mark.parametrize("drafter", [None, *DRAFTERS])
@pytest.mark.parametrize("sampling", [GREEDY, HOT])
@pytest.mark.parametrize("scheduler", [None, ScriptedPolicy(7)])
@pytest.mark.parametrize("window", [256, 6])
def test_a_conversation_equals_a_fresh_start(
    drafter: str | None,
    sampling: SamplingParams,
    scheduler: ScriptedPolicy | None,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dovetail.runtime.drafter.window.KEPT", window)
    rng, reused = np.random.default_rng(5), 0
    for seed in range(4):
        conversation = talk(seed, drafter)
        prompt: tuple[int, ...] = (1, 2, 3)
        for kind in rng.choice(["longer", "same", "branch", "new"], 8):
            limits = LIMITS if rng.random() < 0.7 else None  # without drafting the drafter is left behind
            request = Request(prompt, int(rng.integers(1, 15)), sampling, frozenset({6}), limits, scheduler)
            tokens, _, metrics = run(conversation, request)
            assert tokens == autoregressive(request, seed)
            assert metrics.cached_tokens < metrics.prompt_tokens == len(prompt)
            reused += metrics.cached_tokens
            prompt = next_prompt(conversation.tokens, str(kind))
    assert reused > 50


def test_the_common_prefix_is_not_read_again() -> None:
    """Of an answer only the bits of a tree are held: the next prompt reads it again."""
    conversation, prompt = talk(drafter="perfect"), [1, 2, 3]
    for cached in (0, 3, 25):
        tokens, _, metrics = run(conversation, Request(tuple(prompt), 20, GREEDY, limits=LIMITS))
        assert metrics.cached_tokens == cached
        prompt += [*tokens, 4, 5]


class Interrupted:
    """Raises KeyboardInterrupt at the n-th call of a session, before, or after its work is done."""

    def __init__(self, session: Target | Drafter, at: int, after: bool) -> None:
        self.session, self.left, self.after = session, at, after

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.session, name)
        if not callable(value) or name in ("length", "rewind"):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = value(*arguments, **options)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("side", ["target", "drafter"])
@pytest.mark.parametrize("drafter", ["perfect", "random"])
@pytest.mark.parametrize("scheduler", [None, ScriptedPolicy(7)])
@pytest.mark.parametrize("window", [256, 20])
def test_an_interrupt_within_any_call_leaves_the_conversation_usable(
    drafter: str,
    side: str,
    after: bool,
    scheduler: ScriptedPolicy | None,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dovetail.runtime.drafter.window.KEPT", window)
    first = Request((1, 2, 3) * 100, 150, GREEDY, limits=LIMITS, scheduler=scheduler)
    for at in range(1, 14):
        conversation = talk(drafter=drafter)
        holder = conversation if side == "target" else conversation.window
        session = getattr(holder, side)
        setattr(holder, side, Interrupted(session, at, after))
        with pytest.raises(KeyboardInterrupt):
            list(decode(conversation, first, Meter()))
        setattr(holder, side, session)
        assert consistent(conversation)
        for request in (first, Request((1, 2, 3, 4), 12, GREEDY, limits=LIMITS, scheduler=scheduler)):
            assert run(conversation, request)[0] == autoregressive(request)


def test_an_interrupt_within_the_clean_up_is_made_good_by_the_next_request() -> None:
    conversation = talk(drafter="perfect")
    request = Request((1, 2, 3), 20, GREEDY, limits=LIMITS)
    target = conversation.target
    assert isinstance(target, ScriptedTarget)

    class Torn(ScriptedTarget):
        def verify(self, *offers: Any, rows: int = 0) -> dict[int, TargetPass]:
            super().verify(*offers)
            raise KeyboardInterrupt

        def rewind(self, seq: int, keep: int) -> None:
            if self._trees:
                raise KeyboardInterrupt
            super().rewind(seq, keep)

    torn = Torn(target.logits_of)
    conversation.target, conversation.id = torn, torn.open()
    with pytest.raises(KeyboardInterrupt):
        list(decode(conversation, request, Meter()))
    torn.__class__ = ScriptedTarget  # type: ignore[assignment]  # the same session, no longer interrupted
    assert run(conversation, request)[0] == autoregressive(request)


@pytest.mark.parametrize("after", range(5))
def test_an_abandoned_generator_leaves_the_conversation_usable(after: int) -> None:
    conversation = talk()
    request = Request((1, 2, 3), 30, HOT, limits=LIMITS)
    steps = decode(conversation, request, Meter())
    taken = list(itertools.islice(steps, after))
    steps.close()
    assert consistent(conversation) and all(isinstance(step, Step) for step in taken)
    assert run(conversation, request)[0] == autoregressive(request)


def test_a_drafter_out_of_step_is_an_error() -> None:
    logits = MarkovLogits(VOCAB)
    wrong_root = ScriptedDrafter(lambda prefix, *_: DraftTree.root((prefix[-1] + 1) % VOCAB))
    wide = TreeLimits(50, 3, 7, lookup=0)
    too_wide = ScriptedDrafter(lambda prefix, *_: ScriptedDrafter.copy_of(logits)._propose(prefix, wide, None, None))
    for drafter in (wrong_root, too_wide):
        conversation = Sequence(ScriptedTarget(logits), drafter)
        with pytest.raises(DeviceError, match="out of step"):
            list(decode(conversation, Request((1,), 9, limits=LIMITS), Meter()))
        assert consistent(conversation)


def test_a_rollback_that_did_not_happen_is_an_error() -> None:
    class Stuck(ScriptedTarget):
        def rewind(self, seq: int, keep: int) -> None:
            pass

    conversation = Sequence(Stuck(MarkovLogits(VOCAB)), None)
    list(decode(conversation, Request((1, 2), 3), Meter()))
    with pytest.raises(DeviceError, match="after a rewind to 0"):
        list(decode(conversation, Request((2, 2), 3), Meter()))
