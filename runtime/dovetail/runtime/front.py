"""Requests from prompts, and chunks of text from steps: what every engine does with text.

`Front` checks a request as a whole before it is queued or run. `Answer` turns the steps of one
request into chunks.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.loop.sequence import FinishReason, Request, Step
from dovetail.runtime.loop.trace import RoundTrace
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.constraint import Constraint, Constraints, Grammar, grammar_source
from dovetail.runtime.sampling.logprobs import TokenLogprobs
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.text.encoding import Prompt, TextTokenizer, encode_prompt
from dovetail.runtime.text.stop_strings import StopFilter, check_stop_strings
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.limits import LargestTree, TreeLimits


class SamplingOptions(TypedDict, total=False):
    """Fields of SamplingParams, where their defaults are."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...]
    seed: int | None


class RequestOptions(SamplingOptions, total=False):
    """Arguments of a request beside its prompt and length; see Engine.stream, which has their defaults."""

    stop: str | abc.Sequence[str]
    speculate: bool
    raw: bool
    template_options: Mapping[str, Any] | None
    parse_special: bool
    tree: TreeLimits | None
    constraint: Constraint | None
    logprobs: int | None
    trace: bool


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: one round's tokens, and the text that is certain by now."""

    text: str
    token_ids: tuple[int, ...]
    seed: int | None = None  # the one in use, None when greedy
    finish_reason: FinishReason | None = None  # of the last chunk: "length" is no room for more
    metrics: GenerationMetrics | None = None  # of the last chunk
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token id, if asked for
    round: RoundTrace | None = None  # with trace=True; None for the first token


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer. text: without the stop string. token_ids: without the stop token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int | None
    metrics: GenerationMetrics
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token id, if asked for

    @classmethod
    def of(cls, chunks: abc.Sequence[Chunk]) -> GenerationResult:
        """Return the answer of all chunks of a stream that ran to its end."""
        last = chunks[-1]
        assert last.finish_reason and last.metrics
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason,
            seed=last.seed,
            metrics=last.metrics,
            logprobs=tuple(each for chunk in chunks for each in chunk.logprobs),
        )


@dataclass(frozen=True)
class Ask:
    """A checked request: token ids for the loop, and what ends its text."""

    request: Request
    stops: tuple[str, ...]
    calls: bool = False  # whether the text shows the special tokens that mark tool calls


MOST_WIDTH = 64  # nodes of a tree that a request asks for: a drafter's graph has as many tree slots


class Front:
    """Makes requests for one target. Arguments of its methods: see Engine.stream."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        max_context: int,
        tree: TreeLimits,
        scheduler: Policy | None,
        stop_tokens: Iterable[int] | None,
        drafter: Drafter | None,
        largest_tree: LargestTree | None,
    ) -> None:
        """largest_tree: that the target takes, None for any."""
        self._most_children, self._largest_tree = drafter.top_k if drafter else None, largest_tree
        self.tokenizer, self.max_context, self.tree, self.scheduler = tokenizer, max_context, tree, scheduler
        self.stop_tokens = frozenset(tokenizer.eos_token_ids if stop_tokens is None else stop_tokens)
        self._constraints: Constraints | None = None  # made when the first grammar comes

    def ask(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        *,
        stop: str | abc.Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        tree: TreeLimits | None = None,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        trace: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Ask:
        """Return the request. Raises InputError, ContextOverflow."""
        if tree is not None and not isinstance(tree, TreeLimits):
            raise InputError(f"tree {tree!r} is no TreeLimits: give e.g. TreeLimits(width=12)")
        if tree and self._most_children is not None and tree.top_k > self._most_children:
            raise InputError(f"tree top_k {tree.top_k} exceeds the drafter's {self._most_children}: lower it")
        if tree and tree.width > MOST_WIDTH:
            raise InputError(f"tree width {tree.width} is out of range: give {MOST_WIDTH} or less")
        limits = (tree or self.tree) if speculate else None
        if limits and self._largest_tree:
            self._largest_tree.check(limits)
        stops, params = check_stop_strings(stop), SamplingParams(**sampling).seeded()
        for token in dict(params.logit_bias):
            if not self.tokenizer.has_token(token):
                raise InputError(f"token id {token} of logit_bias is none of the target's: give ids of its tokenizer")
        request = Request(
            prompt=tuple(encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)),
            max_new_tokens=max_new_tokens,
            sampling=params,
            stop_tokens=self.stop_tokens,
            limits=limits,
            scheduler=self.scheduler if speculate and tree is None else None,
            constraint=self._checked(constraint),
            logprobs=logprobs,
            trace=trace,
        )
        request.check_room(self.max_context)
        return Ask(request, stops, calls=bool(template_options and template_options.get("tools")))

    def count_tokens(
        self, prompt: Prompt, raw: bool, template_options: Mapping[str, Any] | None, parse_special: bool
    ) -> int:
        """Return the number of tokens of `prompt`, template included. Raises as `ask` does."""
        tokens = encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)
        Request(tuple(tokens), max_new_tokens=1).check_room(self.max_context)
        return len(tokens)

    def constraint(
        self,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Constraint:
        """Return a grammar for answers of this engine, from one of the three; see `grammar_source`.

        Each grammar is compiled once. Raises InputError for a grammar that cannot be used, and
        without llguidance, which the extra `grammar` installs.
        """
        source = grammar_source(json_schema=json_schema, regex=regex, grammar=grammar)
        if self._constraints is None:
            if not isinstance(self.tokenizer, Tokenizer):
                raise InputError("a grammar needs the tokenizer of a pair folder: open one with Engine.from_pretrained")
            self._constraints = Constraints(
                self.tokenizer.definition(), self.tokenizer.vocab_size, self.tokenizer.digest(), self.stop_tokens
            )
        return self._constraints.compile(source)

    def _checked(self, constraint: Constraint | None) -> Constraint | None:
        if constraint is not None and not isinstance(constraint, Constraint):
            raise InputError(f"constraint {constraint!r:.60} is none: make one with engine.constraint(json_schema=...)")
        if isinstance(constraint, Grammar):
            own = self.tokenizer.digest() if isinstance(self.tokenizer, Tokenizer) else None
            if constraint.digest != own:
                raise InputError("this constraint is of another tokenizer: make one with this engine's `constraint`")
        return constraint


class Answer:
    """Turns the steps of one request into chunks of text."""

    def __init__(self, ask: Ask, tokenizer: TextTokenizer, meter: Meter) -> None:
        self._seed, self._meter = ask.request.sampling.seed, meter
        self._stops, self._detokenizer = StopFilter(ask.stops), tokenizer.detokenizer(calls=ask.calls)

    def chunk(self, step: Step) -> Chunk:
        """Return the chunk of a step, up to the first stop string. The last chunk has a finish_reason."""
        pieces, used, finish, stops, meter = list[str](), 0, step.finish, self._stops, self._meter
        for token in step.tokens:
            pieces.append(stops.add(self._detokenizer.add(token)))
            used += 1
            if stops.stopped:
                break
        if finish and not stops.stopped:
            pieces += [stops.add(self._detokenizer.flush()), stops.flush()]
        if stops.stopped:
            finish = "stop"
            meter.new_tokens -= len(step.tokens) - used
        meter.lap("other")
        metrics = meter.metrics() if finish else None
        return Chunk("".join(pieces), step.tokens[:used], self._seed, finish, metrics, step.logprobs[:used], step.round)
