"""What drafts that take no call of a drafter give: other sources of repeated text, on the records of replay.py.

    python -m tests.bench.free_drafts runners PAIR drafts.npz ...
    python -m tests.bench.free_drafts play PAIR drafts.npz ... --costs tune.json
    python -m tests.bench.free_drafts head PAIR drafts.npz ...
    python -m tests.bench.free_drafts rates CORPUS.npz ...

`runners` lets the target read the recorded answers again and keeps its best tokens at each place, for `play`, beside
the record.  `play` replays each record in three orders of its prompts; a change of the order alone changes means by 1%,
and by 3% without a drafter.  `head` corrects the drafter's head after each token.  `rates` counts how often repeated
text is right, in the text itself and after 50,000 tokens of others.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from heapq import heappop, heappush
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import click
import numpy as np
from tests.bench.replay import (
    SLOW,
    Record,
    ReplayDrafter,
    ReplayTarget,
    limits_of,
    load,
    plain_ms,
    read_costs,
    read_pair,
    replay,
)

from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.exporter.train.corpus import Corpus
from dovetail.runtime.cli.main import fail
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners.cpu import CpuRunner
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.loop.rescore import _logits
from dovetail.runtime.loop.sequence import Outlook, Request, Sequence
from dovetail.runtime.policy.calibration import pair_calibration
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.noise import gumbel_noise
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import PRIOR, PRIOR_TRIES, SIZES, EarlierTexts, RepeatIndex

TOP = 10  # tokens that are kept at a place
SEED = 1  # of the records at a temperature: replay.py's default
KEPT = 50_000  # tokens of earlier texts
VOCABULARY = 160_000  # tokens, at least as many as any recorded target has
LEAST = 0.01  # probability of a path that is offered


@dataclass(frozen=True)
class Source:
    """How repeated text is found.  The product's way is `None` in place of a source.

    A path branches at every node: the runs of tokens that end in the node are looked up as those of the text are.
    """

    sizes: tuple[int, ...] = SIZES  # of the runs
    places: int = 2  # the newest places of a run that are looked at
    runners: int = 0  # the target's next best tokens at a place that are offered too
    counts: bool = False  # whether the share of a run's places tells the probability of what followed
    noise: bool = False  # whether the noise of a sampled answer ranks the target's best tokens
    below: bool = False  # whether paths go on below the drafter's nodes too


SOURCES = {
    "today": None,
    "a branch at every node": Source(),
    "4 places of a run": Source(places=4),
    "counts": Source(places=4, counts=True),
    "recycled after 1 token": Source(sizes=(1,), places=1, runners=6),
    "recycled after 2 tokens": Source(sizes=(2, 1), places=1, runners=6),
    "repeats and recycled": Source(runners=3),
    "counts and recycled": Source(places=4, counts=True, runners=3),
    "repeats and recycled, noise": Source(runners=3, noise=True),
    "branches, also below drafts": Source(below=True),
    "repeats and recycled, also below drafts": Source(runners=3, below=True),
}

Kind = tuple[int, int, int, int]  # run, (0 first, 1 other, 2 runner-up, 3 count), detail, whether of an earlier text
Offers = dict[int, tuple[float, Kind, int]]  # token -> its probability, its kind, copied tokens before it


@dataclass
class Index:
    """The places of runs in a text, and in the texts before it; a tree of what may follow; counts of what was right."""

    source: Source
    keep: bool = False  # whether the texts before this one stay
    sampled: bool = False  # whether noise draws the tokens of this text
    seconds: float = 0.0  # that `tree` took
    _tokens: list[int] = field(default_factory=list)
    _begin: int = 0  # of this text
    _indexed: int = 0
    _ends: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    _followed: dict[tuple[int, ...], dict[int, int]] = field(default_factory=dict)
    _best: dict[int, tuple[TokenArray, FloatArray]] = field(default_factory=dict)
    _tallies: dict[Kind, list[float]] = field(default_factory=dict)  # hits, tries
    _offers: dict[int, Offers] = field(default_factory=dict)  # of the last tree, by node
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def start(self) -> None:
        """Turn to another text."""
        if self.keep:
            self._begin = len(self._tokens)
            return
        self._tokens, self._begin, self._indexed = [], 0, 0
        self._ends, self._followed, self._best = {}, {}, {}

    def see(self, place: int, ids: TokenArray, logprobs: FloatArray) -> None:
        """Keep the target's best tokens at a place of this text."""
        self._best[self._begin + place] = ids, logprobs

    def tree(self, tokens: Many[int], limits: TreeLimits, drafted: DraftTree | None = None) -> DraftTree:
        """What may follow, the most probable nodes.  drafted: a tree that goes on."""
        began = perf_counter()
        self._follow(tokens)
        context = self._tokens[max(self._begin, len(self._tokens) - max(SIZES)) :]
        drafted = drafted or DraftTree.root(tokens[-1])
        found, parents, logprobs = drafted.tokens.tolist(), drafted.parents.tolist(), drafted.logprobs.tolist()
        paths, copied, heap = [list[int]()], [0] * len(found), list[tuple[float, int, int]]()
        self._offers, self._nodes = {}, {(parents[node], found[node]): node for node in range(1, len(found))}

        def look(node: int) -> None:
            if len(paths[node]) < limits.lookup:
                place = len(tokens) + len(paths[node])
                offers = self._offers[node] = self._after([*context, *paths[node]], copied[node], place)
                for token, (probability, _, _) in offers.items():
                    if (logprob := logprobs[node] + math.log(min(probability, 0.99))) > math.log(LEAST):
                        heappush(heap, (-logprob, node, token))

        for parent, token in zip(parents[1:], found[1:], strict=True):
            paths.append([*paths[parent], token])
        for node in range(len(paths)):
            look(node)
        while heap and len(found) < limits.width + len(drafted):
            cost, parent, token = heappop(heap)
            if node := self._nodes.get((parent, token), 0):
                logprobs[node] = max(logprobs[node], -cost)
                continue
            self._nodes[parent, token] = len(found)
            found.append(token)
            parents.append(parent)
            logprobs.append(-cost)
            paths.append([*paths[parent], token])
            copied.append(self._offers[parent][token][2])
            look(len(found) - 1)
        self.seconds += perf_counter() - began
        return best_tree(found, parents, logprobs, limits.width - 1)

    def learn(self, tokens: Many[int]) -> None:
        """Count what was right in the last tree.  tokens: those that followed."""
        node: int | None = 0
        for token in tokens:
            if node is None or node not in self._offers:
                return
            for other, (_, kind, _) in self._offers[node].items():
                tally = self._tally(kind)
                tally[0] += other == token
                tally[1] += 1
            node = self._nodes.get((node, token))

    def _follow(self, tokens: Many[int]) -> None:
        self._tokens += tokens[len(self._tokens) - self._begin :]
        for end in range(max(self._indexed, self._begin) + 1, len(self._tokens)):
            token = self._tokens[end]
            for size in (size for size in self.source.sizes if end - self._begin >= size):
                run = tuple(self._tokens[end - size : end])
                ends = self._ends.get(run, ())
                if self.source.places > 2:  # of each token that followed, the newest
                    ends = tuple(other for other in ends if self._tokens[other] != token)
                self._ends[run] = (end, *ends[: self.source.places - 1])
                if self.source.counts:
                    counts = self._followed.setdefault(run, {})
                    counts[token] = counts.get(token, 0) + 1
        self._indexed = len(self._tokens) - 1

    def _after(self, context: list[int], copied: int, place: int) -> Offers:
        offers: Offers = {}
        for size in (size for size in self.source.sizes if size <= len(context)):
            run = tuple(context[-size:])
            ends = self._ends.get(run, ())
            far = int(bool(ends) and ends[0] < self._begin)
            first = not offers
            for token, detail in self._tokens_after(run, ends):
                if token not in offers:
                    contested = int(not first or (bool(offers) and not self.source.counts))
                    kind = (size, contested, 0 if contested else min(copied, 1), far)
                    if detail is not None and not contested:
                        kind = (min(size, 8), 3, detail, far)
                    offers[token] = self._rate(kind), kind, copied + 1
            for end in ends if self.source.runners else ():
                for token, kind in self._runners(size, end, place, far):
                    offers.setdefault(token, (self._rate(kind), kind, 0))
        return offers

    def _tokens_after(self, run: tuple[int, ...], ends: tuple[int, ...]) -> Iterator[tuple[int, int | None]]:
        """Tokens that followed a run; with counts the most frequent, and the tenth of their share in a number."""
        if not self.source.counts:
            yield from ((self._tokens[end], None) for end in ends)
            return
        counts = self._followed.get(run, {})
        total = sum(counts.values())
        for token, count in sorted(counts.items(), key=lambda item: -item[1])[: self.source.places + 1]:
            yield token, min(10 * count // total, 9) * 10 + min(total, 3)

    def _runners(self, size: int, end: int, place: int, far: int) -> Iterator[tuple[int, Kind]]:
        if end not in self._best:
            return
        ids, logprobs = self._best[end]
        if self.source.noise and self.sampled:
            order = np.argsort(-(logprobs + noise_at(place)[ids]))
            ids, logprobs = ids[order], logprobs[order]
        for token, logprob in islice_but(ids.tolist(), logprobs.tolist(), self._tokens[end], self.source.runners):
            yield token, (size, 2, sum(logprob > math.log(bound) for bound in (0.02, 0.06, 0.15, 0.3)), far)

    def _rate(self, kind: Kind) -> float:
        hits, tries = self._tally(kind)
        return hits / tries

    def _tally(self, kind: Kind) -> list[float]:
        if kind not in self._tallies:
            size, what, detail, far = kind
            if what == 2:
                rate = (0.02, 0.05, 0.12, 0.25, 0.4)[detail]
            elif what == 3:
                rate = 0.8 * (detail // 10 + 0.5) / 10
            else:
                rate = PRIOR[size, what + 2 * far][min(detail, 1)]
            self._tallies[kind] = [rate * PRIOR_TRIES, PRIOR_TRIES]
        return self._tallies[kind]


def islice_but(tokens: list[int], logprobs: list[float], but: int, count: int) -> list[tuple[int, float]]:
    """The first `count` tokens other than `but`, and their log-probabilities."""
    return [pair for pair in zip(tokens, logprobs, strict=True) if pair[0] != but][:count]


class FreeSequence(Sequence):
    """A sequence whose repeated text comes from an `Index`."""

    def __init__(
        self, target: ReplayTarget, drafter: ReplayDrafter | None, index: Index, prompt: int, best: Best
    ) -> None:
        super().__init__(target, drafter)
        self._index, self._prompt, self._best, self._free = index, prompt, best, DraftTree.root(0)
        self._seen = 0  # places of the answer whose best tokens are known
        index.start()

    def outlook(self, policy: Policy | None = None, least: float = 0.0) -> Outlook:
        outlook = super().outlook(policy, math.inf)
        if outlook.limits.width == 1:
            self._free = outlook.repeats
            return outlook
        width = policy.widest(len(self.tokens) - 1, outlook.limits.width) if policy else outlook.limits.width
        limits = replace(outlook.limits, width=width)
        for place in range(self._seen, len(self.tokens) - self._prompt):
            self._index.see(self._prompt + place, self._best[0][place], self._best[1][place])
        self._seen = len(self.tokens) - self._prompt
        self._free = self._index.tree(self.tokens, limits)
        return Outlook(limits, self._free)

    def join(self, tree: DraftTree, limits: TreeLimits) -> DraftTree:
        if self._index.source.below:
            return self._index.tree(self.tokens, limits, tree)
        return joined(tree, self._free, limits.width)

    def commit(self, path: TokenArray, tokens: Many[int]) -> None:
        super().commit(path, tokens)
        if len(self._free) > 1:
            self._index.learn(tokens)


Best = tuple[TokenArray, FloatArray]  # [A, TOP] ids and log-probabilities at the places of an answer


def joined(tree: DraftTree, other: DraftTree, width: int) -> DraftTree:
    """Nodes of both trees below one root, the best `width`.  A node of both has the better log-probability."""
    tokens, parents, logprobs = tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist()
    nodes = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    places = [0]
    for token, parent, logprob in list(
        zip(other.tokens.tolist(), other.parents.tolist(), other.logprobs.tolist(), strict=True)
    )[1:]:
        node = nodes.setdefault((places[parent], token), len(tokens))
        if node == len(tokens):
            tokens.append(token)
            parents.append(places[parent])
            logprobs.append(logprob)
        logprobs[node] = max(logprobs[node], logprob)
        places.append(node)
    return best_tree(tokens, parents, logprobs, width - 1)


class BiasedDrafter(ReplayDrafter):
    """A drafter with a bias for each token, which moves after each token that the target chose."""

    def __init__(self, of: ReplayDrafter, rate: float) -> None:
        super().__init__(of.each, of.target, of.clock)
        self._rate, self._seen, self._bias = rate, 0, defaultdict[int, float](float)

    def extend(self, seq: int, tokens: TokenArray, features: FloatArray, noise: Any = None) -> None:
        super().extend(seq, tokens, features, noise)
        while self._seen < min(self.target.held - len(self.each.prompt), len(self.each.trees)):
            tree = self.each.trees[self._seen]
            children = np.flatnonzero(tree.parents == 0)
            ids = tree.tokens[children]
            for token, share in zip(ids.tolist(), np.exp(self.claims(ids, tree.logprobs[children])), strict=True):
                self._bias[token] -= self._rate * float(share)
            self._seen += 1
            self._bias[self.each.answer[self._seen]] += self._rate

    def claims(self, tokens: TokenArray, logprobs: FloatArray) -> FloatArray:
        if not len(tokens):
            return logprobs
        moved = logprobs + np.array([self._bias[token] for token in tokens.tolist()], np.float32)
        rest = np.log(np.maximum(1 - np.exp(logprobs).sum(), 1e-6))  # of all other tokens
        result: FloatArray = moved - np.logaddexp(np.logaddexp.reduce(moved), rest)
        return result


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except DovetailError as error:
        sys.exit(fail(str(error), error.exit_code))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Replay records with other sources of drafts."""


@main.command()
@click.argument("pair")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RECORD...")
def runners(pair: str, files: tuple[Path, ...]) -> None:
    """Keep the target's best tokens at each place of the answers, in RECORD.runners.npz."""
    with one_line_errors():
        folder, manifest = read_pair(pair)
        sequence = Sequence(OpenVINOTarget.load(folder, manifest))
        for file in files:
            ids, logprobs, seconds = list[TokenArray](), list[FloatArray](), list[float]()
            for each in load(file):
                for row in _logits(sequence, each.prompt, each.answer):
                    began = perf_counter()
                    best = np.argpartition(row, -TOP)[-TOP:]
                    best = best[np.argsort(-row[best], kind="stable")]
                    seconds.append(perf_counter() - began)
                    ids.append(best)
                    logprobs.append(row[best] - np.logaddexp.reduce(row))
            np.savez_compressed(beside(file), ids=np.array(ids), logprobs=np.array(logprobs))
            click.echo(
                f"{file.stem}: {len(ids)} places, {median(seconds) * 1e3:.3f} ms a place to find the best tokens"
            )


@main.command()
@click.argument("pair")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RECORD...")
@click.option("--costs", "measured", type=click.Path(path_type=Path), required=True, help="JSON of dovetail-run tune.")
@click.option("--source", "names", multiple=True, type=click.Choice(list(SOURCES)), help="Only these; repeatable.")
@click.option("--bias", "biases", type=float, multiple=True, help="Rate of a bias for each token; repeatable.")
@click.option("--alone", is_flag=True, help="Leave the drafter out.")
@click.option("--earlier", is_flag=True, help="Let drafts repeat the texts before.")
@click.option("--other-ms", type=click.FloatRange(min=0), default=0.14, show_default=True, help="As of replay.py.")
def play(
    pair: str, files: tuple[Path, ...], measured: Path, names: tuple[str, ...], biases: tuple[float, ...],
    alone: bool, earlier: bool, other_ms: float,
) -> None:  # fmt: skip
    """Print how much quicker than plain decoding the records are decoded with each source."""
    with one_line_errors():
        folder, manifest = read_pair(pair)
        costs, limits = read_costs(measured), limits_of(manifest)
        costs = replace(costs, draft=None) if alone else costs
        texts = {file: list(zip(load(file), best_tokens(file), strict=True)) for file in files}
        heads = "".join(f" {file.stem} |" for file in files)
        click.echo(f"| source |{heads} mean | below {SLOW}x | find, ms |\n|---|{'--:|' * (len(files) + 3)}")
        rows = [(name, SOURCES[name], 0.0) for name in names or ([] if biases else SOURCES)]
        for name, source, rate in [*rows, *((f"bias, rate {rate}", None, rate) for rate in biases)]:
            means, ratios, seconds, rounds = list[float](), list[float](), 0.0, 0
            for known in texts.values():
                found = list[float]()
                for order in orders(known):
                    scheduler = Scheduler(costs, None if alone else pair_calibration(folder, manifest))
                    drafts = Drafts(source, rate, earlier)
                    for each, best in order:
                        count, ms = replay(each, costs, scheduler, limits, partial(drafts.sequence, each, best))
                        found.append(plain_ms(each, costs) / (ms + count * other_ms))
                        rounds += count
                    seconds += drafts.index.seconds if drafts.index else 0.0
                means.append(geometric_mean(found))
                ratios += found
            cells = " | ".join(f"{mean:.3f}x" for mean in (*means, sum(means) / len(means)))
            slow = sum(ratio < SLOW for ratio in ratios) / len(ratios)
            click.echo(f"| {name} | {cells} | {slow:.0%} | {seconds / rounds * 1e3:.2f} |")


@main.command()
@click.argument("pair")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RECORD...")
def head(pair: str, files: tuple[Path, ...]) -> None:
    """Print how often the drafter's best and three best tokens are right with a head that learns after each token."""
    with one_line_errors():
        folder, manifest = read_pair(pair)
        drafter = open_drafter(folder, manifest, device="cpu")
        sequence = Sequence(OpenVINOTarget.load(folder, manifest), drafter)
        _, rows = read_embedding_and_head(folder / "target" / "openvino_model.xml")
        click.echo("| record | correction | best | three best |\n|---|---|--:|--:|")
        for file in files:
            answers = [features_of(sequence, drafter, each) for each in load(file)]
            ids = drafter._runner.draft_ids
            assert ids is not None
            weights, places = rows[ids].astype(np.float32), {int(token): place for place, token in enumerate(ids)}
            for name, bias, outer in HEADS:
                ranks = [
                    rank
                    for features, tokens in answers
                    for rank in learnt(weights, features, [places.get(token) for token in tokens], bias, outer)
                ]
                best, three = (sum(rank < count for rank in ranks) / len(ranks) for count in (1, 3))
                click.echo(f"| {file.stem} | {name} | {best:.1%} | {three:.1%} |")


HEADS = (("none", 0.0, 0.0), ("bias, rate 0.3", 0.3, 0.0), ("bias, rate 1", 1.0, 0.0),
         ("rows, rate 0.5", 0.0, 0.5), ("rows, rate 1", 0.0, 1.0), ("rows, rate 2", 0.0, 2.0))  # fmt: skip


def features_of(sequence: Sequence, drafter: OnnxDrafter, each: Record) -> tuple[FloatArray, tuple[int, ...]]:
    """The drafter's output features [A - 1, D] after each token of an answer but the last, and the next tokens."""
    limits, found = TreeLimits(width=2, depth=1, top_k=1, lookup=0), list[FloatArray]()
    sequence.forget()
    sequence.begin(Request(each.prompt, len(each.answer) + 1, limits=limits), Sampler(SamplingParams()))
    answer = [*sequence.first(sequence.prefill()).tokens]
    assert isinstance(drafter._runner, CpuRunner)
    while len(answer) < len(each.answer):
        sequence.propose(limits, None)
        found.append(np.array(drafter._runner._bank[drafter._texts[sequence.id].number]))
        root = DraftTree.root(answer[-1])
        passed = sequence.accept(root, sequence.target.verify({sequence.id: root})[sequence.id])
        answer += passed.step.tokens
        sequence.commit(passed.verdict.path, passed.step.tokens)
        sequence.tell(passed.features)
    if tuple(answer) != each.answer:
        raise InputError("the target answers otherwise than the record: give a record at temperature 0 of this pair")
    return np.array(found), each.answer[1:]


def learnt(
    weights: FloatArray, features: FloatArray, tokens: Many[int | None], bias: float, outer: float
) -> Iterator[float]:
    """Yield the rank of each token under a head that a step of gradient descent corrects after each of them.

    bias, outer: rates of a bias for each row, and of the rows. A token that the head does not have ranks last.
    """
    scale = float((features * features).sum(axis=1).mean())
    steps = np.zeros((len(tokens), len(weights)), np.float32)
    for place, token in enumerate(tokens):
        near = features[:place] @ features[place] / scale
        logits = weights @ features[place] + (bias + outer * near) @ steps[:place]
        yield math.inf if token is None else int((logits > logits[token]).sum())
        steps[place] = -np.exp(logits - np.logaddexp.reduce(logits))
        if token is not None:
            steps[place, token] += 1


@main.command()
@click.argument("corpora", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CORPUS...")
def rates(corpora: tuple[Path, ...]) -> None:
    """Print how often the first and later tokens of repeated text are right, as repeats.PRIOR has it."""
    with one_line_errors():
        index, earlier = RepeatIndex(), EarlierTexts(KEPT)
        for corpus in corpora:
            texts = Corpus.load(corpus)
            for number in np.random.default_rng(0).permutation(len(texts)):
                begin, end = texts.offsets[number : number + 2]
                text, prompt = texts.tokens[begin:end].tolist(), int(texts.prompt_lengths[number])
                for place in range(prompt + 1, len(text)):
                    for repeat in index.find(text[:place], 8, earlier):
                        index.learn(repeat, text[place:])
                earlier.add(text)
        click.echo("| run | path | first token | later tokens |\n|--:|--:|--:|--:|")
        for (size, place), tallies in sorted(index._tallies.items(), reverse=True):
            seen = [(hits - PRIOR_TRIES * rate, tries - PRIOR_TRIES)
                    for (hits, tries), rate in zip(tallies, PRIOR[size, place], strict=True)]  # fmt: skip
            cells = " | ".join(f"{hits / max(tries, 1):.2f} of {tries:.0f}" for hits, tries in seen)
            click.echo(f"| {size} | {place} | {cells} |")


@dataclass
class Drafts:
    """Makes the sequences of one order of prompts, with what is known of the texts before."""

    source: Source | None
    rate: float
    earlier: bool
    index: Index | None = None
    _texts: EarlierTexts = field(default_factory=lambda: EarlierTexts(KEPT))
    _last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.source:
            self.index = Index(self.source, self.earlier)

    def sequence(self, each: Record, best: Best, target: ReplayTarget, drafter: ReplayDrafter | None) -> Sequence:
        if self.rate and drafter:
            drafter = BiasedDrafter(drafter, self.rate)
        if self.index:
            self.index.sampled = each.sampled
            return FreeSequence(target, drafter, self.index, len(each.prompt), best)
        sequence = Sequence(target, drafter)
        if self.earlier:
            self._texts.add(self._last)
            sequence.earlier, self._last = self._texts, (*each.prompt, *each.answer)
        return sequence


@cache
def noise_at(place: int) -> FloatArray:
    """The noise that drew the records' token at a place."""
    return gumbel_noise(SEED)(place, VOCABULARY)


def orders(texts: list[Any]) -> list[list[Any]]:
    """Three orders of the texts: as they are, from the end, from the middle."""
    return [texts, texts[::-1], texts[len(texts) // 2 :] + texts[: len(texts) // 2]]


def beside(file: Path) -> Path:
    return file.with_suffix(".runners.npz")


def best_tokens(file: Path) -> list[Best]:
    """What `runners` kept of each answer."""
    try:
        with np.load(beside(file)) as held:
            ids, logprobs = held["ids"], held["logprobs"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{beside(file)} has no best tokens of {file.name}: run runners first") from None
    ends = np.cumsum([len(each.answer) for each in load(file)])
    if len(ids) != ends[-1]:
        raise InputError(f"{beside(file)} has {len(ids)} places, the record {ends[-1]}: run runners again")
    return list(zip(np.split(ids, ends[:-1]), np.split(logprobs, ends[:-1]), strict=True))


if __name__ == "__main__":
    main()
