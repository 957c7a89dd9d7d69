"""Training text as token ids, and the draft vocabulary from the text's token counts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import TrainError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.system.files import read_arrays

ARRAYS = ("tokens", "lengths", "prompt_lengths")
_AGAIN = "give an .npz that `train` can write"


@dataclass(frozen=True)
class TrainingText:
    """One text. tokens: prompt and answer, with a stop token that the target wrote.

    prompt_length: position of the answer's first token. features: [len(tokens) - 1, D] float16 if
    the writer keeps features; the target never runs the last token.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    features: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class Corpus:
    """Conversations, concatenated. tokens: [total]. lengths, prompt_lengths: [conversations]."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.lengths.ndim != 1 or self.lengths.shape != self.prompt_lengths.shape:
            raise TrainError("corpus has tokens, lengths or prompt_lengths that are no list: write the corpus again")
        if int(self.lengths.sum()) != len(self.tokens):
            raise TrainError(
                f"corpus has {len(self.tokens)} tokens, but lengths add up to {int(self.lengths.sum())}: "
                "write the corpus again"
            )
        if len(self.tokens) and int(self.tokens.min()) < 0:
            raise TrainError(f"corpus has token {int(self.tokens.min())}, but ids count from 0: write the corpus again")
        odd = np.flatnonzero((self.prompt_lengths < 1) | (self.prompt_lengths > self.lengths))
        if len(odd):
            raise TrainError(
                f"conversation {odd[0]} of the corpus has {self.prompt_lengths[odd[0]]} prompt tokens of "
                f"{self.lengths[odd[0]]}: give 1 or more, at most all"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Position of each conversation's first token, and the end: [conversations + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def answer_tokens(self) -> int:
        return int((self.lengths - self.prompt_lengths).sum())

    @classmethod
    def of(cls, conversations: Iterable[TrainingText]) -> Corpus:
        found = list(conversations)
        return cls(
            np.array([token for c in found for token in c.tokens], np.int64),
            np.array([len(c.tokens) for c in found], np.int64),
            np.array([c.prompt_length for c in found], np.int64),
        )

    @classmethod
    def join(cls, corpora: Sequence[Corpus]) -> Corpus:
        whole = [cls.of(()), *corpora]
        return cls(*(np.concatenate([getattr(each, name) for each in whole]) for name in ARRAYS))

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read an .npz with `tokens`, `lengths`, `prompt_lengths`."""
        arrays = read_arrays(path, ARRAYS, TrainError, _AGAIN)
        if any(array.dtype.kind not in "iu" for array in arrays):
            raise TrainError(f"{path} holds {', '.join(str(array.dtype) for array in arrays)}, not ids: {_AGAIN}")
        try:
            return cls(*(array.astype(np.int64) for array in arrays))
        except TrainError as error:
            raise TrainError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the .npz atomically."""
        lengths, prompt_lengths = self.lengths.astype(np.int32), self.prompt_lengths.astype(np.int32)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, tokens=self.tokens.astype(np.uint32), lengths=lengths, prompt_lengths=prompt_lengths
        )
        write_atomically(path, buffer.getvalue())

    def select(self, indices: NDArray[np.int64]) -> Corpus:
        starts = self.offsets
        parts = [self.tokens[starts[i] : starts[i + 1]] for i in indices]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return Corpus(tokens, self.lengths[indices], self.prompt_lengths[indices])

    def doubles(self) -> NDArray[np.bool_]:
        """Whether an earlier conversation has the same prompt: [conversations].

        Training on such a double would reveal a held-out answer.
        """
        seen: set[bytes] = set()
        out = np.zeros(len(self), bool)
        for i, (start, size) in enumerate(zip(self.offsets[:-1], self.prompt_lengths, strict=True)):
            prompt = self.tokens[start : start + size].tobytes()
            out[i] = prompt in seen
            seen.add(prompt)
        return out


def draft_vocabulary(corpus: Corpus, size: int, vocab_size: int) -> NDArray[np.int64]:
    """`d2t` [size] int64: the most frequent tokens, sorted by id; unseen tokens rank by id.

    A token of a prompt counts a tenth of a token of an answer, because the drafter drafts answers.
    """
    if corpus.tokens.size and int(corpus.tokens.max()) >= vocab_size:
        raise TrainError(
            f"corpus has token {int(corpus.tokens.max())}, the target's vocabulary ends at {vocab_size - 1}: "
            "give a corpus that this target wrote, not another target"
        )
    position = np.arange(len(corpus.tokens)) - np.repeat(corpus.offsets[:-1], corpus.lengths)
    weight = np.where(position >= np.repeat(corpus.prompt_lengths, corpus.lengths), 1.0, 0.1)
    counts = np.bincount(corpus.tokens, weights=weight, minlength=vocab_size)
    order = np.lexsort((np.arange(vocab_size), -counts))
    return np.sort(order[:size]).astype(np.int64)
