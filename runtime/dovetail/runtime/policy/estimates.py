"""What a policy learns: running means that begin at a prior, and a budget for rounds that may lose.

Times are in plain steps, not in milliseconds, so that they hold on a busy machine and in a longer context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.runtime.errors import InputError

MAX_SLOWDOWN = 0.01  # of the time: the user's --max-slowdown
START = 3.0  # plain steps of the first budget: 2.3% of an answer of 128 tokens
RESERVE = 10.0  # plain steps that a budget holds at most: the replay
HALF_LIFE = 40.0  # rounds after which what was learned counts half: 20 and 50 are worse in tests or the replay
SLOW_HALF_LIFE = 200.0  # rounds, for the price of a token and for repeats: the test of repeats that fail
PRIOR = 3.0  # observations that the drafter's own claim counts for: the replay


@dataclass
class Estimate:
    """A weighted mean that begins at `prior`, which counts for `weight` observations.

    half_life: calls of `fade` after which an observation counts half, so that a doubt is forgotten.
    """

    prior: float
    weight: float
    half_life: float = HALF_LIFE
    _sum: float = 0.0
    _seen: float = 0.0

    @property
    def value(self) -> float:
        """The mean."""
        weight = self.weight + self._seen
        return (self.prior * self.weight + self._sum) / weight if weight else self.prior

    def add(self, value: float, weight: float = 1.0) -> None:
        """An observation."""
        self._sum += value * weight
        self._seen += weight

    def fade(self) -> None:
        """Time has passed."""
        share = 0.5 ** (1.0 / self.half_life)
        self._sum *= share
        self._seen *= share


@dataclass
class Budget:
    """Plain steps that rounds may lose against plain decoding: a conservative bandit.

    share: of the time of every round, which is added.  balance: what is left, at most RESERVE.
    Source: Wu, Shariff, Lattimore, Szepesvari, Conservative Bandits, ICML 2016.
    """

    share: float
    balance: float = START

    def covers(self, loss: float) -> bool:
        """Whether a round may lose so much."""
        return loss <= self.balance

    def add(self, steps: float, gain: float) -> None:
        """A round took `steps`, and gained so much over plain decoding."""
        self.balance = min(self.balance + self.share * steps + gain, RESERVE)


@dataclass
class Experience:
    """What answers of one kind, greedy or sampled, have taught.  Sampled tokens agree with drafts less often.

    price: plain steps that a token takes.  tokens, steps: of a drafted round.
    first, others: depth -> how often a node's best child, or another child, is right over what the drafter claims.
    trees: tokens that trees gave over those expected, without a draft and with one.  The best nodes of many are
    believed too much, so a tree gives less than the sum of its claims.
    children: depth -> share of the probability of nodes at this depth that their children have.
    """

    budget: Budget
    price: Estimate = field(default_factory=lambda: Estimate(1.0, 1.0, SLOW_HALF_LIFE))
    tokens: Estimate = field(default_factory=lambda: Estimate(1.0, PRIOR))
    steps: Estimate = field(default_factory=lambda: Estimate(1.0, PRIOR))
    first: dict[int, Estimate] = field(default_factory=dict)
    others: dict[int, Estimate] = field(default_factory=dict)
    trees: tuple[Estimate, Estimate] = field(
        default_factory=lambda: (Estimate(1.0, PRIOR, SLOW_HALF_LIFE), Estimate(1.0, PRIOR))
    )
    children: dict[int, Estimate] = field(default_factory=dict)

    @property
    def price_of_token(self) -> float:
        """Plain steps that a token is worth: what it has lately taken, at most one."""
        return min(1.0, self.price.value)

    def factor(self, kind: dict[int, Estimate], depth: int) -> float:
        """What a probability at `depth` is multiplied with.  kind: `first` or `others`."""
        return kind[depth].value if depth in kind else 1.0

    def share(self, depth: int) -> float:
        """Share of the probability of nodes at `depth` that their children have; of a new depth, as above it."""
        seen = (self.children[above].value for above in range(depth, -1, -1) if above in self.children)
        return next(seen, 1.0)

    def fade(self, *, repeats: bool) -> None:
        """A round has passed.  repeats: with repeated text, and without a draft."""
        for each in (self.price, self.tokens, self.steps, self.trees[True]):
            each.fade()
        for found in (self.first, self.others, self.children):
            for each in found.values():
                each.fade()
        if repeats:
            self.trees[False].fade()


def check_slowdown(share: float) -> None:
    """Raises InputError for a share of time that is none."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"max_slowdown {share!r} is out of range: give a share from 0 to 1, e.g. 0.01")
