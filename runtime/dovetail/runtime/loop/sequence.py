"""One text: its tokens, what target and drafter hold of it, and the current answer.

Axes: P prompt tokens, N nodes, n context pairs, D feature size. Positions: see target/session.py.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np

from dovetail.runtime.drafter.session import Drafter, DraftNoise
from dovetail.runtime.drafter.window import window
from dovetail.runtime.errors import ContextOverflow, DeviceError, DovetailError, InputError
from dovetail.runtime.loop.accept import Verdict, accept
from dovetail.runtime.loop.constrain import constrained
from dovetail.runtime.loop.trace import RoundTrace, trace
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.constraint import Constraint, Matcher
from dovetail.runtime.sampling.logprobs import TokenLogprobs
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray, common_prefix
from dovetail.runtime.system.bounds import TOKEN_MOST, check_whole
from dovetail.runtime.target.session import Target, TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import SIZES, EarlierTexts, Repeat, RepeatIndex

FinishReason = Literal["stop", "length"]

_CHUNK = 256  # prompt tokens per pass
_PLAIN = TreeLimits(width=1, depth=0, top_k=1, lookup=0)


@dataclass(frozen=True)
class Request:
    """One generation on token ids."""

    prompt: tuple[int, ...]  # P ids, at least one
    max_new_tokens: int  # at least 1; the context may end the answer earlier
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_tokens: frozenset[int] = frozenset()  # end the answer and are no part of it
    limits: TreeLimits | None = None  # None is plain decoding, one node per pass
    scheduler: Policy | None = None  # shapes each tree within the limits; None lets trees grow up to them
    constraint: Constraint | None = None  # the grammar of the answer
    logprobs: int | None = None  # alternatives to report with each token; 0 reports the chosen token alone
    trace: bool = False  # whether each Step of a round tells what the round did

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt is empty: give at least one token")
        count = self.max_new_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"max_new_tokens {count!r} is out of range: give a whole number, 1 or more")
        if self.logprobs is not None:
            remedy = "give how many alternatives to report, 0 for none"
            check_whole("logprobs", self.logprobs, InputError, remedy, least=0, most=TOKEN_MOST)

    def check_room(self, max_context: int) -> int:
        """Return how many tokens the answer may have. Raises ContextOverflow for none."""
        count = len(self.prompt)
        if count >= max_context:
            raise ContextOverflow(
                f"a prompt of {count} tokens leaves no room for an answer in the context of {max_context} tokens: "
                "shorten the prompt"
            )
        return min(self.max_new_tokens, max_context - count)


@dataclass(frozen=True)
class Step:
    """Tokens of one round, or first of the prefill, and why the answer ends with them."""

    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    stop: int | None = None  # the stop token that ended the answer, which is not in `tokens`
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if the request asks for them
    error: DovetailError | None = None  # that ended the answer
    round: RoundTrace | None = None  # if the request asks for it; None for the prefill


@dataclass(frozen=True, eq=False)
class Outlook:
    """A text before its tree is drafted."""

    limits: TreeLimits  # of the tree; a width of 1 leaves no room for one
    repeats: DraftTree  # the known token, with repeated text below it


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a pass over a tree."""

    verdict: Verdict
    step: Step  # the part that counts for the answer
    features: FloatArray  # [A + 1, D], a copy, of accepted nodes

    def traced(self, tree: DraftTree, draft_ms: float, verify_ms: float) -> Step:
        """Return the step with the record of its round."""
        known = self.step.tokens if self.step.stop is None else (*self.step.tokens, self.step.stop)
        return replace(self.step, round=trace(tree, self.verdict.path, known, draft_ms, verify_ms))


class Sequence:
    """One text on a target and, if there is one, a drafter. It outlives an answer.

    `length` grows after a call of the target and shrinks before one. An interrupt at any point
    therefore leaves it right, and `rewind` brings both sessions back to it.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None = None, *, lookup_cache: int = 0, id: SequenceId | None = None
    ) -> None:
        """lookup_cache: tokens of earlier texts that repeats may continue too. id: None opens a new one."""
        self.target, self.id = target, target.open() if id is None else id
        self.window = window(drafter, self.id) if drafter else None
        self.tokens: list[int] = []  # ids whose KV may be kept, then at most one known token
        self.length = 0  # tokens whose KV the target certainly holds
        self.unread = 0  # tokens of the prompt that the target has not read
        self.prompted = 0  # first tokens that the target reads, or has read, as a prompt
        self.room = 0  # tokens that the answer may still have
        self.request: Request | None = None
        self.sampler: Sampler | None = None  # of the current answer
        self.matcher: Matcher | None = None  # of the current answer, if it has a grammar; stands after `tokens`
        self.speculates = False  # whether the current answer is drafted
        self.repeats, self.earlier = RepeatIndex(), EarlierTexts(lookup_cache)
        self._found: list[Repeat] = []  # for the current tree, repeats too unlikely for it included

    def fork(self, keep: int) -> Sequence:
        """Return a new sequence that begins as this one does, after at most `keep` tokens.

        Its drafter may go on with the pairs that this window keeps.
        """
        drafter = self.window.drafter if self.window else None
        new = Sequence(self.target, drafter, id=self.target.fork(self.id, min(keep, self.shareable)))
        new.length = new.prompted = self.target.length(new.id)
        new.tokens = self.tokens[: new.length]
        if new.window and self.window:
            new.window.follow(self.window, new.length)
        return new

    @property
    def shareable(self) -> int:
        """First tokens whose KV is that of any prompt. Tokens of an answer have other bits."""
        return min(self.length, self.prompted)

    def begin(self, request: Request, sampler: Sampler | None = None) -> int:
        """Turn to a request. Return how many of its tokens are held. Raises ContextOverflow."""
        self.room = request.check_room(self.target.max_context)
        self.request = request
        self.sampler = sampler or Sampler(request.sampling, prompt_tokens=len(request.prompt))
        self.matcher = request.constraint.begin() if request.constraint else None
        self.speculates = self._limits(len(request.prompt) + 1, self.room - 1).width > 1
        return self._reuse(request.prompt)

    def _reuse(self, prompt: abc.Sequence[int]) -> int:
        """Keep the KV of the common prefix and return its length, which is less than P.

        The target reads the last common token again: its feature goes with the next, other token.
        """
        shared = common_prefix(self.tokens, prompt)
        if shared < len(self.tokens):  # the new text repeats what both share, so the rest is kept, and a run before it
            self.earlier.add(self.tokens[max(shared - max(SIZES), 0) :])
        if not shared == len(self.tokens) == self.length < len(prompt):  # a fork: no other token followed
            shared -= 1
        keep = max(min(shared, self.shareable), 0)
        if self.window and self.speculates:
            keep = self.window.reach(keep)
        self.length = keep
        if self.window:
            self.window.cut(keep)
        self.tokens, self.unread, self.prompted = list(prompt), len(prompt) - keep, len(prompt)
        self.rewind()
        return keep

    def prefill(self) -> TargetPass:
        """Run the rest of the prompt. Return the pass of the last chunk, for `first`."""
        while True:
            begin, end = self.length, min(self.length + _CHUNK, len(self.tokens))
            result = self.target.prefill(self.id, np.array(self.tokens[begin:end], np.int64))
            self.length = end
            if end == len(self.tokens):
                return result
            self.tell(result.features)

    @property
    def unread_answer(self) -> bool:
        """Whether the target reads a part of the answer next, after `drop`: as a chain, for the bits of an answer."""
        return 0 < self.unread <= len(self.tokens) - self.prompted

    def read(self, count: int, result: TargetPass) -> Step:
        """Count `count` tokens as read by a pass. Return the first token if the prompt ends there."""
        self.unread -= count
        if not self.unread:
            return self.first(result)
        self.length += count
        self.tell(result.features)
        return Step(())

    def drop(self) -> None:
        """Give up all KV in the middle of an answer. The target reads the text again, the answer so far included."""
        self.length, self.unread = 0, len(self.tokens)
        if self.window:
            self.window.cut(0)
        self.rewind()

    def park(self) -> None:
        """Leave the answer, and keep the prompt's KV and last features for texts that begin as this one does."""
        self.sampler = self.request = self.matcher = None
        self.length = self.shareable
        del self.tokens[self.length :]
        if self.window:
            self.window.cut(self.length)
            self.window.park()
        self.rewind()

    def first(self, result: TargetPass) -> Step:
        """Return the first token of the answer. result: the pass that read the prompt's end."""
        self.length = len(self.tokens)
        step = self._cut(self._choose(DraftTree.root(self.tokens[-1]), result.logits[-1:]))
        self._append(step.tokens)
        if step.tokens:
            self.tell(result.features)
        return step

    def outlook(self, policy: Policy | None = None, least: float = 0.0) -> Outlook:
        """Return the limits of the next tree, and the tree of repeated text alone.

        least: the least probability of repeated text. Above 1 the tree is the known token, whatever a
        grammar forces.
        """
        known, limits = DraftTree.root(self.tokens[-1]), self._limits(len(self.tokens), self.room)
        self._found = []
        if limits.width == 1 or least > 1.0:
            return Outlook(limits, known)
        if limits.lookup:
            self._found = self.repeats.find(self.tokens, limits.lookup, self.earlier, least)
        if policy:
            limits = _narrowed(limits, policy.widest(len(self.tokens) - 1, limits.width))
        return Outlook(limits, self.join(known, limits))

    def accept(self, tree: DraftTree, result: TargetPass) -> Found:
        """Choose the target's tokens along `tree`, and cut them to the answer's room."""
        verdict = self._choose(tree, result.logits)
        return Found(verdict, self._cut(verdict), result.features[verdict.path])

    def _choose(self, tree: DraftTree, logits: FloatArray) -> Verdict:
        assert self.request and self.sampler
        known, logprobs = len(self.tokens), self.request.logprobs
        try:
            return accept(tree, logits, self.sampler, known, self.tokens, self.matcher, logprobs)
        except DovetailError as error:  # of this request alone: other texts of the pass go on
            return Verdict(np.zeros(1, np.int64), (), error=error)

    def commit(self, path: TokenArray, tokens: abc.Sequence[int]) -> None:
        """Keep the nodes of `path`. tokens: those that follow its root."""
        self.target.commit(self.id, path)
        self._append(tokens)
        self.length += len(path)
        for found in self._found:
            self.repeats.learn(found, tokens)

    def tell(self, features: FloatArray) -> None:
        """Add context pairs for the drafter: a copy of `features` [n, D], and their n tokens."""
        if self.window and self.speculates:
            self.window.add(features)

    @property
    def waiting(self) -> int:
        return self.window.waiting if self.window else 0

    @property
    def bus_bytes(self) -> int:
        return self.target.bus_bytes + (self.window.drafter.report.bus_bytes if self.window else 0)

    def flush(self) -> None:
        if self.window and self.speculates:
            self.window.flush(self.tokens, self.noise())

    def noise(self) -> DraftNoise | None:
        """Return the noise for the drafter's logits below the last token; None without sampling."""
        if self.sampler is None or self.sampler.params.greedy:
            return None
        sampler, position = self.sampler, len(self.tokens) - 1
        return lambda depth, ids: sampler.ahead(position + depth, ids)

    def rewind(self) -> None:
        """Bring both sessions back to `length`, without an uncommitted tree. Raises DeviceError."""
        self._found = []
        self.target.rewind(self.id, self.length)
        if (held := self.target.length(self.id)) != self.length:
            raise DeviceError(f"the target holds {held} tokens after a rewind to {self.length}: open the engine again")
        if self.window:
            self.window.rewind()

    def end(self) -> None:
        """Leave the current answer, finished or not."""
        self.sampler, self.matcher = None, None  # frees their noise and masks too
        self.rewind()

    def forget(self) -> None:
        """Drop the text, earlier texts and the counts of right repeats."""
        self.tokens, self.length, self.prompted, self.speculates = [], 0, 0, False
        if self.window:
            self.window.cut(0)
        self.repeats, self.earlier = RepeatIndex(), EarlierTexts(self.earlier.capacity)
        self.rewind()

    def close(self) -> None:
        """Free the sequence's number and KV. No further call is possible."""
        if self.window:
            self.window.cut(0)
            self.window.rewind()
        self.target.close(self.id)

    def _limits(self, known: int, room: int) -> TreeLimits:
        """Return the limits of a tree after `known` tokens: the request's, cut to the `room`."""
        asked = self.request.limits if self.request else None
        if asked is None or not (self.window or asked.lookup or self.matcher):
            return _PLAIN
        depth, lookup = min(asked.depth, room - 1), min(asked.lookup, room - 1)  # a path of d nodes gives d + 1 tokens
        width = min(asked.width, self.target.max_context - known + 1)  # the root is known, not yet committed
        if depth < 1 or width < 2:
            return _PLAIN
        if (width, depth, lookup) == (asked.width, asked.depth, asked.lookup):
            return asked
        return replace(asked, width=width, depth=depth, lookup=lookup)

    def propose(self, limits: TreeLimits, judge: Judge | None) -> DraftTree:
        """Return the drafter's tree, the known token alone without a drafter."""
        if self.window is None:
            return DraftTree.root(self.tokens[-1])
        return self.usable(self.window.propose(self.tokens, limits, judge, self.noise()), limits)

    def usable(self, tree: DraftTree, limits: TreeLimits) -> DraftTree:
        """Return the part of the drafter's tree that the grammar allows. Raises DeviceError for a wrong tree."""
        known = self.tokens[-1]
        if tree.tokens[0] != known or len(tree) > limits.width:
            raise DeviceError(
                f"the drafter's tree has root {tree.tokens[0]} and {len(tree)} nodes, not root {known} and at most "
                f"{limits.width}: its session is out of step, open the engine again"
            )
        return tree

    def join(self, tree: DraftTree, limits: TreeLimits) -> DraftTree:
        """Return `tree` with the repeated text of the last `outlook`, as the grammar allows and forces it."""
        if self.matcher is None and not self._found:
            return tree
        if limits.top_k > 1:
            if self.matcher is None:
                return graft(tree, self._found, limits.width)
            # Twice the width, because the grammar refuses some of the nodes.
            return self._constrained(graft(tree, self._found, 2 * limits.width), limits.width)
        root = DraftTree.root(int(tree.tokens[0]))
        chains = [tree, *(graft(root, [found], limits.width) for found in self._found)]
        chains = [self._constrained(chain, limits.width, chain=True) for chain in chains] if self.matcher else chains
        return max(chains, key=lambda chain: chain.expected_length)  # a chain stays a chain: the best of all

    def _constrained(self, tree: DraftTree, width: int, *, chain: bool = False) -> DraftTree:
        """Return `tree` as the grammar allows and forces it, the root alone if the grammar fails on a path."""
        assert self.matcher and self.request and self.request.constraint
        try:
            largest = None if chain else self.target.largest_tree  # a chain may be longer
            return constrained(tree, self.matcher, width, largest.depth if largest else None)
        except InputError:  # the target may take another path
            self.matcher = self.request.constraint.begin()
            for token in self.tokens[len(self.request.prompt) :]:
                self.matcher.advance(token)
            return DraftTree.root(self.tokens[-1])

    def _cut(self, verdict: Verdict) -> Step:
        """Return the tokens of a round that count: those before a stop token, within the room."""
        assert self.request
        if verdict.error:
            return Step((), "stop", error=verdict.error)
        tokens, logprobs = verdict.tokens[: self.room], verdict.logprobs[: self.room]
        for index, token in enumerate(tokens):
            if token in self.request.stop_tokens:
                return Step(tokens[:index], "stop", token, logprobs[:index])
        if verdict.complete and len(tokens) == len(verdict.tokens):
            return Step(tokens, "stop", logprobs=logprobs)
        return Step(tokens, "length" if len(tokens) >= self.room else None, logprobs=logprobs)

    def _append(self, tokens: abc.Sequence[int]) -> None:
        self.tokens += tokens
        self.room -= len(tokens)


@cache
def _narrowed(limits: TreeLimits, width: int) -> TreeLimits:
    return replace(limits, width=width)
