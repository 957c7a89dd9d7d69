"""Estimates that a policy learns, and a budget for rounds that may lose.

Times are plain steps, not milliseconds: they hold on a busy machine and in a longer context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.runtime.errors import InputError

START = 3.0  # plain steps of the first budget: 2.3% of an answer of 128 tokens
RESERVE = 10.0  # plain steps, the most that a budget holds: the replay
HALF_LIFE = 40.0  # rounds after which an observation counts half: 20 and 50 are worse in tests or the replay
SLOW_HALF_LIFE = 200.0  # rounds, for the price of a token and for repeats: the test of repeats that fail
ABOVE = 0.25  # weight of the depth above, in observations: 0.5 fails a test, 0 never drafts a depth again
PRIOR = 3.0  # weight of the drafter's own claim, in observations: the replay


@dataclass
class Estimate:
    """A weighted mean that begins at `prior`, which counts as `weight` observations."""

    prior: float
    weight: float
    half_life: float = HALF_LIFE  # calls of `fade` after which an observation counts half
    _sum: float = 0.0
    _seen: float = 0.0

    @property
    def value(self) -> float:
        return self.after(self.prior)

    def after(self, prior: float) -> float:
        """Return the mean with another prior."""
        weight = self.weight + self._seen
        return (prior * self.weight + self._sum) / weight if weight else prior

    @property
    def seen(self) -> float:
        """Weight of the observations."""
        return self._seen

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum += value * weight
        self._seen += weight

    def fade(self) -> None:
        share = 0.5 ** (1.0 / self.half_life)
        self._sum *= share
        self._seen *= share


ByDepth = dict[int, Estimate]  # depth in the tree -> estimate


@dataclass
class Budget:
    """Plain steps that rounds may lose against plain decoding: a conservative bandit.

    Source: Wu, Shariff, Lattimore, Szepesvari, Conservative Bandits, ICML 2016.
    """

    share: float  # of each round's time, added to the budget
    balance: float = START  # at most RESERVE

    def covers(self, loss: float) -> bool:
        return loss <= self.balance

    def add(self, steps: float, gain: float) -> None:
        """Count a round of `steps` plain steps that gained `gain` over plain decoding."""
        self.balance = min(self.balance + self.share * steps + gain, RESERVE)


@dataclass
class Experience:
    """The estimates and the budget of greedy answers, or of sampled answers, which accept less."""

    budget: Budget
    price: Estimate = field(default_factory=lambda: Estimate(1.0, 1.0, SLOW_HALF_LIFE))  # plain steps a token takes
    tokens: Estimate = field(default_factory=lambda: Estimate(1.0, PRIOR))  # of a drafted round
    steps: Estimate = field(default_factory=lambda: Estimate(1.0, PRIOR))  # plain steps of a drafted round
    first: ByDepth = field(default_factory=dict)  # how often a node's best child is right, over the drafter's claim
    others: ByDepth = field(default_factory=dict)  # the same of its other children
    # Accepted over expected tokens, without and with a draft: the best nodes of many are overestimated.
    trees: tuple[Estimate, Estimate] = field(
        default_factory=lambda: (Estimate(1.0, PRIOR, SLOW_HALF_LIFE), Estimate(1.0, PRIOR))
    )
    children: ByDepth = field(default_factory=dict)  # share of the nodes' probability that their children have

    @property
    def price_of_token(self) -> float:
        """Plain steps that a token is worth: its recent time, at most 1."""
        return min(1.0, self.price.value)

    def factor(self, kind: ByDepth, depth: int) -> float:
        """Return the factor that corrects a probability at `depth`. kind: `first` or `others`."""
        return kind[depth].value if depth in kind else 1.0

    def share(self, depth: int) -> float:
        """Return `children` at `depth`, which begins at the share of the depth above it and fades back to it.

        A depth is observed only if it is drafted. Without the way back one bad draft would end the
        drafts of this depth for good.
        """
        share = 1.0
        for above in range(depth + 1):
            if above in self.children:
                share = self.children[above].after(share)
        return share

    def fade(self, *, repeats: bool) -> None:
        """Fade the estimates after a round. repeats: the round had repeated text and no draft."""
        for each in (self.price, self.tokens, self.steps, self.trees[True]):
            each.fade()
        for found in (self.first, self.others, self.children):
            for each in found.values():
                each.fade()
        if repeats:
            self.trees[False].fade()


def check_slowdown(share: float) -> None:
    """Raise InputError unless `share` is a share of time."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"max_slowdown {share!r} is out of range: give a share from 0 to 1, e.g. 0.01")
