"""The training text of a run, in parts: conversations given, answers to given prompts, and what the target asks itself.

Each part is written whole, from a seed of its own, and is left in `folder`: a stopped run goes on with the part
in which it stopped, and gets the text that an unbroken run would have got.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from dovetail.runtime.errors import TrainError
from dovetail.runtime.manifest import write_atomically
from dovetail.runtime.tokenizer import Tokenizer

from .corpus import Corpus
from .features import Part
from .fitting import Progress
from .synth import BatchWriter, Conversation, answer_requests, fingerprint, write_prompts

PART_PROMPTS = 512  # prompts answered together
PART_TOKENS = 1 << 18  # tokens of a part of a given corpus
ASK_MORE = 1.4  # own prompts begun for each one wanted: some are duplicates or fragments
ROUNDS = 4  # of asking for the rest, before a part is taken as it is


@dataclass
class TextWriter:
    """Writes the parts that need the target.

    folder: takes `NAME.npz` and `NAME.prompts.json`; features: takes `NAME.f16` while there are `feature_budget`
    bytes for them.  progress(stage, done, total, note).
    """

    folder: Path
    features: Path
    feature_budget: float
    tokenizer: Tokenizer
    open_writer: Callable[[], BatchWriter]
    seed: int
    max_new_tokens: int
    progress: Progress
    _writer: BatchWriter | None = field(default=None, init=False)

    @property
    def writer(self) -> BatchWriter:
        """Opened when the first part must be written."""
        if self._writer is None:
            self._writer = self.open_writer()
        return self._writer

    def answers(self, prompts: Sequence[str]) -> list[Part]:
        """Parts of the target's answers to given prompts."""
        blocks = range(0, len(prompts), PART_PROMPTS)
        return [
            self._part(f"answers-{index:04}", (3, index), prompts[start : start + PART_PROMPTS], start, len(prompts))
            for index, start in enumerate(blocks)
        ]

    def own(self, count: int, openings: Sequence[str]) -> list[Part]:
        """Parts of answers to `count` prompts that the target writes itself."""
        parts: list[Part] = []
        seen: set[str] = set()
        for index, start in enumerate(range(0, count, PART_PROMPTS)):
            parts.append(self._own_part(index, min(PART_PROMPTS, count - start), start, count, openings, seen))
        return parts

    def own_for(self, seconds: float, openings: Sequence[str]) -> list[Part]:
        """Parts like `own`, until writing them has taken `seconds`, at least one; their number is kept in own.json."""
        memory = self.folder / "own.json"
        spent: list[float] = json.loads(memory.read_text())["seconds"] if memory.exists() else []
        parts: list[Part] = []
        seen: set[str] = set()
        while True:
            index = len(parts)
            if index >= len(spent) and spent and sum(spent) + sum(spent) / len(spent) / 2 > seconds:
                return parts
            begun = time.monotonic()
            start = index * PART_PROMPTS
            total = max(start + PART_PROMPTS, round(seconds / (sum(spent) / len(spent)) * PART_PROMPTS) if spent else 0)
            parts.append(self._own_part(index, PART_PROMPTS, start, total, openings, seen))
            if index >= len(spent):
                spent.append(time.monotonic() - begun)
                write_atomically(memory, json.dumps({"seconds": spent}).encode())

    def _own_part(
        self, index: int, count: int, start: int, total: int, openings: Sequence[str], seen: set[str]
    ) -> Part:
        name = f"own-{index:04}"
        path = self.folder / f"{name}.prompts.json"
        if path.exists():
            prompts: list[str] = json.loads(path.read_text())
            seen.update(map(fingerprint, prompts))
        else:
            prompts = self._ask(count, openings, np.random.default_rng((self.seed, 2, index)), seen, start, total)
            write_atomically(path, json.dumps(prompts).encode())
        return self._part(name, (4, index), prompts, start, total)

    def _ask(
        self, count: int, openings: Sequence[str], rng: np.random.Generator, seen: set[str], start: int, total: int
    ) -> list[str]:
        """About `count` new prompts; fewer when the target repeats itself."""
        self.writer.keep_features = False
        prompts: list[str] = []
        for _ in range(ROUNDS):
            wanted = count - len(prompts)
            if wanted <= 0:
                break
            prompts += write_prompts(self.writer, self.tokenizer, openings, int(wanted * ASK_MORE) + 1, rng, seen)
            self.progress("prompts", start + min(len(prompts), count), total, "")
        if not prompts:
            raise TrainError("the target wrote no usable prompt of its own: give --prompts FILE.jsonl")
        return prompts[:count]

    def _part(self, name: str, key: tuple[int, int], prompts: Sequence[str], start: int, total: int) -> Part:
        """Answers to `prompts`, read back or written, with their features while there is room for them."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            return Part(name, Corpus.load(path))
        file = self.features / f"{name}.f16"
        used = sum(f.stat().st_size for f in self.features.glob("*.f16") if f != file)
        longest = 2 * len(prompts) * self.writer.max_length * self.writer.model.feature_size
        self.writer.keep_features = used + longest <= self.feature_budget
        rng = np.random.default_rng((self.seed, *key))
        written: list[Conversation] = []
        for conversation in self.writer.write(answer_requests(self.tokenizer, prompts, rng, self.max_new_tokens), rng):
            written.append(conversation)
            self.progress("answers", start + len(written), total, "")
        if lost := len(prompts) - len(written):
            note = f"{lost} left out: a prompt fills {self.writer.max_length} tokens by itself"
            self.progress("answers", start + len(prompts), total, note)
        corpus = Corpus.of(written)
        if self.writer.keep_features and written:
            _save_features(file, written)
        corpus.save(path)
        return Part(name, corpus)


def _save_features(file: Path, written: Sequence[Conversation]) -> None:
    """[T, D] float16 in the corpus's order; the last token's row, which no pass computed, is zero and never read."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as out:
        for conversation in written:
            assert conversation.features is not None
            conversation.features.tofile(out)
            np.zeros_like(conversation.features[:1]).tofile(out)
    temporary.replace(file)


def split(name: str, corpus: Corpus) -> list[Part]:
    """A given corpus in parts of at most PART_TOKENS tokens (one conversation at least)."""
    offsets = corpus.offsets
    cuts = [0]
    while cuts[-1] < len(corpus):
        end = int(np.searchsorted(offsets, offsets[cuts[-1]] + PART_TOKENS, side="right")) - 1
        cuts.append(max(end, cuts[-1] + 1))
    return [Part(f"{name}-{i:04}", corpus.select(np.arange(a, b))) for i, (a, b) in enumerate(pairwise(cuts))]
