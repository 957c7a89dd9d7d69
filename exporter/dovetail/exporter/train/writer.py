"""Lets the target write training text: answers to prompts, and prompts of its own, in batches."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dovetail.exporter.train.corpus import TrainingText
from dovetail.exporter.train.features import to_float16
from dovetail.runtime.errors import TrainError
from dovetail.runtime.loop.batch import SequenceBatch, Ticket
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK, PagedModel
from dovetail.runtime.text.tokenizer import Tokenizer

PASS_TOKENS = 512  # prompt tokens of a pass
KV_BYTES = 3e9  # memory for keys and values, which limits the sequences of a batch
PROMPT_TOKENS = 200  # longest prompt that the target writes itself


class SharedDraws(Sampler):
    """Draws with numbers that all texts of a batch share, in the order of their turns."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        super().__init__(params)
        self._rng = rng

    def pick(
        self,
        logits: NDArray[np.float32],
        position: int,
        context: Sequence[int],
        allowed: NDArray[np.int64] | None = None,
    ) -> int:
        return draw(logits, self.params.temperature, self._rng) if self.params.temperature else int(logits.argmax())


class BatchWriter:
    """Writes many texts at once with one PagedModel.

    slots: largest number of sequences of a batch.
    """

    def __init__(self, model: PagedModel, stop: Iterable[int], *, slots: int = 128, max_length: int = 768):
        self.model, self.stop, self.max_length = model, frozenset(stop), max_length
        slots = max(2, min(slots, int(KV_BYTES / (model.block_bytes * -(-max_length // BLOCK)))))
        target = OpenVINOTarget(model, max_length, exact=False, sequences=slots)
        self._batch = SequenceBatch(target, slots, prompt_tokens=PASS_TOKENS)

    def write(
        self, requests: Iterable[Request], rng: np.random.Generator, keep_features: bool = False
    ) -> Iterator[TrainingText]:
        """Yield the conversations as they finish; none for a prompt that fills `max_length` alone.

        keep_features: return the target's features with each, which every pass computes.
        """
        fitting = (replace(each, stop_tokens=self.stop) for each in requests if len(each.prompt) < self.max_length)
        written: dict[Ticket, list[int]] = defaultdict(list)
        features: dict[Ticket, list[NDArray[np.float16]]] = defaultdict(list)
        for advance in self._batch.run(fitting, lambda request: SharedDraws(request.sampling, rng)):
            ticket, step = advance.ticket, advance.step
            written[ticket] += step.tokens
            if keep_features:
                features[ticket].append(to_float16(advance.features))
            if step.finish:
                tokens = (*ticket.request.prompt, *written.pop(ticket), *([] if step.stop is None else [step.stop]))
                kept = np.concatenate(features.pop(ticket)) if keep_features else None
                yield TrainingText(tokens, len(ticket.request.prompt), kept)


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
    """Token ids of a chat template before the user's words. Raises TrainError without a template."""
    if not tokenizer.has_chat_template:
        raise TrainError("the target has no chat template to write prompts from: give --prompts FILE.jsonl")
    marker = "DOVETAIL-PROMPT-GOES-HERE"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": marker}])
    return tuple(tokenizer.encode(rendered.split(marker)[0], add_special_tokens=False))


def write_prompts(
    writer: BatchWriter, tokenizer: Tokenizer, openings: Sequence[str], count: int, rng: np.random.Generator,
    seen: set[str],
) -> Iterator[str]:  # fmt: skip
    """Yield up to `count` prompts that the target samples after the bare chat prefix.

    openings: beginnings of prompts, one drawn for each; "" lets the target begin.
    seen: fingerprints of earlier prompts; grows. Duplicates, fragments and prompts outside 16 to
    1,200 characters are dropped.
    """
    prefix = bare_prefix(tokenizer)
    starts = [prefix + tuple(tokenizer.encode(text, add_special_tokens=False)) for text in openings]
    sampling = SamplingParams(temperature=1.0)
    drawn = (starts[rng.integers(len(starts))] for _ in range(count))
    requests = (Request(start, PROMPT_TOKENS, sampling) for start in drawn if start)
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
) -> Iterator[Request]:
    """Yield a request per prompt: three in four greedy, as in most use, the others at 0.8."""
    for prompt in prompts:
        temperature = 0.0 if rng.random() < 0.75 else 0.8
        if tokens := chat_prompt(tokenizer, prompt):
            yield Request(tokens, max_new_tokens, SamplingParams(temperature=temperature))
