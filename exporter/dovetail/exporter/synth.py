"""The target writes its own training text: prompts from a file or from itself, answers in batches.

Axes: S sequences in flight, V vocabulary.
A conversation is kept as token ids with the length of its prompt; the drafter is trained on the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.cli import prompts as prompt_files
from dovetail.runtime.errors import TrainError
from dovetail.runtime.paged import BLOCK, Batch, PagedModel
from dovetail.runtime.tokenizer import Tokenizer

PREFILL_TOKENS = 512  # prompt tokens admitted per pass, so that running answers do not stall


@dataclass(frozen=True)
class Request:
    """One text to be continued.  prompt: token ids; temperature 0 is greedy."""

    prompt: tuple[int, ...]
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Conversation:
    """tokens: prompt and answer, stop token included if there was one; prompt_length: where the answer starts."""

    tokens: tuple[int, ...]
    prompt_length: int


@dataclass
class _Slot:
    request: Request
    tokens: list[int]
    cached: int = 0


class BatchWriter:
    """Continuous batching over one PagedModel: a finished sequence makes room for the next at once."""

    def __init__(self, model: PagedModel, stop: Iterable[int], *, slots: int = 48, max_length: int = 768):
        self.model = model
        self.stop = frozenset(stop)
        self.max_length = max_length
        self.blocks_per_slot = -(-max_length // BLOCK)
        self._slots: list[_Slot | None] = [None] * slots
        model.reserve(slots * self.blocks_per_slot)

    def write(self, requests: Iterable[Request], rng: np.random.Generator) -> Iterator[Conversation]:
        """Continue every request; conversations come in the order in which they finish.

        A prompt that fills `max_length` by itself gets no answer and no conversation: count what comes back.
        """
        waiting = iter(requests)
        while True:
            self._admit(waiting)
            active = [(i, slot) for i, slot in enumerate(self._slots) if slot is not None]
            if not active:
                return
            logits, _ = self.model.run(self._batch(active))
            for (index, slot), row in zip(active, logits, strict=True):
                token = _choose(row, slot.request.temperature, rng)
                slot.cached = len(slot.tokens)
                slot.tokens.append(token)
                new = len(slot.tokens) - len(slot.request.prompt)
                full = len(slot.tokens) >= self.max_length or new >= slot.request.max_new_tokens
                if full or token in self.stop:
                    self._slots[index] = None
                    yield Conversation(tuple(slot.tokens), len(slot.request.prompt))

    def _admit(self, waiting: Iterator[Request]) -> None:
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


def _choose(logits: NDArray[np.float32], temperature: float, rng: np.random.Generator) -> int:
    """Greedy, or one draw at `temperature` by the Gumbel trick.  logits: [V]."""
    if temperature == 0:
        return int(logits.argmax())
    return int((logits / temperature - np.log(rng.exponential(size=logits.shape))).argmax())


def chat_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of one user turn, ready for the assistant's answer."""
    if not tokenizer.has_chat_template:
        return tuple(tokenizer.encode(text))
    return tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))


def bare_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a chat template puts before the user's words: a target that continues it writes a prompt.

    Raises TrainError when the target has no chat template.
    """
    if not tokenizer.has_chat_template:
        raise TrainError("the target has no chat template to write prompts from: give --prompts FILE.jsonl")
    marker = "DOVETAIL-PROMPT-GOES-HERE"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": marker}])
    return tuple(tokenizer.encode(rendered.split(marker)[0], add_special_tokens=False))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSONL file, in the layout that `dovetail-run bench` reads; of `turns` the first is taken."""
    return [conversation.turns[0] for conversation in prompt_files.read_prompts(path)]


def write_prompts(
    writer: BatchWriter, tokenizer: Tokenizer, count: int, rng: np.random.Generator, progress: Callable[[int], None]
) -> list[str]:
    """Let the target write `count` different prompts from the bare chat prefix, sampled at temperature 1."""
    prefix = bare_prefix(tokenizer)
    found: dict[str, None] = {}
    for _ in range(4):  # duplicates and fragments cost a few rounds at most
        missing = count - len(found)
        if missing <= 0:
            break
        requests = (Request(prefix, 1.0, 160) for _ in range(missing))
        for conversation in writer.write(requests, rng):
            text = tokenizer.decode(list(conversation.tokens[len(prefix) :])).strip()
            ended = conversation.tokens[-1] in writer.stop
            if ended and 16 <= len(text) <= 1200:
                found.setdefault(text)
                progress(len(found))
    return list(found)[:count]


def answer_requests(
    tokenizer: Tokenizer, prompts: Iterable[str], rng: np.random.Generator, max_new_tokens: int
) -> Iterator[Request]:
    """One request per prompt: three in four greedy, as most use is, the others at temperature 0.8."""
    for prompt in prompts:
        temperature = 0.0 if rng.random() < 0.75 else 0.8
        yield Request(chat_prompt(tokenizer, prompt), temperature, max_new_tokens)
