"""Sample-and-match is lossless: checked by exact enumeration of every draw, not by sampling.

Axes: N nodes of a tree, V vocabulary. "The target's own text" is autoregressive: one token after the other,
each from the processed distribution, computed here by a second, naive implementation in plain Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime.loop.accept import Verdict, accept
from dovetail.runtime.sampling.noise import gumbel_noise
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.testing.constraint import ScriptedConstraint
from dovetail.runtime.tree.draft_tree import DraftTree

CONTEXT: tuple[int, ...] = (0, 0)  # what came before, then the root: the other tokens are not penalised yet
SETTINGS = {
    "plain": SamplingParams(temperature=1.0, seed=0),
    "temperature": SamplingParams(temperature=0.6, seed=0),
    "top-k": SamplingParams(temperature=1.0, top_k=2, seed=0),
    "top-p": SamplingParams(temperature=1.0, top_p=0.7, seed=0),
    "min-p": SamplingParams(temperature=1.0, min_p=0.4, seed=0),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.8, seed=0),
    "all": SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.3, seed=0),
    "answer": SamplingParams(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.9, seed=0),
    "bias": SamplingParams(temperature=0.8, logit_bias={0: -2.0, 2: 1.0}, repetition_penalty=1.3, seed=0),
    "greedy": SamplingParams(repetition_penalty=1.8),
    "greedy answer": SamplingParams(presence_penalty=-0.5, frequency_penalty=1.5, logit_bias={1: 0.5}),
}
Acceptor = Callable[[DraftTree, NDArray[np.float32], Sampler, int, Sequence[int]], Verdict]


@cache
def logits_of(vocab: int, context: tuple[int, ...]) -> NDArray[np.float32]:
    """The target: random logits for every context."""
    return np.random.default_rng([vocab, *context]).normal(0, 1.5, vocab).astype(np.float32)


def processed(params: SamplingParams, vocab: int, context: tuple[int, ...]) -> list[float]:
    """The target's logits after `context` with bias and penalties, naively and independent of Sampler."""
    bias, answer = dict(params.logit_bias), context[len(CONTEXT) :]
    scores = [float(score) + bias.get(token, 0.0) for token, score in enumerate(logits_of(vocab, context))]
    for token in set(context):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    for token in set(answer):
        scores[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return scores


@cache
def own_distribution(params: SamplingParams, vocab: int, context: tuple[int, ...]) -> list[float]:
    """The target's processed distribution after `context`, naively and independent of Sampler."""
    scores = processed(params, vocab, context)
    ranked = sorted(range(vocab), key=lambda token: -scores[token])
    if params.temperature == 0:
        return [float(token == ranked[0]) for token in range(vocab)]
    kept = ranked[: params.top_k or vocab]
    probs = {token: math.exp(scores[token] / params.temperature) for token in kept}
    total, mass, nucleus = sum(probs.values()), 0.0, []
    for token in kept:
        if mass < params.top_p:
            nucleus.append(token)
        mass += probs[token] / total
    likely = [token for token in nucleus if probs[token] >= params.min_p * probs[ranked[0]]]
    total = sum(probs[token] for token in likely)
    return [probs[token] / total if token in likely else 0.0 for token in range(vocab)]


class Enumerated(Sampler):
    """Follows a script of outcomes in place of noise; the outcomes' probabilities multiply up in `weight`."""

    def __init__(self, params: SamplingParams, script: tuple[int, ...]) -> None:
        super().__init__(params, prompt_tokens=len(CONTEXT))
        self.script, self.taken, self.options = script, list[int](), list[list[int]]()
        self.positions = list[int]()
        self.weight = 1.0

    def draw(self, scores: NDArray[Any], ids: NDArray[np.int64] | None, position: int) -> int:
        self.positions.append(position)
        probs = np.exp((scores.astype(np.float64) - scores.max()) / self.params.temperature)
        probs /= probs.sum()
        options = np.flatnonzero(probs).tolist()
        turn = len(self.taken)
        choice = self.script[turn] if turn < len(self.script) else options[0]
        self.options.append(options)
        self.taken.append(choice)
        self.weight *= float(probs[choice])
        return choice


def outcomes(acceptor: Acceptor, tree: DraftTree, params: SamplingParams, vocab: int) -> dict[tuple[int, ...], float]:
    """Emitted tokens -> exact probability, over every possible draw."""
    paths = [CONTEXT]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    logits = np.stack([logits_of(vocab, path) for path in paths])
    emitted: dict[tuple[int, ...], float] = {}
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        script = scripts.pop()
        sampler = Enumerated(params, script)
        verdict = acceptor(tree, logits, sampler, len(CONTEXT), CONTEXT)
        assert len(set(sampler.positions)) == len(sampler.positions), "no position's noise is used twice"
        emitted[verdict.tokens] = emitted.get(verdict.tokens, 0.0) + sampler.weight
        for turn in range(len(script), len(sampler.taken)):
            scripts += [(*sampler.taken[:turn], other) for other in sampler.options[turn][1:]]
    return emitted


def error(acceptor: Acceptor, tree: DraftTree, params: SamplingParams, vocab: int) -> float:
    """Largest difference, over all texts that are one token longer than the deepest path, to the target's own.

    What was emitted is continued by the target itself up to that length.
    """
    emitted = outcomes(acceptor, tree, params, vocab)
    assert sum(emitted.values()) == pytest.approx(1, abs=1e-12)
    worst = 0.0
    for text in itertools.product(range(vocab), repeat=int(tree.depths().max()) + 1):
        steps = [own_distribution(params, vocab, CONTEXT + text[:i])[token] for i, token in enumerate(text)]
        got = sum(emitted.get(text[:i], 0.0) * math.prod(steps[i:]) for i in range(1, len(text) + 1))
        worst = max(worst, abs(got - math.prod(steps)))
    return worst


def shapes(nodes: int) -> Iterator[tuple[int, ...]]:
    """Every parent array with parents[i] < i."""
    return ((-1, *parents) for parents in itertools.product(*(range(node) for node in range(1, nodes))))


def labelled(parents: tuple[int, ...], vocab: int, seed: int) -> DraftTree:
    """Random tokens, distinct among siblings."""
    rng = np.random.default_rng([seed, len(parents), *parents[1:]])
    fresh = {node: rng.permutation(vocab).tolist() for node in range(len(parents))}
    tokens = [CONTEXT[-1], *(fresh[parent].pop() for parent in parents[1:])]
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(len(parents), np.float32))


def trees() -> Iterator[tuple[DraftTree, int]]:
    """All shapes up to 6 nodes, with the smallest vocabulary that fits (3, or as many as siblings) and one larger."""
    for nodes in range(1, 7):
        for parents in shapes(nodes):
            smallest = max(3, *(parents.count(node) for node in range(nodes)))
            for seed, vocab in enumerate((smallest, max(4, smallest))):
                yield labelled(parents, vocab, seed), vocab


@pytest.mark.parametrize("name", SETTINGS)
def test_emitted_distribution_is_the_targets_own_for_every_tree(name: str) -> None:
    checked = 0
    for tree, vocab in trees():
        assert error(accept, tree, SETTINGS[name], vocab) <= 1e-12, (tree.parents, tree.tokens)
        checked += 1
    assert checked == 2 * (1 + 1 + 2 + 6 + 24 + 120)


class Flawed:
    """An acceptor with the walk of accept() and one deliberate flaw."""

    def __init__(self, flaw: str) -> None:
        self.flaw = flaw

    def __call__(
        self, tree: DraftTree, logits: NDArray[np.float32], sampler: Sampler, position: int, context: Sequence[int]
    ) -> Verdict:
        path, tokens = [0], list[int]()
        while True:
            token = self.choose(tree, path[-1], logits[path[-1]], sampler, position + len(tokens), context, tokens)
            tokens.append(token)
            child = tree.child(path[-1], token)
            if child is None:
                return Verdict(np.array(path), tuple(tokens))
            path.append(child)

    def choose(
        self,
        tree: DraftTree,
        node: int,
        logits: NDArray[np.float32],
        sampler: Sampler,
        position: int,
        context: Sequence[int],
        tokens: list[int],
    ) -> int:
        seen = [*context, *tokens]
        children = np.flatnonzero(tree.parents == node)
        if self.flaw == "bonus without processors" and not len(children):
            return sampler.draw(logits, None, position)
        if self.flaw == "likely child taken" and len(children):
            first = int(tree.tokens[children[0]])
            if sampler.distribution(logits, seen)[first] > 0.3:
                return first
        if self.flaw == "path not penalised":
            seen = list(context)
        return sampler.pick(logits, position, seen)


@pytest.mark.parametrize("flaw", ["bonus without processors", "likely child taken", "path not penalised"])
def test_enumeration_finds_a_flawed_acceptor(flaw: str) -> None:
    def worst(acceptor: Acceptor) -> float:
        return max(error(acceptor, tree, SETTINGS["all"], vocab) for tree, vocab in itertools.islice(trees(), 40))

    assert worst(Flawed("none")) <= 1e-12
    assert worst(Flawed(flaw)) > 1e-3


def test_enumeration_finds_reused_noise() -> None:
    def reusing(
        tree: DraftTree, logits: NDArray[np.float32], sampler: Sampler, position: int, context: Sequence[int]
    ) -> Verdict:
        verdict = accept(tree, logits, sampler, position, context)
        sampler.draw(np.ones(1), None, position)
        return verdict

    with pytest.raises(AssertionError, match="used twice"):
        error(reusing, DraftTree.root(CONTEXT[-1]), SETTINGS["plain"], 3)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_noise_gives_the_same_text_for_every_tree(name: str) -> None:
    for tree, vocab in itertools.islice(trees(), 0, None, 3):
        for seed in range(3):
            sampler = Sampler(SETTINGS[name], noise=gumbel_noise(seed), prompt_tokens=len(CONTEXT))
            paths = [CONTEXT]
            for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
                paths.append((*paths[parent], token))
            logits = np.stack([logits_of(vocab, path) for path in paths])
            verdict = accept(tree, logits, sampler, len(CONTEXT), CONTEXT)
            text = CONTEXT
            for _ in verdict.tokens:
                text += (sampler.pick(logits_of(vocab, text), len(text), text),)
            assert CONTEXT + verdict.tokens == text
            assert verdict.accepted == len(verdict.path) - 1
            assert tree.tokens[verdict.path[1:]].tolist() == list(verdict.tokens[:-1])
            assert tree.child(int(verdict.path[-1]), verdict.tokens[-1]) is None


@pytest.mark.parametrize("name", ["plain", "all", "answer", "greedy"])
def test_under_a_grammar_the_distribution_is_the_targets_own_among_allowed_tokens(name: str) -> None:
    def rule(text: tuple[int, ...]) -> list[int]:
        return [] if len(text) == 3 else [0, 2] if sum(text) % 2 else [0, 1]

    params, vocab = replace(SETTINGS[name], top_k=0, top_p=1.0, min_p=0.0), 3  # these follow the grammar
    for tree, _ in itertools.islice(trees(), 0, None, 7):
        if tree.tokens.max() >= vocab:
            continue
        paths = [CONTEXT]
        for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
            paths.append((*paths[parent], token))
        logits = np.stack([logits_of(vocab, path) for path in paths])
        emitted: dict[tuple[int, ...], float] = {}
        scripts: list[tuple[int, ...]] = [()]
        while scripts:
            script = scripts.pop()
            sampler, matcher = Enumerated(params, script), ScriptedConstraint(rule).begin()
            verdict = accept(tree, logits, sampler, len(CONTEXT), CONTEXT, matcher)
            assert matcher.text == verdict.tokens and len(verdict.tokens) <= 3
            emitted[verdict.tokens] = emitted.get(verdict.tokens, 0.0) + sampler.weight
            for turn in range(len(script), len(sampler.taken)):
                scripts += [(*sampler.taken[:turn], other) for other in sampler.options[turn][1:]]
        for tokens, probability in emitted.items():
            expected = 1.0
            for index, token in enumerate(tokens):
                own = own_distribution(params, vocab, CONTEXT + tokens[:index])
                allowed = rule(tokens[:index])
                if params.greedy:
                    scores = {each: processed(params, vocab, CONTEXT + tokens[:index])[each] for each in allowed}
                    expected *= token == max(scores, key=scores.__getitem__)
                else:
                    expected *= own[token] * (token in allowed) / sum(own[each] for each in allowed)
            assert probability == pytest.approx(expected, abs=1e-12)


def test_rows_that_are_not_visited_are_not_read() -> None:
    tree = DraftTree(np.array([0, 0, 1]), np.array([-1, 0, 0]), np.zeros(3, np.float32))
    logits = np.array([[9, 0, 0], [0, 0, 9], [np.nan] * 3], np.float32)
    verdict = accept(tree, logits, Sampler(SamplingParams()), len(CONTEXT), CONTEXT)
    assert verdict.tokens == (0, 2) and verdict.path.tolist() == [0, 1] and verdict.path.dtype == np.int64
