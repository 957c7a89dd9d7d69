"""Many answers at once: requests share the passes of one target and join between rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, Unpack

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.errors import DovetailError, InputError, QueueFull
from dovetail.runtime.front import Answer, Ask, Chunk, Front, RequestOptions
from dovetail.runtime.loop.batch import SequenceBatch, Ticket
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.constraint import Constraint
from dovetail.runtime.system import machine
from dovetail.runtime.system.bounds import check_whole
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.session import Target
from dovetail.runtime.text.encoding import Prompt, TextTokenizer
from dovetail.runtime.tree.limits import TreeLimits

SLOTS = 8  # answers at a time
QUEUE = 64  # requests that wait
MOST = 4096  # of either


@dataclass(frozen=True)
class EngineStats:
    """An engine's state now, and its counts since it was opened."""

    running: int  # answers in the passes
    waiting: int  # requests in the queue
    slots: int
    kv_used: float  # share of the KV memory, 0 to 1, that running answers take; kept prefixes make room for others
    requests: int  # that ended or were cancelled
    rounds: int  # of answers that ended, as in GenerationMetrics
    drafted: int
    accepted: int
    accepted_per_position: tuple[int, ...]


@dataclass(eq=False)
class Job:
    """A request of a BatchEngine, from `submit` to its last chunk."""

    ticket: Ticket
    answer: Answer


class BatchEngine:
    """Answers many requests at once. `submit` queues one, `step` runs a pass for all.

    Each text is the same tokens as alone. Not thread-safe; AsyncEngine gives it a thread.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: TextTokenizer,
        *,
        slots: int = SLOTS,
        queue: int = QUEUE,
        tree: TreeLimits | None = None,
        scheduler: Policy | None = None,
        stop_tokens: Iterable[int] | None = None,
    ) -> None:
        """slots: answers at a time. queue: requests that may wait. Others: see Engine."""
        check_whole("slots", slots, InputError, "give answers at a time, e.g. 8", most=MOST)
        check_whole("queue", queue, InputError, "give requests that may wait, e.g. 64", least=0, most=MOST)
        limits = tree or (BOUNDS if scheduler else TreeLimits())
        self._front = Front(tokenizer, target.max_context, limits, scheduler, stop_tokens, drafter, target.largest_tree)
        self._batch = SequenceBatch(target, slots, drafter, scheduler, share_prefixes=True)
        self._memory = target.room
        self._drafter, self.slots, self.queue = drafter, slots, queue
        self._jobs: dict[Ticket, Job] = {}
        self._requests, self._totals = 0, (0, 0, 0)
        self._accepted_per_position = list[int]()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        slots: int = SLOTS,
        queue: int = QUEUE,
        kv_cache: int | str | None = None,
        drafter_device: str = "auto",
        vram: str | int | None = None,
        fit: bool = False,
        threads: int | None = None,
        tree: TreeLimits | None = None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
        max_slowdown: float = Scheduler.max_slowdown,
        draft_model: str | Path | None = None,
        gpu_layers: int | str | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Open a pair folder. slots: answers at a time. queue: requests that may wait.

        kv_cache: bytes for the KV of all texts, or "4GB"; None for whole contexts in all slots, but
        at most a quarter of the machine's memory. Others, and errors: see Engine.from_pretrained.
        """
        from dovetail.runtime.drafter.vram import parse_size
        from dovetail.runtime.load import LoadOptions, load

        check_whole("slots", slots, InputError, "give answers at a time, e.g. 8", most=MOST)
        room, memory = (parse_size(size) if isinstance(size, str) else size for size in (vram, kv_cache))
        if memory is None:
            memory = machine.ram_mb()[0] * 2**20 // 4
        options = LoadOptions(
            drafter_device, room, fit, threads, tree, ov_config or {}, exact, max_slowdown, draft_model,
            slots=slots, kv_cache=memory, gpu_layers=gpu_layers,
        )  # fmt: skip
        return cls(**vars(load(Path(path), options, progress)), slots=slots, queue=queue)

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._front.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._front.max_context

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self._front.stop_tokens

    @property
    def target_device(self) -> str:
        """Where the target runs now."""
        return self._batch.target.device

    @property
    def drafter_device(self) -> str | None:
        """Where the drafter runs now."""
        return self._drafter.device if self._drafter else None

    @property
    def drafter_note(self) -> str | None:
        """Why the drafter runs there, if it says so."""
        return (self._drafter.report.note or None) if self._drafter else None

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._jobs

    def ask(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        **options: Unpack[RequestOptions],
    ) -> Ask:
        """Return a checked request for `submit`; any thread may call this. Arguments: see Engine.stream.

        Raises InputError, ContextOverflow.
        """
        return self._front.ask(prompt, max_new_tokens, **options)

    def constraint(
        self,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Constraint:
        """See Engine.constraint."""
        return self._front.constraint(json_schema=json_schema, regex=regex, grammar=grammar)

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> int:
        """See Engine.count_tokens."""
        return self._front.count_tokens(prompt, raw, template_options, parse_special)

    def submit(self, ask: Ask) -> Job:
        """Queue a request. Raises QueueFull."""
        if len(self._jobs) >= self.slots + self.queue:
            raise QueueFull(f"{len(self._jobs)} requests are running or waiting already: try again later")
        ticket = self._batch.add(ask.request)
        job = self._jobs[ticket] = Job(ticket, Answer(ask, self.tokenizer, ticket.meter))
        return job

    def cancel(self, job: Job) -> None:
        """Drop a request, queued or running; one that has ended is no error."""
        if self._jobs.pop(job.ticket, None):
            self._batch.cancel(job.ticket)
            self._requests += 1

    def step(self) -> list[tuple[Job, Chunk | DovetailError]]:
        """Run a pass for all requests. Return the chunks that came of it, and errors that ended answers.

        After a DeviceError every request is dropped, and the engine takes new ones.
        """
        try:
            advances = self._batch.step()
        except BaseException:
            self._jobs.clear()
            self._batch.clear()
            raise
        chunks = list[tuple[Job, Chunk | DovetailError]]()
        for advance in advances:
            if not (advance.step.tokens or advance.step.finish):
                continue
            job = self._jobs[advance.ticket]
            job.ticket.meter.resume()
            if error := advance.step.error:
                self.cancel(job)
                chunks.append((job, error))
                continue
            chunk = job.answer.chunk(advance.step)
            chunks.append((job, chunk))
            if chunk.finish_reason:
                self._end(job, chunk)
        return chunks

    def stats(self) -> EngineStats:
        """Return the state. Any thread may ask; the numbers may be a round old."""
        batch, (rounds, drafted, accepted) = self._batch, self._totals
        return EngineStats(
            running=len(batch.running),
            waiting=len(batch.waiting),
            slots=batch.slots,
            kv_used=min(sum(text.length for text in batch.texts()) / self._memory, 1.0),
            requests=self._requests,
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            accepted_per_position=tuple(self._accepted_per_position),
        )

    def close(self) -> None:
        """Drop all requests, and let go of the sessions and their memory."""
        self._batch.clear()
        self._jobs.clear()
        if self._drafter:
            self._drafter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _end(self, job: Job, chunk: Chunk) -> None:
        """Count an answer. A stop string may have ended it before its last token."""
        self.cancel(job)
        assert chunk.metrics
        metrics = chunk.metrics
        rounds, drafted, accepted = self._totals
        self._totals = rounds + metrics.rounds, drafted + metrics.drafted, accepted + metrics.accepted
        pairs = zip_longest(self._accepted_per_position, metrics.accepted_per_position, fillvalue=0)
        self._accepted_per_position = [total + new for total, new in pairs]
