"""Many answers at once for asyncio programs: a thread owns the engine and runs its passes."""

from __future__ import annotations

import asyncio
import logging
from collections import abc, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Self, Unpack
from weakref import ref

from dovetail.runtime.batch_engine import BatchEngine, EngineStats, Job
from dovetail.runtime.errors import DeviceError, DovetailError, InputError, QueueFull
from dovetail.runtime.front import Ask, Chunk, GenerationResult, RequestOptions
from dovetail.runtime.sampling.constraint import Constraint
from dovetail.runtime.text.encoding import Prompt, TextTokenizer

log = logging.getLogger(__name__)


class AnswerStream(AsyncIterator[Chunk]):
    """The chunks of one answer. It ends with the last chunk, with `aclose`, or when it is forgotten."""

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop, leave: Callable[[AnswerStream], None]) -> None:
        self.ask, self.job = ask, None  # type: tuple[Ask, Job | None]
        self._loop, self._leave = loop, leave
        self._chunks: asyncio.Queue[Chunk | DovetailError | None] = asyncio.Queue()  # None: ended
        self._ended = False
        self.has_place = True  # counts among the requests that run or wait

    def put(self, item: Chunk | DovetailError | None) -> None:
        """Hand a chunk over from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, item)

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._chunks.get()
        except BaseException:  # the task is cancelled
            self.end()
            raise
        if item is None:
            self._chunks.put_nowait(None)  # for other tasks that wait
            raise StopAsyncIteration
        if isinstance(item, DovetailError):
            self.end()
            raise item
        if item.finish_reason:
            self.end()
        return item

    async def aclose(self) -> None:
        """End the answer, also for a task that waits for a chunk; its request is freed within a round."""
        self.end()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._leave(self)
            self.put(None)  # wakes other tasks that wait

    def __del__(self) -> None:
        self.end()


class AsyncEngine:
    """Answers many requests at once. Every method may be called from any thread or event loop."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine = engine
        self._changed = Condition()  # guards what follows
        self._coming: deque[AnswerStream] = deque()
        self._leaving: deque[Job] = deque()
        self._streams: dict[Job, ref[AnswerStream]] = {}  # a forgotten stream ends by itself
        self._open = 0  # streams between `stream` and their end
        self._draining = self._closing = False
        self._thread = Thread(target=self._work, name="dovetail-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Open a pair folder. Blocks while the pair loads. options: of BatchEngine.from_pretrained."""
        return cls(BatchEngine.from_pretrained(path, **options))

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._engine.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._engine.max_context

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self._engine.stop_tokens

    @property
    def places(self) -> int:
        """Requests that may run or wait at the same time."""
        return self._engine.slots + self._engine.queue

    @property
    def target_device(self) -> str:
        return self._engine.target_device

    @property
    def drafter_device(self) -> str | None:
        """Where the drafter runs now."""
        return self._engine.drafter_device

    @property
    def drafter_note(self) -> str | None:
        """Why the drafter runs there, if it says so."""
        return self._engine.drafter_note

    @property
    def closed(self) -> bool:
        """Whether the engine takes no request ever again: it was closed, or its thread failed."""
        return self._closing

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        **options: Unpack[RequestOptions],
    ) -> AnswerStream:
        """Return the answer to `prompt`, chunk by chunk. Arguments: see Engine.stream.

        The request is checked and queued at once, in a running event loop. Closing the stream, or
        cancelling the task that waits for it, frees the request within a round. Raises InputError,
        ContextOverflow, QueueFull from the call itself, DeviceError from the iteration.
        """
        return self.submit(self._engine.ask(prompt, max_new_tokens, **options))

    def ask(self, prompt: Prompt, max_new_tokens: int = 256, **options: Unpack[RequestOptions]) -> Ask:
        """Return a checked request for `submit`, where encoding a long prompt must not hold the loop up.

        Arguments and errors: see `stream`.
        """
        return self._engine.ask(prompt, max_new_tokens, **options)

    def submit(self, ask: Ask) -> AnswerStream:
        """Queue a request in a running event loop, and return its chunks. Raises QueueFull, InputError."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InputError("no event loop is running: call this from a coroutine, or use Engine") from None
        with self._changed:
            if self._closing or self._draining:
                raise QueueFull("the engine is shutting down: ask another")
            if self._open >= self.places:
                raise QueueFull(f"{self._open} requests are running or waiting already: try again later")
            self._open += 1
            stream = AnswerStream(ask, loop, self._leave)
            self._coming.append(stream)
            self._changed.notify_all()
        return stream

    async def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """Return the whole answer to `prompt`. Arguments and errors: see `stream`."""
        chunks = self.stream(prompt, max_new_tokens, **options)
        return GenerationResult.of([chunk async for chunk in chunks])

    def constraint(
        self,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Constraint:
        """See Engine.constraint."""
        return self._engine.constraint(json_schema=json_schema, regex=regex, grammar=grammar)

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> int:
        """See Engine.count_tokens."""
        return self._engine.count_tokens(
            prompt, raw=raw, template_options=template_options, parse_special=parse_special
        )

    def stats(self) -> EngineStats:
        """Return the engine's state; the numbers may be a round old."""
        return self._engine.stats()

    async def drain(self) -> None:
        """Refuse new requests, and wait until the others have ended."""
        with self._changed:
            self._draining = True
        await asyncio.to_thread(self._wait_for_end)

    async def close(self) -> None:
        """End all streams with an error, stop the thread, and let go of the sessions."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    def _leave(self, stream: AnswerStream) -> None:
        with self._changed:
            self._free(stream)
            if stream.job:
                self._leaving.append(stream.job)
            elif stream in self._coming:
                self._coming.remove(stream)
            self._changed.notify_all()

    def _free(self, stream: AnswerStream) -> None:
        """Free the place of a stream, once. The engine calls this too: a client may never read the end."""
        self._open -= stream.has_place
        stream.has_place = False

    # --- the thread

    def _wait_for_end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0 or self._closing)

    def _work(self) -> None:
        try:
            while self._take_turns():
                self._step()
        finally:
            with self._changed:
                self._closing = True
                coming = [*self._coming]
                self._coming.clear()
            self._end_all(DeviceError("the engine was closed: open another"), coming)
            self._engine.close()

    def _take_turns(self) -> bool:
        """Let requests join and leave; wait while there are none. Return whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._coming or self._leaving or not self._engine.idle)
            while self._leaving:  # may grow meanwhile: a forgotten stream leaves in whichever thread collects it
                job = self._leaving.popleft()
                if self._streams.pop(job, None):
                    self._engine.cancel(job)
            while self._coming:
                stream = self._coming.popleft()
                stream.job = self._engine.submit(stream.ask)
                self._streams[stream.job] = ref(stream)
        return not self._closing

    def _step(self) -> None:
        try:
            chunks = self._engine.step()
        except DovetailError as error:
            log.error("all running requests end: %s", error)
            self._end_all(error)
            return
        for job, chunk in chunks:
            ended = isinstance(chunk, DovetailError) or chunk.finish_reason
            found = self._streams.pop(job) if ended else self._streams[job]
            if stream := found():
                if ended:
                    self._end(stream)
                stream.put(chunk)

    def _end(self, stream: AnswerStream) -> None:
        with self._changed:
            self._free(stream)
            self._changed.notify_all()

    def _end_all(self, error: DovetailError, coming: abc.Sequence[AnswerStream] = ()) -> None:
        """End the answers that have begun, and those of `coming`."""
        with self._changed:
            streams = [*coming, *(found() for found in [*self._streams.values()])]
            self._streams.clear()
        for stream in streams:
            if stream:
                self._end(stream)
                stream.put(error)
