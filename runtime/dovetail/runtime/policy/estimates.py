"""What a scheduler has learned of drafts and of repeats: running means, and records of what came true.

Times are kept in plain steps, not in milliseconds: they stay true when the machine gets busy, or the context longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

MEMORY = 40.0  # rounds after which an average has mostly forgotten
PRICE_MEMORY = 300.0  # the same for the price of a token, which is to be that of the long run
EVIDENCE = 30.0  # visits that the correction of a depth remembers
PRIOR = 3.0  # visits that the drafter's own word counts for
LONG_RUN = 60.0  # drafted rounds after which the long run tells whether drafting pays
LONG_LOSS = 0.06  # of a plain step that a drafted round may lose in the long run
LONG_AGAIN = 40.0  # rounds that the long run remembers while drafting is left
MOST_CAUTION = 6.0  # plain steps
EASING = 0.003  # plain steps of caution that a plain round takes away


@dataclass
class Average:
    """A running mean that starts with the first value and then remembers about `memory` of them."""

    value: float = 0.0
    count: float = 0.0
    memory: float = MEMORY

    def add(self, value: float) -> None:
        self.count = min(self.count + 1.0, self.memory)
        self.value += (value - self.value) / self.count


@dataclass
class Correction:
    """What was expected and what came, of one kind, and what a further expectation of that kind is worth."""

    expected: float = 0.0
    right: float = 0.0
    visits: float = 0.0

    def add(self, expected: float, right: float) -> None:
        self.forget(EVIDENCE - 1.0)
        self.expected, self.right, self.visits = self.expected + expected, self.right + right, self.visits + 1.0

    def forget(self, visits: float) -> None:
        """Remember no more than so many."""
        if self.visits > visits:
            share = visits / self.visits
            self.expected, self.right, self.visits = share * self.expected, share * self.right, visits

    def recalled(self, visits: float) -> Correction:
        """A copy that remembers no more than so many."""
        copy = replace(self)
        copy.forget(visits)
        return copy

    @property
    def factor(self) -> float:
        """What a probability of this kind, as it was before, is multiplied with."""
        return (self.right + PRIOR) / (self.expected + PRIOR)


@dataclass(frozen=True)
class Outcome:
    """What a round gives and takes.  steps: time, in plain steps."""

    tokens: float
    steps: float


@dataclass
class Record:
    """What rounds gave and took, of which about `memory` are remembered."""

    memory: float = MEMORY
    tokens: Average = field(init=False)
    steps: Average = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.steps = Average(memory=self.memory), Average(memory=self.memory)

    @property
    def count(self) -> float:
        return self.tokens.count

    def add(self, each: Outcome) -> None:
        self.tokens.add(each.tokens)
        self.steps.add(each.steps)

    def forget(self, rounds: float) -> None:
        """Remember no more than so many."""
        self.tokens.count = self.steps.count = min(self.count, rounds)

    def worth(self, price: float) -> float:
        """Of such a round, in plain steps, where a token is worth `price` of them."""
        return price * self.tokens.value - self.steps.value


@dataclass
class Experience:
    """What answers of one kind, greedy or sampled, have taught: drafts come true less often where tokens are drawn.

    rounds: all of them, for the price of a token.  drafted: drafted ones, lately; rested: rounds since the last.
    long_run: more of those, without changes of width, and as they would have been where nothing was verified.
    left: the long run has shown that drafting does not pay.  credit: plain steps that trials may lose, None before one.
    corrections: by depth, of a node's best child, and of the others: a drafter may be too sure of the one and right in
    sum.  trees: of whole trees, without the drafter's part and with it: the best of many are not as good as each is
    believed.  children: depth -> share of its nodes that their children take.
    caution: plain steps that repeats must promise beyond the change of width before plain decoding is left for them.
    """

    rounds: Record = field(default_factory=lambda: Record(PRICE_MEMORY))
    drafted: Record = field(default_factory=Record)
    rested: int = 0
    long_run: Record = field(default_factory=lambda: Record(PRICE_MEMORY))
    left: bool = False
    credit: float | None = None
    corrections: dict[int, tuple[Correction, Correction]] = field(default_factory=dict)
    trees: tuple[Correction, Correction] = field(default_factory=lambda: (Correction(), Correction()))
    children: dict[int, Average] = field(default_factory=dict)
    caution: float = 0.0

    def correction(self, depth: int) -> tuple[Correction, Correction]:
        return self.corrections.setdefault(depth, (Correction(), Correction()))

    @property
    def price(self) -> float:
        """Plain steps that a token is worth: what it has lately taken, at most one."""
        return min(1.0, self.rounds.steps.value / self.rounds.tokens.value) if self.rounds.count else 1.0

    def judge_leap(self, gain: float) -> None:
        """From plain decoding to trees of repeats and back has gained so many plain steps; what it lost is asked for.

        Each repeat may seem to pay: those that seem to most are those that are believed in too much.
        """
        self.caution = min(max(self.caution - gain, 0.0), MOST_CAUTION)

    def ease(self) -> None:
        """A plain round has passed: what was wrong once may be right now."""
        self.caution = max(self.caution - EASING, 0.0)

    def judge_long_run(self) -> None:
        """Leave drafting where it has not paid, or come back."""
        if self.left or self.long_run.count >= LONG_RUN:
            self.left = self.long_run.worth(self.price) < self.price - 1.0 - LONG_LOSS
        if self.left:
            self.long_run.forget(LONG_AGAIN)
