"""The loop, on token ids and the two seams alone: prefill, draft, verify, accept, commit, yield.

Axes: P prompt tokens, N nodes, D feature size. The position arithmetic is that of target/session.py.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from dovetail.runtime.drafter.session import DraftNoise, DraftSession
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.loop.accept import accept
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.policy.policy import Choice, Growth, Plan, Policy, Round
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.target.session import TargetPass, TargetSession
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import Repeat, RepeatIndex

FinishReason = Literal["stop", "length"]

_CHUNK = 256  # prompt tokens per pass
# Pairs that wait for the drafter at most: of a longer text it reads the end, no more than it was trained on at once,
# and forgets what came before.
_WINDOW = 256
_PLAIN = TreeLimits(width=1, depth=0, top_k=1, lookup=0)


@dataclass(frozen=True)
class Request:
    """One generation on token ids.

    prompt: P token ids, at least one. max_new_tokens: at least 1; the context may end the answer earlier.
    stop_tokens: end the answer and are no part of it. limits: None is plain decoding, a node a pass.
    scheduler: shapes each tree within the limits; None lets the trees grow as far as the limits say.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_tokens: frozenset[int] = frozenset()
    limits: TreeLimits | None = None
    scheduler: Policy | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt is empty: give at least one token")
        count = self.max_new_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"max_new_tokens {count!r} is out of range: give a whole number, 1 or more")

    def check_room(self, max_context: int) -> int:
        """Tokens that the answer may have. Raises ContextOverflow when there is room for none."""
        count = len(self.prompt)
        if count >= max_context:
            raise ContextOverflow(
                f"a prompt of {count} tokens leaves no room for an answer in the context of {max_context} tokens: "
                "shorten the prompt"
            )
        return min(self.max_new_tokens, max_context - count)


@dataclass(frozen=True)
class Step:
    """Tokens found in one round (or, first, by the prefill), and why there are no more."""

    tokens: tuple[int, ...]
    finish: FinishReason | None = None


@dataclass(frozen=True, eq=False)
class Offer:
    """What is verified in a round, and how a policy came to it, where there is one.

    tree: for the target.  drafted: the drafter's part of it, None where it was not asked; growth: how that grew.
    """

    tree: DraftTree
    plan: Plan | None = None
    choice: Choice | None = None
    drafted: DraftTree | None = None
    growth: Growth | None = None

    def outcome(self, tokens: Sequence[int], draft_ms: float, verify_ms: float) -> Round:
        """For the policy: `tokens` followed the root."""
        assert self.plan and self.choice  # made by a policy
        return Round(self.plan, self.choice, self.drafted, self.growth, tokens, draft_ms, verify_ms)


class _Unread(NamedTuple):
    """Features [n, D] of pairs that the drafter has yet to be told, from pair `begin` on."""

    begin: int = 0
    parts: tuple[FloatArray, ...] = ()

    @property
    def pairs(self) -> int:
        """n of all parts."""
        return sum(map(len, self.parts))


class Conversation:
    """Both sessions of one conversation, and what they are known to hold.

    tokens: ids whose KV may be kept, then at most one known token more.
    target_length, drafter_length: entries that are certain. They grow after a session's call and shrink before it,
    so an interruption at any point leaves them right, and `rewind` brings the sessions back to them.
    drafter_start: pairs before the drafter's first entry, which it has not read.
    draft_context: pairs that the drafter can hold, None for as many as the target; beyond it decoding is plain.
    sampler: draws the answer at hand, None where it is greedy.
    The drafter is told of new pairs when it is asked for a tree; until then the last of their features wait here.
    """

    def __init__(self, target: TargetSession, drafter: DraftSession | None, draft_context: int | None = None) -> None:
        self.target, self.drafter = target, drafter
        self.draft_context = min(draft_context or target.max_context, target.max_context)
        self.tokens: list[int] = []
        self.target_length = self.drafter_length = self.drafter_start = 0
        self.repeats = RepeatIndex()
        self._found: list[Repeat] = []  # for the tree that is being verified, those too unlikely for it included
        self._unread = _Unread()
        self.sampler: Sampler | None = None

    def rewind(self) -> None:
        """Reset the sessions to the certain entries; an unverified tree is forgotten."""
        self._found = []
        self.target.reset(self.target_length)
        lengths = [(self.target.length, self.target_length)]
        if self.drafter is not None:
            self.drafter.reset(self.drafter_length)
            lengths.append((self.drafter.length, self.drafter_length))
        for length, certain in lengths:
            if length != certain:
                raise DeviceError(f"a session holds {length} entries after a reset to {certain}: open the engine again")

    def forget(self) -> None:
        """Hold nothing, and know nothing of what repeats were worth."""
        self.tokens, self._unread = [], _Unread()
        self.target_length = self.drafter_length = self.drafter_start = 0
        self.repeats = RepeatIndex()
        self.rewind()

    def reuse(self, prompt: Sequence[int], speculate: bool) -> int:
        """Keep the KV of the common prefix; returns its length, which is less than P.

        The last common token is read again: its feature goes with the first token that differs.
        """
        keep = min(_common_prefix(self.tokens, prompt) - 1, self.target_length, self.target.length)
        if self.drafter is not None and speculate:
            if self.unread and keep > self._unread.begin and self._pairs(self.target_length) <= self.draft_context:
                self.read()
            keep = min(keep, self._read_to)
        self.target_length = keep = max(keep, 0)
        self.drafter_length, self._unread = min(self.drafter_length, max(keep - self.drafter_start, 0)), _Unread()
        self.drafter_start = min(self.drafter_start, keep)
        self.tokens = list(prompt)
        self.rewind()
        return self.target_length

    def prefill(self, speculate: bool) -> TargetPass:
        """Run what is left of the prompt; returns the pass of the last chunk, which the drafter has yet to be told."""
        while True:
            begin, end = self.target_length, min(self.target_length + _CHUNK, len(self.tokens))
            result = self.target.prefill(np.array(self.tokens[begin:end], np.int64))
            self.target_length = end
            if end == len(self.tokens):
                return result
            if speculate:
                self.tell(np.array(result.features))  # the next pass may reuse its memory

    @property
    def bus_bytes(self) -> int:
        """Bytes that the drafter has moved between host and device, where it says so."""
        return getattr(self.drafter, "bus_bytes", 0)

    @property
    def unread(self) -> int:
        """Pairs that the drafter has yet to be told."""
        return self._unread.pairs

    @property
    def _read_to(self) -> int:
        return self.drafter_start + self.drafter_length

    def tell(self, features: FloatArray) -> None:
        """The next pairs for the drafter: `features` [n, D], kept while they are among the last, and their n tokens."""
        begin, parts = self._unread if self._unread.parts else (self._read_to, ())
        unread = _Unread(begin, (*parts, features))
        excess = max(unread.pairs - _WINDOW, 0)
        self._unread = _Unread(begin + excess, _without(unread.parts, excess))

    def read(self) -> None:
        """Let the drafter read what waits; where pairs before it were dropped, it forgets those it has read."""
        assert self.drafter is not None
        begin, end = self._unread.begin, self._unread.begin + self.unread
        if begin > self._read_to:
            self.drafter_length, self.drafter_start = 0, begin
            self.drafter.reset()
        tokens, features = np.array(self.tokens[begin + 1 : end + 1], np.int64), np.concatenate(self._unread.parts)
        self.drafter.extend(tokens, features, self.noise())
        self.drafter_length, self._unread = end - self.drafter_start, _Unread()

    def draft(self, limits: TreeLimits, policy: Policy | None = None) -> Offer:
        """A tree below the known token: the drafter's, with repeated text, or that token alone."""
        known = DraftTree.root(self.tokens[-1])
        self._found = []
        if self.drafter is None or limits.width == 1:
            return Offer(known)
        if limits.lookup:
            self._found = self.repeats.find(self.tokens, limits.lookup)
        if policy is None:
            return Offer(self._join(self._propose(limits, None), limits))
        context, most = len(self.tokens) - 1, limits.width
        limits = _narrowed(limits, policy.widest(context, most))
        repeats = self._join(known, limits)
        plan = policy.plan(context, most, repeats, self.unread)
        if not plan.draft:
            choice = policy.choose(plan, repeats)
            return Offer(choice.tree, plan, choice)
        growth = Growth(policy, plan)
        drafted = self._propose(limits, growth)
        choice = policy.choose(plan, self._join(drafted, limits))
        return Offer(choice.tree, plan, choice, drafted, growth)

    def _propose(self, limits: TreeLimits, judge: Judge | None) -> DraftTree:
        assert self.drafter is not None
        if self.unread:
            self.read()
        tree = self.drafter.propose(limits, judge, self.noise())
        known = self.tokens[-1]
        if tree.tokens[0] != known or len(tree) > limits.width:
            raise DeviceError(
                f"the drafter's tree has root {tree.tokens[0]} and {len(tree)} nodes, not root {known} and at most "
                f"{limits.width}: its session is out of step, open the engine again"
            )
        return tree

    def noise(self) -> DraftNoise | None:
        """What the drafter adds to its logits below the known token, the last."""
        if self.sampler is None:
            return None
        sampler, position = self.sampler, len(self.tokens) - 1
        return lambda depth, ids: sampler.ahead(position + depth, ids)

    def _join(self, tree: DraftTree, limits: TreeLimits) -> DraftTree:
        """`tree` and the repeats that were found."""
        if not self._found:
            return tree
        if limits.top_k > 1:
            return graft(tree, self._found, limits.width)
        root = DraftTree.root(int(tree.tokens[0]))
        chains = [graft(root, [found], limits.width) for found in self._found]
        return max([tree, *chains], key=lambda chain: chain.expected_length)  # a chain stays a chain: the best of all

    def commit(self, path: TokenArray, tokens: Sequence[int]) -> None:
        """Keep the nodes of `path`; `tokens` follow its root."""
        self.target.commit(path)
        self.tokens += tokens
        self.target_length += len(path)
        for found in self._found:
            self.repeats.learn(found, tokens)

    def limits(self, asked: TreeLimits | None, known: int, tokens_left: int) -> TreeLimits:
        """The tree that pays after `known` tokens: `asked`, cut to what the answer and the contexts have room for."""
        if asked is None or self.drafter is None:
            return _PLAIN
        depth = min(asked.depth, tokens_left - 1)  # a path of d nodes gives d + 1 tokens
        room = self.draft_context - self._pairs(known)
        lookup = max(0, min(asked.lookup, tokens_left - 1, room))
        width = min(asked.width, self.target.max_context - known + 1)  # the root is known, not yet committed
        if depth < 1 or width < 2 or depth > room:
            return _PLAIN
        if (width, depth, lookup) == (asked.width, asked.depth, asked.lookup):
            return asked
        return replace(asked, width=width, depth=depth, lookup=lookup)

    def _pairs(self, known: int) -> int:
        """Pairs, and the known token, that the drafter holds when it has read all before `known` tokens."""
        dropped = self._unread.begin > self._read_to
        return known - (self._unread.begin if dropped else self.drafter_start)


def decode(conversation: Conversation, request: Request, meter: Meter) -> Generator[Step, None, None]:
    """Generate: one Step from the prefill, then one per round; the last one says why it ended.

    May be abandoned at any point, an interrupt within a session's call included: the conversation stays usable.
    Raises ContextOverflow, and what the sessions raise.
    """
    talk, count = conversation, len(request.prompt)
    tokens_left = request.check_room(talk.target.max_context)
    limits = talk.limits(request.limits, count + 1, tokens_left - 1)
    sampler = Sampler(request.sampling)
    meter.prompt_tokens = count
    try:
        # prefill: the rest of the prompt, and the first token
        talk.sampler = None if request.sampling.greedy else sampler
        meter.cached_tokens = talk.reuse(request.prompt, limits.width > 1)
        result = talk.prefill(limits.width > 1)
        first = sampler.pick(result.logits[-1], count, talk.tokens)
        step = _cut((first,), tokens_left, request.stop_tokens)
        talk.tokens += step.tokens
        meter.new_tokens = len(step.tokens)
        if limits.width > 1 and step.finish is None:
            talk.tell(np.array(result.features))
            limits = talk.limits(request.limits, count + 1, tokens_left - 1)  # it may read the end alone
            if request.scheduler:
                request.scheduler.start(sampled=not request.sampling.greedy)
        meter.lap("prefill")
        meter.first_token()
        yield step

        if talk.unread and limits.width > 1:
            meter.resume()
            talk.read()
            meter.lap("prefill")

        moved = talk.bus_bytes
        while step.finish is None:
            meter.resume()
            tokens_left -= len(step.tokens)
            offer = talk.draft(limits, request.scheduler)
            tree = offer.tree
            draft_ms = meter.lap("draft")

            result = talk.target.verify(tree)
            verify_ms = meter.lap("verify")

            verdict = accept(tree, result.logits, sampler, len(talk.tokens), talk.tokens)
            step = _cut(verdict.tokens, tokens_left, request.stop_tokens)
            features = result.features[verdict.path]  # [A + 1, D], a copy: commit may reuse the pass's memory
            meter.lap("other")

            talk.commit(verdict.path[: len(step.tokens) + 1], step.tokens)
            verify_ms += meter.lap("verify")

            if limits.width > 1:
                if request.scheduler:
                    request.scheduler.learn(offer.outcome(verdict.tokens, draft_ms, verify_ms))
                talk.tell(features[: len(step.tokens)])  # one for each token that is known to follow
            limits = talk.limits(request.limits, len(talk.tokens), tokens_left - len(step.tokens))
            meter.lap("other")
            meter.add_round(len(tree) - 1, min(verdict.accepted, len(step.tokens)))
            meter.bus_bytes = talk.bus_bytes - moved
            meter.new_tokens += len(step.tokens)
            yield step
    finally:
        talk.sampler = None  # and what it keeps
        talk.rewind()


@cache
def _narrowed(limits: TreeLimits, width: int) -> TreeLimits:
    return replace(limits, width=width)


def _cut(tokens: tuple[int, ...], tokens_left: int, stop_tokens: frozenset[int]) -> Step:
    """What counts of a round: up to a stop token, itself left out, or up to the allowed length."""
    for index, token in enumerate(tokens[:tokens_left]):
        if token in stop_tokens:
            return Step(tokens[:index], "stop")
    return Step(tokens[:tokens_left], "length" if len(tokens) >= tokens_left else None)


def _without(parts: tuple[FloatArray, ...], rows: int) -> tuple[FloatArray, ...]:
    """`parts` but for their first `rows` rows."""
    while rows and rows >= len(parts[0]):
        rows, parts = rows - len(parts[0]), parts[1:]
    return (parts[0][rows:], *parts[1:]) if rows else parts


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
