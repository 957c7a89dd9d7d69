"""Many texts that share the passes of one target: requests join and leave between rounds.

Axes: n rows of one text in a pass, D feature size.

A pass verifies a tree for each text that is being written, and reads a part of the prompts that are
waiting. A text is the same tokens as alone, because a row depends on the tokens before it alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, MutableSequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import numpy as np

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.prefixes import Prefixes
from dovetail.runtime.loop.round import Offer, draft
from dovetail.runtime.loop.sequence import Found, Request, Sequence, Step
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.target.session import Target, TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree

PROMPT_TOKENS = 512  # prompt tokens of a pass without answers
SHARED_TOKENS = 64  # prompt tokens of a pass with answers, which wait for it
AGAIN_TOKENS = 64  # tokens of dropped answers that a pass reads: each computes its logits
SPARE = 32  # tokens: a text in a pass may begin a block of KV


@dataclass(eq=False)
class Ticket:
    """A request of a batch."""

    request: Request
    sampler: Sampler | None = None  # in place of the request's own
    meter: Meter = field(default_factory=Meter)
    sequence: Sequence | None = None  # None before the first pass and after the last
    slot: int = 0  # while it runs
    turn: int = 0  # when it began to run: how many did before


@dataclass(frozen=True, eq=False)
class Advance:
    """The result of a pass for one text."""

    ticket: Ticket
    step: Step  # without tokens while the prompt is read
    features: FloatArray  # [n, D], a copy, of the tokens that were run and kept


class SequenceBatch:
    """Continuous batching with a tree for each text."""

    def __init__(
        self,
        target: Target,
        slots: int,
        drafter: Drafter | None = None,
        policy: Policy | None = None,
        *,
        share_prefixes: bool = False,
        prompt_tokens: int = SHARED_TOKENS,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """slots: the most texts at a time. policy: of requests with a scheduler, which it replaces.

        share_prefixes: prompts of texts that have ended stay, as far as there is memory, for prompts that
        begin as they do. prompt_tokens: of a pass with answers, which wait for it. clock: seconds.
        """
        self.target, self.slots, self.policy, self._drafter = target, slots, policy, drafter
        self._prompt_tokens, self._clock = prompt_tokens, clock
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []  # in the order of their slots
        self._turns = 0
        self.prefixes = Prefixes(share_prefixes)
        self._started: tuple[bool, int] | None = None  # what the policy was told last

    def add(self, request: Request, sampler: Sampler | None = None) -> Ticket:
        """Queue a request. Raises ContextOverflow for a prompt that leaves no room."""
        request.check_room(self.target.max_context)
        self.waiting.append(ticket := Ticket(request, sampler, Meter(clock=self._clock)))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, queued or running, and free its KV; one that has ended is no error."""
        for tickets in (self.waiting, self.running):
            if ticket in tickets:
                self._leave(ticket, tickets)

    def run(
        self, requests: Iterable[Request], new_sampler: Callable[[Request], Sampler] | None = None
    ) -> Generator[Advance, None, None]:
        """Answer every request. Yield the advances pass by pass.

        new_sampler: makes the sampler of each request in place of its own. Raises ContextOverflow,
        and the target's errors.
        """
        coming = iter(requests)
        try:
            while True:
                for request in islice(coming, self.slots - len(self.running) - len(self.waiting)):
                    self.add(request, new_sampler(request) if new_sampler else None)
                if not self.running and not self.waiting:
                    return
                yield from self.step()
        finally:
            self.clear()

    def clear(self) -> None:
        """Forget all requests and all kept texts."""
        for ticket in [*self.waiting, *self.running]:
            self.cancel(ticket)
        self.prefixes.clear()

    def step(self) -> list[Advance]:
        """Run one pass. Return what came of it for each text. Raises the sessions' errors."""
        self._admit()
        self._make_room()
        texts = [(ticket, ticket.sequence) for ticket in self.running if ticket.sequence]
        writing = [(ticket, text) for ticket, text in texts if not text.unread]
        reading = self._parts([(ticket, text) for ticket, text in texts if text.unread], bool(writing))
        if not texts:
            return []

        begin = self._clock()
        offers = self._draft([text for _, text in writing])
        drafted = self._clock()
        trees = {id: tree for offer, group in offers for id, tree in zip(_ids(group), offer.trees, strict=True)}
        prompts, again = dict[SequenceId, TokenArray](), dict[SequenceId, DraftTree]()
        for _, text, count in reading:
            tokens = np.array(text.tokens[text.length : text.length + count], np.int64)
            if text.unread_answer:
                again[text.id] = DraftTree.chain(tokens)
            else:
                prompts[text.id] = tokens
        rows = sum(offer.rows or len(offer.trees) for offer, _ in offers)
        if again:  # of few sizes, for which the target prepares its kernels
            rows += AGAIN_TOKENS
        passes = self.target.verify(trees | again, prompts, rows=rows)
        verified = self._clock()
        draft_ms, verify_ms = (drafted - begin) * 1e3, (verified - drafted) * 1e3

        found, counts, steps = dict[SequenceId, Found](), {text.id: count for _, text, count in reading}, []
        for ticket, text in texts:  # in the order of the slots, which samplers that share numbers depend on
            if text.id in trees:
                found[text.id] = text.accept(trees[text.id], passes[text.id])
            elif text.id in prompts:
                steps.append((ticket, text, *_read(text, counts[text.id], passes[text.id])))
        kept = {id: TargetPass(np.array(passes[id].logits[-1:]), np.array(passes[id].features)) for id in again}
        for ticket, text in writing:
            one = found[text.id]
            text.commit(one.verdict.path[: len(one.step.tokens) + 1], one.step.tokens)
            step = one.traced(trees[text.id], draft_ms, verify_ms) if ticket.request.trace else one.step
            steps.append((ticket, text, step, one.features[: len(step.tokens) + 1]))
        for ticket, text, count in reading:
            if text.id in again:
                self.target.commit(text.id, np.arange(count))
                steps.append((ticket, text, *_read(text, count, kept[text.id])))
        committed = self._clock()

        failed = any(one.step.error for one in found.values())
        outcome = None
        if self.policy and len(offers) == 1 and not failed:
            (offer, group), alone_ms = offers[0], None if reading else verify_ms
            if outcome := offer.outcome([found[text.id].verdict.tokens for text in group], draft_ms, alone_ms):
                self.policy.learn(outcome)
        if reading or not outcome:
            self._started = None  # the policy starts again: the pass had other rows than its trees'
        for ticket, text in writing:
            one = found[text.id]
            text.tell(one.features[: len(one.step.tokens)])
            ticket.meter.add_round(len(trees[text.id]) - 1, min(one.verdict.accepted, len(one.step.tokens)))
        for ticket, text, step, _ in steps:
            self._count(ticket, text, step, draft_ms, verify_ms, (committed - verified) * 1e3)
        advances = [Advance(ticket, step, features) for ticket, _, step, features in steps]
        for each in advances:
            if each.step.finish:
                self._leave(each.ticket, self.running)
        return advances

    def texts(self) -> list[Sequence]:
        """Return the running texts."""
        return [ticket.sequence for ticket in [*self.running] if ticket.sequence]

    # --- who takes part

    def _admit(self) -> None:
        """Give free slots to the requests that wait, in their order."""
        for ticket in [*self.waiting]:
            if len(self.running) >= self.slots:
                return
            if self.prefixes.is_being_read(ticket.request.prompt, self.texts()):
                continue  # the rounds until the prefix is read are fewer than without it
            if self.running and not self._has_room(ticket):
                return
            if not ticket.sequence:
                self._begin(ticket)
            self.waiting.remove(ticket)
            self._turns += 1
            taken = {other.slot for other in self.running}
            ticket.turn, ticket.slot = self._turns, next(slot for slot in range(self.slots) if slot not in taken)
            self.running.append(ticket)
            self.running.sort(key=lambda each: each.slot)

    def _begin(self, ticket: Ticket) -> None:
        request, meter = ticket.request, ticket.meter
        source, keep = self.prefixes.best(request.prompt, self.texts())
        sequence = source.fork(keep) if source else Sequence(self.target, self._drafter)
        try:
            meter.cached_tokens = sequence.begin(request, ticket.sampler)
        except BaseException:
            sequence.close()
            raise
        ticket.sequence, meter.prompt_tokens = sequence, len(request.prompt)
        meter.queue_ms = meter.lap("other")
        meter.add("other", -meter.queue_ms)

    def _has_room(self, ticket: Ticket) -> bool:
        """Whether there is memory for the text so far, after ended texts that others begin as."""
        count = len(ticket.sequence.tokens if ticket.sequence else ticket.request.prompt)
        while (short := self.target.room < count + self._needed() + SPARE) and self.prefixes.evict():
            pass
        return not short

    def _make_room(self) -> None:
        """Drop kept texts, then the KV of the newest texts, until the pass has memory.

        A dropped text waits at the head of the queue, and is read again.
        """
        while self.running and self.target.room < self._needed():
            if self.prefixes.evict():
                continue
            if len(self.running) == 1:
                return  # the target says what is wrong
            ticket = max(self.running, key=lambda each: each.turn)
            self.running.remove(ticket)
            assert ticket.sequence
            ticket.sequence.drop()
            self.waiting.appendleft(ticket)

    def _needed(self) -> int:
        """Return tokens of memory that the next pass may take.

        The target has room for the paths of the policy's trees. Each path of another tree may take
        two blocks.
        """
        texts = self.texts()
        writing = any(not text.unread for text in texts)
        unread = min(sum(text.unread for text in texts), self._prompt_tokens if writing else PROMPT_TOKENS)
        nodes = sum(
            text.request.limits.width for text in texts if text.request and text.request.limits and self._is_fixed(text)
        )
        return unread + (len(texts) + 2 * nodes) * SPARE

    def _parts(self, reading: list[tuple[Ticket, Sequence]], writing: bool) -> list[tuple[Ticket, Sequence, int]]:
        """Return how many tokens of each prompt the pass reads: equal shares, short prompts first."""
        left, again, parts = self._prompt_tokens if writing else PROMPT_TOKENS, AGAIN_TOKENS, []
        ordered = sorted(reading, key=lambda pair: pair[1].unread)
        for index, (ticket, text) in enumerate(ordered):
            of_prompt = text.unread - len(text.tokens) + text.prompted
            unread = min(text.unread, again) if text.unread_answer else of_prompt
            count = min(unread, left // (len(ordered) - index))
            again -= count * text.unread_answer
            if count:
                parts.append((ticket, text, count))
                left -= count
        return parts

    def _leave(self, ticket: Ticket, tickets: MutableSequence[Ticket]) -> None:
        tickets.remove(ticket)
        text, ticket.sequence = ticket.sequence, None
        if text:
            self.prefixes.keep(text)

    # --- a round

    def _draft(self, writing: list[Sequence]) -> list[tuple[Offer, list[Sequence]]]:
        """Return trees for the texts: of those that the policy shapes together, then of each other."""
        if not writing:
            return []
        fixed = [text for text in writing if self._is_fixed(text)]
        planned = [text for text in writing if text not in fixed]
        offers = []
        if planned:
            assert self.policy
            sampled = any(text.sampler and not text.sampler.params.greedy for text in planned)
            if (now := (sampled, len(planned))) != self._started:
                self._started = now
                self.policy.start(*now)
            offers.append((draft(planned, self.policy), planned))
        return offers + ([(draft(fixed), fixed)] if fixed else [])

    def _is_fixed(self, text: Sequence) -> bool:
        """Whether the text's trees grow to limits of their own. A text without trees is the policy's too."""
        request = text.request
        return self.policy is None or (request is not None and request.limits is not None and request.scheduler is None)

    def _count(
        self, ticket: Ticket, text: Sequence, step: Step, draft_ms: float, verify_ms: float, other_ms: float
    ) -> None:
        meter = ticket.meter
        first = not meter.new_tokens
        meter.add("draft", 0.0 if first else draft_ms)
        meter.add("prefill" if first else "verify", verify_ms + (draft_ms if first else 0.0))
        meter.add("other", other_ms)
        meter.new_tokens += len(step.tokens)
        if first and (step.tokens or step.finish):
            meter.first_token()


def _ids(texts: Iterable[Sequence]) -> list[SequenceId]:
    return [text.id for text in texts]


def _read(text: Sequence, count: int, result: TargetPass) -> tuple[Step, FloatArray]:
    features = np.array(result.features)
    return text.read(count, result), features
