"""The training text of a run, in parts: given conversations, and answers to given or own prompts.

Each part has its own seed, is written as a whole and stays in `folder`. A stopped run continues
with the unfinished part and gets the text of an unbroken run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dovetail.exporter.train.corpus import Corpus, TrainingText
from dovetail.exporter.train.features import Part
from dovetail.exporter.train.writer import BatchWriter, answer_requests, fingerprint, write_prompts
from dovetail.runtime.errors import TrainError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.system.bounds import check_number, check_whole
from dovetail.runtime.system.files import read_json
from dovetail.runtime.system.progress import Progress
from dovetail.runtime.text.tokenizer import Tokenizer

PART_PROMPTS = 512  # prompts answered together
PART_TOKENS = 1 << 18  # tokens of a part of a given corpus
FIRST_PROMPTS = 64  # prompts of the first part under a time limit
ASK_MORE = 1.4  # own prompts begun per wanted prompt, because some are duplicates or fragments
SECONDS_MOST = 1e9  # longest run
DAMAGED = "remove the work folder and train again"
ROUNDS = 4  # most attempts to fill a part with own prompts
Ask = Callable[[int, int, int], Sequence[str]]  # (index of the part, prompts before it, prompts wanted) -> prompts


@dataclass
class TextWriter:
    """Writes the parts that need the target.

    folder: for `NAME.npz` and `NAME.prompts.json`. features: for `NAME.f16`, up to `feature_budget`
    bytes.
    """

    folder: Path
    features: Path
    feature_budget: float
    tokenizer: Tokenizer
    open_writer: Callable[[], BatchWriter]
    seed: int
    max_new_tokens: int
    progress: Progress

    @cached_property
    def writer(self) -> BatchWriter:
        return self.open_writer()

    def answers(self, prompts: Sequence[str], seconds: float | None = None) -> list[Part]:
        """Parts with the target's answers to `prompts`, as many as `seconds` allow."""
        parts = self._parts("answers", 3, lambda _, start, n: prompts[start : start + n], len(prompts), seconds)
        if left := len(prompts) - sum(int(part["prompts"]) for part in self._memory("answers")):
            self.progress("answers", len(prompts) - left, len(prompts), f"no time for the last {left} prompts")
        return parts

    def own(self, count: int | None, openings: Sequence[str], seconds: float | None = None) -> list[Part]:
        """Parts with answers to `count` of the target's own prompts, or as many as time allows."""
        seen: set[str] = set()

        def ask(index: int, start: int, wanted: int) -> Sequence[str]:
            path = self.folder / f"own-{index:04}.prompts.json"
            if path.exists():
                kept: list[str] = read_work(path)
                if not isinstance(kept, list) or not all(isinstance(prompt, str) for prompt in kept):
                    raise TrainError(f"{path} holds no prompts: {DAMAGED}")
                seen.update(map(fingerprint, kept))
                return kept
            rng = np.random.default_rng((self.seed, 2, index))
            prompts = self._ask(wanted, openings, rng, seen, start, count or 0)
            write_atomically(path, json.dumps(prompts).encode())
            return prompts

        parts = self._parts("own", 4, ask, count, seconds)
        if not parts:
            raise TrainError("the target wrote no usable prompt of its own: give --prompts FILE.jsonl")
        return parts

    def _parts(self, kind: str, key: int, ask: Ask, total: int | None, seconds: float | None) -> list[Part]:
        """Parts until `total` prompts are answered, `seconds` are over, or `ask` has no prompts.

        `KIND.json` stores the size and the seconds of each part, so that a stopped run continues
        with the same parts.
        """
        memory = self._memory(kind)
        parts: list[Part] = []
        start = 0
        while total is None or start < total:
            index = len(parts)
            known = index < len(memory)
            most = PART_PROMPTS if total is None else min(PART_PROMPTS, total - start)
            size = int(memory[index]["prompts"]) if known else _size(memory, most, seconds)
            begun = time.monotonic()
            if not size or not (prompts := ask(index, start, size)):
                break
            expected = total or max(start, round((seconds or 0) * _speed(memory)))
            parts.append(self._part(f"{kind}-{index:04}", (key, index), prompts, start, expected))
            if not known:
                # An earlier start may have begun the part: a prompt counts at least half the slowest rate.
                rate = max((part["seconds"] / part["prompts"] for part in memory), default=0.0)
                memory.append({"prompts": size, "seconds": max(time.monotonic() - begun, 0.5 * rate * size)})
                write_atomically(self.folder / f"{kind}.json", json.dumps(memory).encode())
            start += size
        return parts

    def _memory(self, kind: str) -> list[dict[str, float]]:
        path = self.folder / f"{kind}.json"
        memory: list[dict[str, float]] = read_work(path) if path.exists() else []
        if not isinstance(memory, list) or not all(isinstance(part, dict) for part in memory):
            raise TrainError(f"{path} holds no record of parts: {DAMAGED}")
        for part in memory:
            check_whole("prompts", part.get("prompts"), TrainError, DAMAGED, most=PART_PROMPTS)
            check_number("seconds", part.get("seconds"), TrainError, DAMAGED, most=SECONDS_MOST)
        return memory

    def _ask(
        self, count: int, openings: Sequence[str], rng: np.random.Generator, seen: set[str], start: int, total: int
    ) -> list[str]:
        """About `count` new prompts; fewer if the target repeats itself."""
        prompts: list[str] = []
        for _ in range(ROUNDS):
            if (wanted := count - len(prompts)) <= 0:
                break
            for prompt in write_prompts(self.writer, self.tokenizer, openings, int(wanted * ASK_MORE) + 1, rng, seen):
                prompts.append(prompt)
                self.progress("prompts", start + min(len(prompts), count), total, "")
        seen.difference_update(map(fingerprint, prompts[count:]))  # a later start reads only prompts[:count]
        return prompts[:count]

    def _part(self, name: str, key: tuple[int, int], prompts: Sequence[str], start: int, total: int) -> Part:
        """The part of answers to `prompts`, read or written; features are stored if they fit."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            return Part(name, Corpus.load(path))
        file = self.features / f"{name}.f16"
        keep = self._has_room(file, len(prompts))
        rng = np.random.default_rng((self.seed, *key))
        requests = answer_requests(self.tokenizer, prompts, rng, self.max_new_tokens)
        written: list[TrainingText] = []
        with _whole_file(file) if keep else nullcontext() as out:
            for conversation in self.writer.write(requests, rng, keep):
                if out:
                    rows = conversation.features
                    assert rows is not None  # the writer was asked for them
                    out.write(rows.tobytes() + bytes(rows[:1].nbytes))  # no pass runs the last token: zeros
                written.append(replace(conversation, features=None))
                self.progress("answers", start + len(written), total, "")
        if lost := len(prompts) - len(written):
            note = f"{lost} left out: the prompt alone fills {self.writer.max_length} tokens"
            self.progress("answers", start + len(prompts), total, note)
        corpus = Corpus.of(written)
        corpus.save(path)
        return Part(name, corpus)

    def _has_room(self, file: Path, prompts: int) -> bool:
        """Whether features of `prompts` full-length conversations fit the budget and the disk."""
        longest = 2 * prompts * self.writer.max_length * self.writer.model.feature_size
        used = sum(other.stat().st_size for other in self.features.glob("*.f16") if other != file)
        return used + longest <= self.feature_budget and longest < shutil.disk_usage(self.features).free


def read_work(path: Path) -> Any:
    """Read a JSON file of a work folder. Raises TrainError for a damaged file."""
    return read_json(path, TrainError, DAMAGED)


def _speed(memory: list[dict[str, float]]) -> float:
    """Prompts per second of the parts so far; 0 without a part."""
    spent = sum(part["seconds"] for part in memory)
    return sum(part["prompts"] for part in memory) / spent if spent else 0.0


def _size(memory: list[dict[str, float]], most: int, seconds: float | None) -> int:
    """Prompts of the next part: `most`, or as many as the rest of `seconds` allows."""
    if seconds is None:
        return most
    if not memory:
        return min(FIRST_PROMPTS, most)
    affordable = int((seconds - sum(part["seconds"] for part in memory)) * _speed(memory))
    return min(most, affordable) if affordable >= FIRST_PROMPTS // 2 else 0


@contextmanager
def _whole_file(file: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name on a clean exit."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as out:
            yield out
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def split(name: str, corpus: Corpus) -> list[Part]:
    """Split a corpus into parts of at most PART_TOKENS tokens, and of at least one conversation."""
    offsets = corpus.offsets
    cuts = [0]
    while cuts[-1] < len(corpus):
        end = int(np.searchsorted(offsets, offsets[cuts[-1]] + PART_TOKENS, side="right")) - 1
        cuts.append(max(end, cuts[-1] + 1))
    return [Part(f"{name}-{i:04}", corpus.select(np.arange(a, b))) for i, (a, b) in enumerate(pairwise(cuts))]
