"""Compare plain and speculative decoding, prompt by prompt in one process on the same machine.

Each conversation runs in both modes, one right after the other, from empty caches. The modes
alternate in going first. The comparison covers decoding without the prefill. The two texts may
differ in near ties if equal rows are not computed equally. The target therefore reads every
speculative answer again and chooses each token once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, pairwise, zip_longest
from statistics import median
from typing import Any

from dovetail.runtime.engine import Engine
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.loop.rescore import Choice
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.text.encoding import Prompt
from dovetail.runtime.text.prompts import PromptTurns

WARM_UP_TOKENS = 16
_OF_A_PROMPT = (
    "name", "speedup", "acceptance_length", "new_tokens", "plain_new_tokens", "plain_tokens_per_second",
    "tokens_per_second", "rounds", "other_tokens", "first_other", "largest_margin",
)  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """Sums over generations of one mode, times in ms. decode_ms begins at each first token."""

    new_tokens: int = 0
    later_tokens: int = 0  # tokens after each answer's first, which the prefill gives
    decode_ms: float = 0.0
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    other_ms: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()

    @classmethod
    def of(cls, metrics: GenerationMetrics) -> Totals:
        same = {each.name: getattr(metrics, each.name) for each in fields(cls) if each.name != "later_tokens"}
        return cls(later_tokens=max(metrics.new_tokens - 1, 0), **same)

    def __add__(self, other: Totals) -> Totals:
        pairs = zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        numbers = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        return Totals(**{**numbers, "accepted_per_position": tuple(a + b for a, b in pairs)})

    @property
    def tokens_per_second(self) -> float:
        return self.later_tokens / self.decode_ms * 1e3 if self.decode_ms else 0.0

    @property
    def acceptance_length(self) -> float:
        return 1 + self.accepted / max(self.rounds, 1)

    @property
    def acceptance_per_depth(self) -> tuple[float, ...]:
        """How often the i-th drafted token of a path was kept when all earlier tokens were."""
        reached = (self.rounds, *self.accepted_per_position)
        return tuple(kept / max(tried, 1) for tried, kept in pairwise(reached))

    def per_round(self, total: float) -> float:
        return total / max(self.rounds, 1)


@dataclass(frozen=True)
class Run:
    """One conversation in one mode: the prompts, the token ids of each answer, and the sums."""

    asked: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]
    totals: Totals


@dataclass(frozen=True)
class Paired:
    """One conversation in both modes."""

    conversation: PromptTurns
    plain: Run | None  # None without the plain mode
    speculative: Run
    choices: tuple[Choice, ...] | None = None  # of the target on reading the speculative answers again, in a row

    @property
    def speedup(self) -> float | None:
        """Ratio of decoded tokens per second; None if an answer has no token after its first."""
        if self.plain is None:
            return None
        plain, speculative = self.plain.totals.tokens_per_second, self.speculative.totals.tokens_per_second
        return speculative / plain if plain and speculative else None

    @property
    def others(self) -> dict[int, Choice]:
        """Choices that differ from the answered token, by index over all answers in a row."""
        if self.choices is None:
            return {}
        answered = chain.from_iterable(self.speculative.answers)
        both = enumerate(zip(answered, self.choices, strict=True))
        return {index: choice for index, (token, choice) in both if choice.token != token}


def measure(
    engine: Engine, conversations: Sequence[PromptTurns], request: AnswerSettings, *, plain: bool = True
) -> Iterator[Paired]:
    """Yield every conversation's runs in both modes; without `plain` only the speculative run."""
    modes = (False, True) if plain else (True,)
    for speculate in modes:
        warm_up(engine, conversations[0], request, speculate)
    for index, conversation in enumerate(conversations):
        order = modes if index % 2 == 0 else modes[::-1]
        runs = {speculate: converse(engine, conversation.turns, request, speculate) for speculate in order}
        yield Paired(conversation, runs.get(False), runs[True])


def read_again(engine: Engine, pair: Paired, request: AnswerSettings) -> Paired:
    """Return `pair` with the target's choice at each place, given all text before the place."""
    sampling, run = asdict(request.sampling()), pair.speculative
    found = list[Choice]()
    for asked, answer in zip(run.asked, run.answers, strict=True):
        found += engine.choices(asked, answer, raw=request.raw, **sampling)
    return replace(pair, choices=tuple(found))


def warm_up(engine: Engine, conversation: PromptTurns, request: AnswerSettings, speculate: bool) -> None:
    """Generate a short answer that does not count, because an engine's first passes are slower."""
    short = replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
    converse(engine, conversation.turns[:1], short, speculate)


def converse(engine: Engine, turns: Sequence[str], request: AnswerSettings, speculate: bool) -> Run:
    """Ask the turns one by one, from an empty cache. Each turn sees the earlier answers."""
    engine.reset()
    messages: list[dict[str, str]] = []
    prompts, answers, totals = list[Prompt](), [], Totals()
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        asked: Prompt = turn if len(messages) == 1 else list(messages)
        result = engine.generate(asked, **replace(request, speculate=speculate).keywords())
        messages.append({"role": "assistant", "content": result.text})
        prompts.append(asked)
        answers.append(tuple(int(token) for token in result.token_ids))
        totals += Totals.of(result.metrics)
    return Run(tuple(prompts), tuple(answers), totals)


def summary(pairs: Sequence[Paired]) -> dict[str, Any]:
    """Return the figures of a benchmark. Figures that need the plain mode are None without it.

    speedup: median over prompts of the paired ratio, None if no answer has a second token.
    Speeds: all decoded tokens over all decoding time. Times of speculative rounds: ms per round.
    accepted_per_position: per round. acceptance_per_depth: per round that reached the depth.
    other_tokens: those of new_tokens for which the target chooses another token on reading again.
    first_other: index of the first such token.
    largest_margin: the most logits by which the target's choice exceeds the answer's token. None
    without other tokens, or if more than logits decide.
    """
    return {**_figures(pairs), "prompts": [prompt_json(pair) for pair in pairs]}


def _figures(pairs: Sequence[Paired]) -> dict[str, Any]:
    plain = sum((pair.plain.totals for pair in pairs if pair.plain), Totals())
    compared = all(pair.plain for pair in pairs)
    ours = sum((pair.speculative.totals for pair in pairs), Totals())
    ratios = [pair.speedup for pair in pairs if pair.speedup is not None]
    others = [choice for pair in pairs for choice in pair.others.values()]
    margins = [choice.margin for choice in others if choice.margin is not None]
    return {
        "speedup": _rounded(median(ratios)) if ratios else None,
        "acceptance_length": _rounded(ours.acceptance_length),
        "accepted_per_position": [_rounded(ours.per_round(count)) for count in ours.accepted_per_position],
        "acceptance_per_depth": [_rounded(rate) for rate in ours.acceptance_per_depth],
        "plain_tokens_per_second": _rounded(plain.tokens_per_second) if compared else None,
        "tokens_per_second": _rounded(ours.tokens_per_second),
        "draft_ms": _rounded(ours.per_round(ours.draft_ms)),
        "verify_ms": _rounded(ours.per_round(ours.verify_ms)),
        "other_ms": _rounded(ours.per_round(ours.other_ms)),
        "plain_verify_ms": _rounded(plain.per_round(plain.verify_ms)) if compared else None,
        "plain_other_ms": _rounded(plain.per_round(plain.other_ms)) if compared else None,
        "prefill_ms": _rounded(ours.prefill_ms / max(len(pairs), 1)),
        "rounds": ours.rounds,
        "nodes_per_round": _rounded(1 + ours.per_round(ours.drafted)),
        "new_tokens": ours.new_tokens,
        "other_tokens": len(others),
        "largest_margin": _rounded(max(margins)) if margins else None,
    }


def prompt_json(pair: Paired) -> dict[str, Any]:
    """Return a conversation's figures; see `summary`."""
    figures = {
        **_figures([pair]),
        "name": pair.conversation.name,
        "plain_new_tokens": pair.plain.totals.new_tokens if pair.plain else None,
        "first_other": min(pair.others, default=None),
    }
    return {name: figures[name] for name in _OF_A_PROMPT}


def _rounded(value: float) -> float:
    return round(value, 4)
