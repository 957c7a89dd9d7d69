"""Lets the target write training text: answers to prompts, and prompts of its own, in batches.

Axes: S sequences of a batch, V vocabulary.
A conversation holds token ids and the length of its prompt; the drafter trains on the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dovetail.exporter.train.corpus import TrainingText
from dovetail.exporter.train.features import to_float16
from dovetail.runtime.errors import TrainError
from dovetail.runtime.target.paged import BLOCK, Batch, PagedModel
from dovetail.runtime.text.tokenizer import Tokenizer

PROMPT_TOKENS = 200  # longest prompt that the target writes itself
PREFILL_TOKENS = 512  # prompt tokens admitted per pass, so that running answers do not wait


@dataclass(frozen=True)
class TextRequest:
    """One text to continue. prompt: token ids; temperature 0 is greedy."""

    prompt: tuple[int, ...]
    temperature: float
    max_new_tokens: int


@dataclass
class _Slot:
    request: TextRequest
    tokens: list[int]
    cached: int = 0
    features: list[NDArray[np.float16]] = field(default_factory=list)


class BatchWriter:
    """Continuous batching over one PagedModel: the next request takes a finished sequence's slot.

    kv_bytes: memory for keys and values, which limits the sequences of a batch. slots: their
    largest number. keep_features: return the target's features with each conversation; every pass
    computes them.
    """

    def __init__(
        self,
        model: PagedModel,
        stop: Iterable[int],
        *,
        slots: int = 128,
        max_length: int = 768,
        kv_bytes: float = 3e9,
        keep_features: bool = False,
    ):
        self.model = model
        self.stop = frozenset(stop)
        self.max_length = max_length
        self.keep_features = keep_features
        self.blocks_per_slot = -(-max_length // BLOCK)
        slots = max(2, min(slots, int(kv_bytes / (model.block_bytes * self.blocks_per_slot))))
        self._slots: list[_Slot | None] = [None] * slots
        model.reserve(slots * self.blocks_per_slot)

    def write(self, requests: Iterable[TextRequest], rng: np.random.Generator) -> Iterator[TrainingText]:
        """Continue every request; yield conversations in the order in which they finish.

        A prompt that fills `max_length` alone gives no conversation, so count the conversations.
        """
        waiting = iter(requests)
        while True:
            self._admit(waiting)
            active = [(i, slot) for i, slot in enumerate(self._slots) if slot is not None]
            if not active:
                return
            batch = self._batch(active)
            logits, features = self.model.run(batch)
            best = logits.argmax(-1)
            for row, (index, slot) in enumerate(active):
                if self.keep_features:
                    slot.features.append(to_float16(features[batch.begins[row] : batch.begins[row + 1]]))
                temperature = slot.request.temperature
                token = draw(logits[row], temperature, rng) if temperature else int(best[row])
                slot.cached = len(slot.tokens)
                slot.tokens.append(token)
                new = len(slot.tokens) - len(slot.request.prompt)
                full = len(slot.tokens) >= self.max_length or new >= slot.request.max_new_tokens
                if full or token in self.stop:
                    self._slots[index] = None
                    kept = np.concatenate(slot.features) if self.keep_features else None
                    yield TrainingText(tuple(slot.tokens), len(slot.request.prompt), kept)

    def _admit(self, waiting: Iterator[TextRequest]) -> None:
        budget = PREFILL_TOKENS
        for index, slot in enumerate(self._slots):
            if slot is not None or budget <= 0:
                continue
            request = next((r for r in waiting if 0 < len(r.prompt) < self.max_length), None)
            if request is None:
                return
            self._slots[index] = _Slot(request, list(request.prompt))
            budget -= len(request.prompt)

    def _batch(self, active: list[tuple[int, _Slot]]) -> Batch:
        new = [slot.tokens[slot.cached :] for _, slot in active]
        counts = [len(tokens) for tokens in new]
        begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        per = self.blocks_per_slot
        return Batch(
            tokens=np.concatenate(new).astype(np.int64),
            positions=np.concatenate([np.arange(s.cached, len(s.tokens)) for _, s in active]).astype(np.int64),
            past=np.array([slot.cached for _, slot in active], np.int32),
            begins=begins,
            blocks=np.concatenate([np.arange(i * per, (i + 1) * per) for i, _ in active]).astype(np.int32),
            block_begins=np.arange(0, (len(active) + 1) * per, per, dtype=np.int32),
            wanted=(begins[1:] - 1).astype(np.int64),
        )


def draw(logits: NDArray[np.float32], temperature: float, rng: np.random.Generator) -> int:
    """Draw one token at `temperature` by inverting the distribution function. logits: [V]."""
    weights = np.exp((logits - logits.max()) / temperature)
    edges = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(edges, rng.random() * edges[-1], side="right").clip(max=len(logits) - 1))


def chat_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of one user turn, ready for the assistant's answer."""
    if not tokenizer.has_chat_template:
        return tuple(tokenizer.encode(text))
    return tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))


def bare_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a chat template before the user's words; a target continues with a prompt.

    Raises TrainError if the target has no chat template.
    """
    if not tokenizer.has_chat_template:
        raise TrainError("the target has no chat template to write prompts from: give --prompts FILE.jsonl")
    marker = "DOVETAIL-PROMPT-GOES-HERE"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": marker}])
    return tuple(tokenizer.encode(rendered.split(marker)[0], add_special_tokens=False))


def write_prompts(
    writer: BatchWriter,
    tokenizer: Tokenizer,
    openings: Sequence[str],
    count: int,
    rng: np.random.Generator,
    seen: set[str],
) -> Iterator[str]:
    """Yield up to `count` prompts that the target samples after the bare chat prefix.

    openings: beginnings of prompts, one drawn for each; "" lets the target begin.
    seen: fingerprints of earlier prompts; grows. Duplicates, fragments and prompts outside 16 to
    1,200 characters are dropped.
    """
    prefix = bare_prefix(tokenizer)
    starts = [prefix + tuple(tokenizer.encode(text, add_special_tokens=False)) for text in openings]
    requests = (TextRequest(starts[rng.integers(len(starts))], 1.0, PROMPT_TOKENS) for _ in range(count))
    for conversation in writer.write(requests, rng):
        text = tokenizer.decode(list(conversation.tokens[len(prefix) :])).strip()
        ended = conversation.tokens[-1] in writer.stop
        if ended and 16 <= len(text) <= 1200 and (mark := fingerprint(text)) not in seen:
            seen.add(mark)
            yield text


def fingerprint(prompt: str) -> str:
    """The words of a prompt in lower case, equal for prompts with other spaces or punctuation."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def answer_requests(
    tokenizer: Tokenizer, prompts: Iterable[str], rng: np.random.Generator, max_new_tokens: int
) -> Iterator[TextRequest]:
    """Yield a request per prompt: three in four greedy, as in most use, the others at 0.8."""
    for prompt in prompts:
        temperature = 0.0 if rng.random() < 0.75 else 0.8
        yield TextRequest(chat_prompt(tokenizer, prompt), temperature, max_new_tokens)
