"""Target, drafter and tokenizer without engines: for tests, and for programs that embed the loop.

Axes: N nodes, T tokens, V vocabulary, D = 3 feature columns (position, token, checksum of the
prefix). Target and drafter make errors visible that real ones hide. Every misuse of a protocol
raises DeviceError. The features show the drafter whether its pairs are right. Arrays turn into nan
when they become invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.session import DeviceReport, DraftNoise
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.target.session import NO_PROMPTS, TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_tree
from dovetail.runtime.tree.limits import LargestTree, TreeLimits

Prefix = tuple[int, ...]
LogitsOf = Callable[[Prefix], FloatArray]  # token ids so far -> [V]
# Token ids so far, the root last -> tree.
Propose = Callable[[Prefix, TreeLimits, Judge | None, DraftNoise | None], DraftTree]

FEATURE_SIZE = 3


class MarkovLogits:
    """Random logits by the last `order` tokens: [V] float32, normal with deviation `sharpness`."""

    def __init__(self, vocab_size: int, seed: int = 0, order: int = 2, sharpness: float = 2.0) -> None:
        self.vocab_size, self.seed, self.order, self.sharpness = vocab_size, seed, order, sharpness
        self._rows: dict[Prefix, FloatArray] = {}

    def __call__(self, prefix: Prefix) -> FloatArray:
        state = prefix[-self.order :]
        if state not in self._rows:
            rng = np.random.default_rng([self.seed, len(state), *state])
            self._rows[state] = rng.normal(0, self.sharpness, self.vocab_size).astype(np.float32)
        return self._rows[state]


def _feature(prefix: Prefix) -> tuple[float, float, float]:
    """Return the feature of the last token: three whole numbers that float32 holds exactly."""
    checksum = crc32(np.array(prefix, np.int64).tobytes()) & 0xFFFFFF
    return len(prefix) - 1, prefix[-1], checksum


class ScriptedTarget:
    """A target whose logits are a function of the tokens so far; implements Target."""

    device, bus_bytes = "scripted", 0
    largest_tree: LargestTree | None = None

    def __init__(self, logits_of: LogitsOf, max_context: int = 4096, memory: int = 1 << 30) -> None:
        """memory: tokens of all sequences."""
        self.logits_of, self.max_context, self._memory = logits_of, max_context, memory
        self.texts: dict[SequenceId, list[int]] = {}  # tokens of each sequence
        self.calls: list[tuple[str, int]] = []  # e.g. ("prefill", 12) tokens, ("commit", 3) nodes
        self._opened = 0
        self._trees: dict[SequenceId, DraftTree] = {}
        self._lent: list[FloatArray] = []

    def open(self) -> SequenceId:
        self._opened += 1
        self.texts[self._opened] = []
        return self._opened

    def fork(self, seq: SequenceId, keep: int) -> SequenceId:
        new = self.open()
        self.texts[new] = self.texts[seq][:keep]
        return new

    @property
    def room(self) -> int:
        return self._memory - sum(map(len, self.texts.values()))

    def length(self, seq: SequenceId) -> int:
        return len(self.texts[seq])

    def prefill(self, seq: SequenceId, tokens: TokenArray) -> TargetPass:
        self._begin("prefill", len(tokens))
        return self._prompt(seq, tokens)

    def verify(
        self,
        offers: Mapping[SequenceId, DraftTree],
        prompts: Mapping[SequenceId, TokenArray] = NO_PROMPTS,
        *,
        rows: int = 0,
    ) -> dict[SequenceId, TargetPass]:
        self._begin("verify", sum(map(len, offers.values())) + sum(map(len, prompts.values())))
        _require(not offers.keys() & prompts.keys(), "a tree and a prompt of one sequence in one pass")
        passes = {seq: self._prompt(seq, tokens) for seq, tokens in prompts.items()}
        return passes | {seq: self._verify(seq, tree) for seq, tree in offers.items()}

    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None:
        self._begin("commit", len(path))
        tree = self._trees.pop(seq, None)
        if tree is None:
            raise DeviceError("commit without a verified tree")
        nodes = path.tolist()
        _require(nodes[:1] == [0], f"commit of {nodes}, which does not start at the root")
        _require(tree.parents[nodes].tolist() == [-1, *nodes[:-1]], f"commit of {nodes}, which is no path")
        self.texts[seq] += tree.tokens[nodes].tolist()

    def rewind(self, seq: SequenceId, keep: int) -> None:
        self._begin("rewind", keep)
        _require(0 <= keep <= self.length(seq), f"rewind to {keep} of {self.length(seq)} tokens")
        self._trees.pop(seq, None)
        del self.texts[seq][keep:]

    def close(self, seq: SequenceId) -> None:
        self._begin("close", len(self.texts.pop(seq, ())))
        self._trees.pop(seq, None)

    def _prompt(self, seq: SequenceId, tokens: TokenArray) -> TargetPass:
        text = self.texts[seq]
        _require(len(tokens) > 0, "prefill of no tokens")
        _require(seq not in self._trees, "prefill with a verified tree that was neither committed nor rewound")
        _require(len(text) + len(tokens) <= self.max_context, "prefill past the context")
        _require(len(tokens) <= self.room, "prefill past the memory")
        start = len(text)
        text += tokens.tolist()
        prefixes = [tuple(text[: start + i + 1]) for i in range(len(tokens))]
        return self._lend(prefixes[-1:], prefixes)

    def _verify(self, seq: SequenceId, tree: DraftTree) -> TargetPass:
        text = self.texts[seq]
        _require(seq not in self._trees, "verify of a second tree")
        _require(len(text) > 0, "verify before any prefill")
        _require(len(text) + len(tree) <= self.max_context, "verify past the context")
        self._trees[seq] = tree
        prefixes = [(*text, *path) for path in _paths(tree)]
        return self._lend(prefixes, prefixes)

    def _begin(self, call: str, count: int) -> None:
        self.calls.append((call, count))
        for array in self._lent:
            array.fill(np.nan)
        self._lent = []

    def _lend(self, logits: Sequence[Prefix], features: Sequence[Prefix]) -> TargetPass:
        result = TargetPass(
            logits=np.stack([self.logits_of(prefix) for prefix in logits]).astype(np.float32),
            features=np.array([_feature(prefix) for prefix in features], np.float32),
        )
        self._lent += [result.logits, result.features]
        return result


class ScriptedDrafter:
    """A drafter whose trees are a function of the tokens so far; implements Drafter."""

    device, top_k = "scripted", 1 << 20
    report = DeviceReport()

    def __init__(self, propose: Propose, capacity: int = 1 << 20) -> None:
        self._propose, self.capacity = propose, capacity
        self.texts: dict[SequenceId, list[int]] = {}  # x[start..]; the first feature gives x[start]
        self.starts: dict[SequenceId, int] = {}
        self.calls: list[tuple[str, int]] = []

    @classmethod
    def copy_of(cls, logits_of: LogitsOf, noise: float = 0.0, seed: int = 0) -> ScriptedDrafter:
        """Return a drafter with the target's logits plus normal noise of deviation `noise`."""
        return cls(partial(_grow, _noisy(logits_of, noise, seed)))

    @classmethod
    def hostile_to(cls, logits_of: LogitsOf) -> ScriptedDrafter:
        """Return a drafter that proposes the target's least likely tokens."""
        return cls(partial(_grow, lambda path: -logits_of(path)))

    def length(self, seq: SequenceId) -> int:
        return max(len(self.texts.get(seq, ())) - 1, 0)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        self.calls.append(("extend", len(tokens)))
        _require(len(tokens) > 0, "extend by nothing")
        _require(self.length(seq) + len(tokens) <= self.capacity, "extend past the capacity")
        _require(features.shape == (len(tokens), FEATURE_SIZE), f"features {features.shape} for {len(tokens)} tokens")
        for token, feature in zip(tokens.tolist(), features.tolist(), strict=True):
            if not self.texts.get(seq):
                self.starts[seq], self.texts[seq] = int(feature[0]), [int(feature[1])]
            text, start = self.texts[seq], self.starts[seq]
            place, *rest = _feature(tuple(text))
            known = len(rest) if start == 0 else 1  # the checksum covers the whole text
            own = [place + start, *rest[:known]] == feature[: known + 1]
            _require(own, f"pair {self.length(seq)} has the feature of another")
            text.append(token)

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        self.calls.append(("propose", limits.width))
        _require(self.length(seq) > 0, "propose before any extend")
        return self._propose(tuple(self.texts[seq]), limits, judge, noise)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        self.calls.append(("rewind", keep))
        _require(0 <= keep <= self.length(seq), f"rewind to {keep} of {self.length(seq)} pairs")
        del self.texts.setdefault(seq, [])[keep + 1 if keep else 0 :]

    def close(self) -> None:
        self.calls.append(("close", 0))


class ScriptedTokenizer:
    """One token per character: its place in `alphabet`. Chat turns become role:content lines."""

    def __init__(self, alphabet: str, *, has_chat_template: bool = False, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.alphabet, self.has_chat_template, self.eos_token_ids = alphabet, has_chat_template, eos_token_ids

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def has_token(self, token_id: int) -> bool:
        return 0 <= token_id < len(self.alphabet)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, parse_special: bool = False, **options: Any
    ) -> list[int]:
        return self.encode("".join(f"{message['role']}:{message['content']}\n" for message in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[token] for token in ids)

    def detokenizer(self, *, calls: bool = False) -> ScriptedDetokenizer:
        return ScriptedDetokenizer(self.alphabet)


class ScriptedDetokenizer:
    """Holds "~" back until the next character, like an unfinished UTF-8 sequence."""

    def __init__(self, alphabet: str) -> None:
        self._alphabet, self._held = alphabet, ""

    def add(self, token_id: int) -> str:
        text = self._held + self._alphabet[token_id]
        self._held = "~" if text.endswith("~") else ""
        return text.removesuffix(self._held)

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def _require(condition: bool, misuse: str) -> None:
    if not condition:
        raise DeviceError(f"misuse of a session: {misuse}")


def _paths(tree: DraftTree) -> Iterator[Prefix]:
    """Yield the tokens from the root to each node."""
    paths: list[Prefix] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return iter(paths)


def _noisy(logits_of: LogitsOf, noise: float, seed: int) -> LogitsOf:
    def noisy(prefix: Prefix) -> FloatArray:
        clean = logits_of(prefix)
        rng = np.random.default_rng([seed, crc32(np.array(prefix, np.int64).tobytes())])
        return (clean + noise * rng.normal(size=clean.shape)).astype(np.float32)

    return noisy if noise else logits_of


def _grow(
    logits_of: LogitsOf, prefix: Prefix, limits: TreeLimits, judge: Judge | None, noise: DraftNoise | None
) -> DraftTree:
    paths: dict[int, Prefix] = {0: prefix}  # draft row -> tokens up to it

    def candidates(rows: Sequence[int]) -> Candidates:
        logits = np.stack([logits_of(paths[row]) for row in rows]).astype(np.float64)
        if noise:
            logits += noise(1 + len(paths[rows[0]]) - len(prefix), np.arange(logits.shape[-1]))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, : limits.top_k]
        return Candidates(np.take_along_axis(logprobs, ids, -1).astype(np.float32), ids)

    def expand(level: Level) -> Candidates:
        rows = level.rows.tolist()
        for row, parent, token in zip(rows, level.parent_rows.tolist(), level.tokens.tolist(), strict=True):
            paths[row] = (*paths[parent], token)
        return candidates(rows)

    return grow_tree(prefix[-1], candidates([0]), expand, limits, judge=judge)
