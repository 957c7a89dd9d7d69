"""The scheduler on recorded drafts and a clock of measured costs: no noise, and every schedule meets the same text.

    python tests/bench/replay.py record PAIR PROMPTS.jsonl --out drafts.npz
    python tests/bench/replay.py play PAIR drafts.npz --costs tune.json

A pair without a drafter leaves its answers, for repeats alone.  `record --draft-model OTHER` records what
another pair's target proposes; its costs are those of `tune --draft-model OTHER`.

What is compared with plain decoding is the time that the engines' calls take by the costs, which `dovetail-run tune
--json` prints and table.py leaves as `*.tune.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import geometric_mean, median
from zipfile import BadZipFile
from zlib import error as ZlibError

import click
import numpy as np

from dovetail.runtime.cli.main import fail
from dovetail.runtime.drafter.model import ModelDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.session import DeviceReport, DraftNoise
from dovetail.runtime.errors import DovetailError, InputError, ManifestError
from dovetail.runtime.load import open_draft_model
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.manifest import Manifest, parse_record, read_manifest
from dovetail.runtime.policy.calibration import pair_calibration
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray, TokenArray, common_prefix
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.session import NO_PROMPTS, TargetPass
from dovetail.runtime.text.prompts import read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_tree
from dovetail.runtime.tree.limits import TreeLimits

SLOW = 0.97  # of plain decoding's speed
DRAWN = 1e-3  # temperature of what is sampled again
KEYS = ("prompts", "answers", "sampled")  # of a record: lengths of its texts, and how the answer was chosen


@dataclass(frozen=True)
class Record:
    """A prompt, its answer by plain decoding, and what the drafter proposed after each token of that but the last.

    sampled: whether the tokens of the answer were drawn.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    trees: tuple[DraftTree, ...]
    sampled: bool = False


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Record what a drafter proposes, and replay it to the scheduler."""


@main.command()
@click.argument("pair")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The record, a .npz file.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Prompts to record.  [default: all]")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--draft-model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Pair that drafts.")
@click.option("--top-k", type=click.IntRange(min=1), help="Children of a node.  [default: the scheduler's]")
def record(
    pair: str, prompts: Path, out: Path, max_new_tokens: int, limit: int | None, temperature: float, seed: int,
    draft_model: Path | None, top_k: int | None,
) -> None:  # fmt: skip
    """Decode the first turn of each prompt plainly, and draft at every place."""
    try:
        if out.suffix != ".npz" or not out.parent.is_dir():
            raise InputError(f"--out {out} is no .npz file in a folder that is there: name another")
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed))
        talks = read_prompts(prompts)[:limit]
        folder, manifest = read_pair(pair)
        tokenizer = Tokenizer.from_folder(folder / "target")
        drafter: OnnxDrafter | ModelDrafter | None = None
        if draft_model:
            _, drafter = open_draft_model(draft_model, tokenizer, manifest, threads=None)
        elif manifest.drafter:
            drafter = open_drafter(folder, manifest, device="cpu")
        talk = Sequence(OpenVINOTarget.load(folder, manifest), drafter)
        longest = drafter.capacity if drafter else manifest.target.max_context
        widest, records = replace(limits_of(manifest), width=64, lookup=0), []
        widest = replace(widest, top_k=top_k or widest.top_k)
        for number, asked in enumerate(talks, 1):
            prompt = tokenizer.encode_chat([{"role": "user", "content": asked.turns[0]}])
            room = len(prompt) + max_new_tokens <= longest
            if room:
                records.append(follow(talk, widest, prompt, max_new_tokens, {*tokenizer.eos_token_ids}, sampler))
            click.echo(f"{number}/{len(talks)} {asked.name}{'' if room else ': too long, left out'}", err=True)
        save(out, records)
    except DovetailError as error:
        sys.exit(fail(str(error), error.exit_code))


@main.command()
@click.argument("pair")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RECORD...")
@click.option("--costs", "measured", type=click.Path(path_type=Path), multiple=True, required=True,
              help="JSON of dovetail-run tune; repeatable.")  # fmt: skip
@click.option("--other-ms", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="What a round takes beside the engines' calls more than a plain step does.")  # fmt: skip
def play(pair: str, files: tuple[Path, ...], measured: tuple[Path, ...], other_ms: float) -> None:
    """Print how much quicker than plain decoding each record is decoded where passes cost what was measured."""
    try:
        folder, manifest = read_pair(pair)
        calibration, limits = pair_calibration(folder, manifest), limits_of(manifest)
        recorded, clocks = [(file, load(file)) for file in files], [(source, read_costs(source)) for source in measured]
        click.echo(
            f"| record | costs | median | least | mean | below {SLOW}x | prompts |\n|---|---|--:|--:|--:|--:|--:|"
        )
        for file, records in recorded:
            for source, costs in clocks:
                trees = [tree for each in records for tree in each.trees]
                if costs.draft is None and any(len(tree) > 1 for tree in trees):
                    raise InputError(f"{file} has drafts, and {source} no costs of a drafter: give other costs")
                chain = all(map(is_chain, trees))
                scheduler, ratios = Scheduler(costs, None if chain else calibration), []
                for each in records:
                    rounds, ms = replay(each, costs, scheduler, limits)
                    ratios.append(plain_ms(each, costs) / (ms + rounds * other_ms))
                slow = sum(ratio < SLOW for ratio in ratios)
                click.echo(
                    f"| {file.stem} | {source.stem} | {median(ratios):.2f}x | {min(ratios):.2f}x | "
                    f"{geometric_mean(ratios):.3f}x | {slow} | {len(ratios)} |"
                )
    except DovetailError as error:
        sys.exit(fail(str(error), error.exit_code))


def read_pair(pair: str) -> tuple[Path, Manifest]:
    """The folder and manifest of a pair.  Raises PairError."""
    folder = resolve_pair(pair)
    return folder, read_manifest(folder)


def limits_of(manifest: Manifest) -> TreeLimits:
    """Of a scheduled tree of this pair, as the engine has them."""
    drafter = manifest.drafter
    return replace(BOUNDS, top_k=min(BOUNDS.top_k, drafter.top_k)) if drafter else BOUNDS


def is_chain(tree: DraftTree) -> bool:
    """Whether one node of a level at most has children, as in the trees of a draft model."""
    parents = np.unique(tree.parents[1:])
    return len(np.unique(tree.depths()[parents])) == len(parents)


def follow(
    talk: Sequence, limits: TreeLimits, prompt: list[int], count: int, stop: set[int], sampler: Sampler
) -> Record:
    """Decode up to `count` tokens, a node a pass; the drafter is asked after each."""
    talk.forget()
    talk.begin(Request(tuple(prompt), count + 1, limits=limits), sampler)  # one more: the last token is drafted too
    answer, trees = [*talk.first(talk.prefill()).tokens], []
    while len(answer) < count and answer[-1] not in stop:
        trees.append(talk.propose(limits, None))
        root = DraftTree.root(answer[-1])
        found = talk.accept(root, talk.target.verify({talk.id: root})[talk.id])
        answer += found.step.tokens
        talk.commit(found.verdict.path, found.step.tokens)
        talk.tell(found.features)
    return Record(tuple(prompt), tuple(answer), tuple(trees), not sampler.params.greedy)


def save(out: Path, records: list[Record]) -> None:
    """All records in one file of flat arrays, whole or not at all.  Raises InputError where nothing was drafted."""
    trees = [tree for each in records for tree in each.trees]
    if not trees:
        raise InputError("no answer has two tokens: record other prompts")
    buffer = BytesIO()
    np.savez_compressed(
        buffer,
        tokens=np.array([token for each in records for token in (*each.prompt, *each.answer)], np.int64),
        prompts=np.array([len(each.prompt) for each in records], np.int64),
        answers=np.array([len(each.answer) for each in records], np.int64),
        sampled=np.array([each.sampled for each in records]),
        sizes=np.array([len(tree) for tree in trees], np.int64),
        tree_tokens=np.concatenate([tree.tokens for tree in trees]),
        tree_parents=np.concatenate([tree.parents for tree in trees]),
        tree_logprobs=np.concatenate([tree.logprobs for tree in trees]),
    )
    write_atomically(out, buffer.getvalue())


def load(file: Path) -> list[Record]:
    """What `save` wrote, answers of one token left out.  Raises InputError for another file."""
    try:
        with file.open("rb") as stream, np.load(stream) as data:
            held = {name: data[name] for name in data.files}
        prompts, answers, sizes = held["prompts"], held["answers"], held["sizes"]
        parts = [held[f"tree_{name}"] for name in ("tokens", "parents", "logprobs")]
        lengths = len(held["tokens"]), len(sizes), *map(len, parts)
        if lengths != (prompts.sum() + answers.sum(), (answers - 1).sum(), *[sizes.sum()] * 3):
            raise ValueError("its arrays do not match")
        tokens = iter(held["tokens"].tolist())
        split = zip(*(np.split(part, np.cumsum(sizes)[:-1]) for part in parts), strict=True)
        trees = (DraftTree(*arrays) for arrays in split)
        records = [
            Record(tuple(islice(tokens, asked)), tuple(islice(tokens, told)), tuple(islice(trees, told - 1)), sampled)
            for asked, told, sampled in zip(*(held[key].tolist() for key in KEYS), strict=True)
        ]
    except FileNotFoundError:
        raise InputError(f"there is no record {file}: name another file") from None
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        BadZipFile,
        ZlibError,
        InputError,
    ) as error:
        raise InputError(f"{file} is no record of this script ({error}): record it again") from None
    return [each for each in records if each.trees]


def read_costs(file: Path) -> Costs:
    """The costs in JSON of `dovetail-run tune`.  Raises InputError."""
    try:
        return parse_record(Costs, json.loads(file.read_text(encoding="utf-8"))["costs"], "costs")
    except (OSError, ValueError, KeyError, TypeError, InputError, ManifestError) as error:
        raise InputError(f"--costs {file} is no JSON of dovetail-run tune ({error}): name another file") from None


@dataclass
class Clock:
    """Milliseconds that the calls of one answer took.  width: of the last pass, 0 for the prompt's."""

    costs: Costs
    ms: float = 0.0
    width: int = 0

    def __call__(self) -> float:
        return self.ms / 1e3

    def verify(self, context: int, nodes: int) -> None:
        self.ms += self.costs.target.at(context, nodes) + (nodes != self.width) * self.costs.switch_ms
        self.width = nodes

    def draft(self, context: int, rows: int) -> None:
        self.ms += self.costs.call_ms(context, rows)


def plain_ms(each: Record, costs: Costs) -> float:
    """What the passes of plain decoding take."""
    clock = Clock(costs)
    for step in range(len(each.answer) - 1):
        clock.verify(len(each.prompt) + step, 1)
    return clock.ms


def replay(
    each: Record,
    costs: Costs,
    scheduler: Scheduler,
    limits: TreeLimits = BOUNDS,
    new: Callable[[ReplayTarget, ReplayDrafter | None], Sequence] = Sequence,
) -> tuple[int, float]:
    """Rounds and ms that the answer takes.  Raises InputError where it is not the recorded one."""
    clock = Clock(costs)
    target = ReplayTarget(each, clock)
    # The recorded token leads by one logit, which at DRAWN leaves no other.
    sampling = SamplingParams(temperature=DRAWN if each.sampled else 0.0, seed=0)
    request = Request(each.prompt, len(each.answer), sampling, limits=limits, scheduler=scheduler)
    drafter = ReplayDrafter(each, target, clock) if costs.draft else None
    steps = decode(new(target, drafter), request, Meter(clock=clock))
    if tuple(token for step in steps for token in step.tokens) != each.answer:
        raise InputError("the record does not replay to its own text: record it again with this version")
    return target.rounds, clock.ms


class ReplayTarget:
    """Target that goes on with the recorded answer, in one sequence."""

    device, max_context, room, bus_bytes, largest_tree = "record", 1 << 20, 1 << 20, 0, None

    def __init__(self, each: Record, clock: Clock) -> None:
        self.text, self.clock = (*each.prompt, *each.answer, 0), clock
        self.held = self.rounds = 0
        self.vocabulary = 1 + max(max(self.text), *(int(tree.tokens.max()) for tree in each.trees))

    def open(self) -> int:
        return 1

    def fork(self, seq: int, keep: int) -> int:
        raise NotImplementedError("a record is one text")

    def length(self, seq: int) -> int:
        return self.held

    def prefill(self, seq: int, tokens: TokenArray) -> TargetPass:
        self.held += len(tokens)
        return TargetPass(self._logits([self.text[self.held]]), np.zeros((len(tokens), 1), np.float32))

    def verify(
        self, offers: Mapping[int, DraftTree], prompts: object = NO_PROMPTS, *, rows: int = 0
    ) -> dict[int, TargetPass]:
        ((seq, tree),) = offers.items()
        nodes = len(tree)
        self.clock.verify(self.held, max(rows, nodes))
        self.rounds += 1
        depths, parents = tree.depths().tolist(), tree.parents.tolist()
        true, next_tokens = [True], []
        for node, depth in enumerate(depths):
            place = self.held + depth
            if node:
                true.append(true[parents[node]] and self._token(place) == tree.tokens[node])
            next_tokens.append(self._token(place + 1) if true[node] else 0)
        return {seq: TargetPass(self._logits(next_tokens), np.zeros((nodes, 1), np.float32))}

    def commit(self, seq: int, path: TokenArray) -> None:
        self.held += len(path)

    def rewind(self, seq: int, keep: int) -> None:
        self.held = min(self.held, keep)

    def close(self, seq: int) -> None:
        self.held = 0

    def _token(self, place: int) -> int:
        return self.text[min(place, len(self.text) - 1)]

    def _logits(self, tokens: list[int]) -> FloatArray:
        logits = np.zeros((len(tokens), self.vocabulary), np.float32)
        logits[np.arange(len(tokens)), tokens] = 1.0
        return logits


class ReplayDrafter:
    """Drafter that proposes what was recorded, level by level as a scheduler asks for it."""

    device, capacity, top_k, report = "record", 1 << 20, 1 << 20, DeviceReport()

    def __init__(self, each: Record, target: ReplayTarget, clock: Clock) -> None:
        self.each, self.target, self.clock, self.held = each, target, clock, 0
        self._has_read, self._ran = False, list[int]()  # tokens of the last chain that a draft model ran
        self._chain = all(map(is_chain, each.trees))

    def length(self, seq: int) -> int:
        return self.held

    def extend(self, seq: int, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
        if self._has_read:  # the prompt is read before the first round
            self.clock.draft(self.held, len(tokens) - common_prefix(self._ran, tokens[:-1].tolist()))
        self.held, self._known, self._has_read = self.held + len(tokens), int(tokens[-1]), True

    def propose(
        self, seq: int, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        place = self.target.held - len(self.each.prompt)
        tree = self.recorded(place) if place < len(self.each.trees) else DraftTree.root(self._known)
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(tree.parents.tolist()):
            children.setdefault(parent, []).append(node)
        rows = {0: 0}  # row of the drafter -> node of the record
        self._ran = []

        def found(node: int) -> tuple[FloatArray, TokenArray]:
            held = children.get(node, [])
            claims = self.claims(tree.tokens[held], tree.logprobs[held] - tree.logprobs[node])
            best = np.argsort(-claims, kind="stable")[: limits.top_k]
            logprobs, ids = np.full(limits.top_k, -np.inf, np.float32), np.zeros(limits.top_k, np.int64)
            logprobs[: len(best)], ids[: len(best)] = claims[best], tree.tokens[held][best]
            return logprobs, ids

        def expand(level: Level) -> Candidates:
            nodes = []
            for row, parent, token in zip(level.rows, level.parent_rows, level.tokens, strict=True):
                nodes.append(next(node for node in children[rows[int(parent)]] if tree.tokens[node] == token))
                rows[int(row)] = nodes[-1]
            self.clock.draft(self.held, len(nodes))
            if self._chain:
                self._ran += level.tokens.tolist()
            logprobs, ids = zip(*map(found, nodes), strict=True)
            return Candidates(np.stack(logprobs), np.stack(ids))

        logprobs, ids = found(0)
        first, breadth = Candidates(logprobs[None], ids[None]), 1 if self._chain else None
        return grow_tree(self._known, first, expand, limits, breadth=breadth, judge=judge)

    def recorded(self, place: int) -> DraftTree:
        """What the drafter proposes below the answer's token at `place`."""
        return self.each.trees[place]

    def claims(self, tokens: TokenArray, logprobs: FloatArray) -> FloatArray:
        """Log-probabilities that the drafter gives the children of a node."""
        return logprobs

    def rewind(self, seq: int, keep: int) -> None:
        self.held = min(self.held, keep)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
