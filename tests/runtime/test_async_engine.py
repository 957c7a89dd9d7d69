"""Many requests at once, as text and by asyncio: the same texts as alone, limits, and requests that leave."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.async_engine import AsyncEngine
from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError, QueueFull
from dovetail.runtime.front import Chunk, GenerationResult
from dovetail.runtime.testing.constraint import ScriptedConstraint
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer
from dovetail.runtime.tree.limits import TreeLimits

ALPHABET = "abcdefgh~"
LOGITS = MarkovLogits(len(ALPHABET), sharpness=3.0)
TREE = TreeLimits(width=8, depth=3, top_k=2)
TOKENIZER = ScriptedTokenizer(ALPHABET, eos_token_ids=(7,))


def target(**options: int) -> ScriptedTarget:
    return ScriptedTarget(LOGITS, **options)


def batch_engine(**options: Any) -> BatchEngine:
    drafter = ScriptedDrafter.copy_of(LOGITS, 0.5)
    drafter.top_k = options.pop("children", drafter.top_k)
    return BatchEngine(options.pop("target", None) or target(), drafter, TOKENIZER, tree=TREE, **options)


def prompts(count: int) -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(3)
    made = []
    for index in range(count):
        text = "".join(rng.choice(ALPHABET[:-2]) for _ in range(rng.randrange(1, 30)))
        made.append((text, {"max_new_tokens": rng.randrange(1, 50), "temperature": float(index % 2), "seed": index}))
    return made


def alone(text: str, options: dict[str, Any], **more: Any) -> tuple[str, str]:
    result = Engine(target(), None, TOKENIZER).generate(text, raw=True, speculate=False, **options, **more)
    return result.text, result.finish_reason


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_many_answers_at_once_are_what_each_is_alone(slots: int) -> None:
    async def work() -> None:
        async with AsyncEngine(batch_engine(slots=slots)) as engine:
            asked = prompts(40)
            results = await asyncio.gather(
                *(engine.generate(text, raw=True, stop="ab", **options) for text, options in asked)
            )
            for (text, options), result in zip(asked, results, strict=True):
                assert (result.text, result.finish_reason) == alone(text, options, stop="ab")
                assert result.seed == options["seed"]
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.requests, stats.slots) == (0, 0, 40, slots)
            assert stats.accepted == sum(stats.accepted_per_position) > 0 and stats.drafted > stats.accepted

    run(work())


def test_a_full_queue_refuses_at_once_and_later_takes_requests_again() -> None:
    async def work() -> None:
        async with AsyncEngine(batch_engine(slots=1, queue=2)) as engine:
            streams = [engine.stream("abc", 40, raw=True, stop=()) for _ in range(3)]
            with pytest.raises(QueueFull, match="3 requests are running or waiting already: try again later"):
                engine.stream("abc", raw=True)
            await streams[0].aclose()
            streams.append(engine.stream("abc", 3, raw=True))
            texts = ["".join([chunk.text async for chunk in stream]) for stream in streams[1:]]
            assert texts[0] == texts[1] == alone("abc", {"max_new_tokens": 40})[0]
            assert texts[2] == alone("abc", {"max_new_tokens": 3})[0]

    run(work())


@pytest.mark.parametrize("end", ["closed", "cancelled", "failed", "last chunk"])
def test_the_end_of_a_stream_wakes_the_tasks_that_wait_for_its_chunks(end: str) -> None:
    go = threading.Event()

    class Held(ScriptedTarget):
        def verify(self, *offers: Any, rows: int = 0) -> Any:
            assert go.wait(30)
            if end == "failed":
                raise DeviceError("the target failed on the CPU: open the engine again")
            return super().verify(*offers, rows=rows)

    async def work() -> None:
        async with AsyncEngine(batch_engine(target=Held(LOGITS))) as engine:
            stream = engine.stream("abc", 1, raw=True)
            waiting = [asyncio.create_task(anext(stream, None)) for _ in range(3)]
            await asyncio.sleep(0)  # all wait for a chunk now
            if end == "closed":
                await stream.aclose()
            elif end == "cancelled":
                waiting[0].cancel()
            else:
                go.set()
            try:
                async with asyncio.timeout(5):
                    first, *others = await asyncio.gather(*waiting, return_exceptions=True)
            finally:
                go.set()
            assert others == [None, None]
            kinds: dict[str, type] = {"cancelled": asyncio.CancelledError, "failed": DeviceError, "closed": type(None)}
            assert isinstance(first, kinds.get(end, Chunk))

    run(work())


def test_an_answer_that_nobody_reads_to_its_end_makes_room() -> None:
    async def work() -> None:
        async with AsyncEngine(batch_engine(slots=1, queue=0)) as engine:
            unread = engine.stream("abc", 20, raw=True)
            async with asyncio.timeout(20):
                while engine.stats().requests < 1:
                    await asyncio.sleep(0.01)
            assert (await engine.generate("abc", 5, raw=True)).text == alone("abc", {"max_new_tokens": 5})[0]
            await engine.drain()
            text = "".join([chunk.text async for chunk in unread])  # still there
            assert text == alone("abc", {"max_new_tokens": 20})[0]

    run(work())


def test_a_request_that_cannot_run_is_refused_by_the_call() -> None:
    async def work() -> None:
        async with AsyncEngine(batch_engine(target=target(max_context=20), children=4)) as engine:
            with pytest.raises(InputError, match="temperature -1"):
                engine.stream("abc", raw=True, temperature=-1.0)
            with pytest.raises(ContextOverflow, match="30 tokens leaves no room"):
                engine.stream("a" * 30, raw=True)
            with pytest.raises(InputError, match="tree top_k 5 exceeds the drafter's 4: lower it"):
                engine.stream("abc", raw=True, tree=TreeLimits(top_k=5))
            with pytest.raises(InputError, match="tree width 65 is out of range: give 64 or less"):
                engine.stream("abc", raw=True, tree=TreeLimits(width=65))
            with pytest.raises(InputError, match="empty"):
                await engine.generate("", raw=True)
            assert (await engine.generate("abc", 5, raw=True)).text == alone("abc", {"max_new_tokens": 5})[0]

    run(work())


@pytest.mark.parametrize("how", ["close", "cancel", "forget", "never read"])
def test_a_stream_that_is_left_frees_its_request(how: str) -> None:
    async def work() -> None:
        held = target()
        async with AsyncEngine(batch_engine(slots=2, target=held, stop_tokens=())) as engine:
            for _ in range(5):
                stream = engine.stream("abcabc", 3000, raw=True)
                if how != "never read":
                    assert (await anext(stream)).token_ids
                if how == "close":
                    await stream.aclose()
                    with pytest.raises(StopAsyncIteration):
                        await anext(stream)
                elif how == "cancel":
                    waiting = asyncio.ensure_future(_all(stream))
                    await asyncio.sleep(0.01)
                    waiting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                    del waiting
                del stream
                gc.collect()
            async with asyncio.timeout(20):
                while (stats := engine.stats()).running + stats.waiting:
                    await asyncio.sleep(0.01)
            assert stats.requests == 5 or how == "never read"  # the thread may not have taken those
            assert (await engine.generate("abc", 5, raw=True)).text == alone("abc", {"max_new_tokens": 5})[0]
        assert not held.texts

    run(work())


def test_streams_that_are_collected_while_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten stream in a cycle ends in the thread that collects it: here the engine's, in a cancel."""
    cancel = BatchEngine.cancel

    def collecting(engine: BatchEngine, job: Any) -> None:
        gc.collect()
        cancel(engine, job)

    monkeypatch.setattr(BatchEngine, "cancel", collecting)

    async def work() -> None:
        async with AsyncEngine(batch_engine(slots=8, stop_tokens=())) as engine:
            gc.disable()
            try:
                for _ in range(5):
                    streams: list[Any] = [engine.stream("abc", 3000, raw=True) for _ in range(6)]
                    for stream in streams:
                        stream.cycle = stream
                    await anext(streams[0])
                    await streams.pop(0).aclose()
                    del stream, streams
                    await asyncio.sleep(0.02)
            finally:
                gc.enable()
            gc.collect()
            assert (await engine.generate("abc", 5, raw=True)).token_ids

    run(work())


def test_without_an_event_loop_nothing_is_queued_and_no_place_is_lost() -> None:
    engine = AsyncEngine(batch_engine(slots=1, queue=0))
    for _ in range(2):
        with pytest.raises(InputError, match="no event loop is running"):
            engine.stream("abc", raw=True)
    assert asyncio.run(engine.generate("abc", 5, raw=True)).token_ids
    asyncio.run(engine.close())


async def _all(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


def test_draining_ends_what_runs_and_refuses_the_rest() -> None:
    async def work() -> None:
        async with AsyncEngine(batch_engine(slots=2)) as engine:
            answers = [asyncio.ensure_future(engine.generate("abc", 60, raw=True)) for _ in range(4)]
            await asyncio.sleep(0)
            await engine.drain()
            with pytest.raises(QueueFull, match="shutting down"):
                engine.stream("abc", raw=True)
            assert {(await answer).text for answer in answers} == {alone("abc", {"max_new_tokens": 60})[0]}

    run(work())


def test_closing_ends_streams_with_an_error_and_its_thread() -> None:
    async def work() -> None:
        engine = AsyncEngine(batch_engine(slots=1, stop_tokens=()))
        streams = [engine.stream("abc", 3000, raw=True) for _ in range(3)]
        assert (await anext(streams[0])).token_ids
        await engine.close()
        for stream in streams:
            with pytest.raises(DeviceError, match="the engine was closed"):
                await _all(stream)
        with pytest.raises(QueueFull):
            engine.stream("abc", raw=True)

    before = threading.active_count()
    run(work())
    assert threading.active_count() <= before + 1  # asyncio's own worker may live on


def test_a_device_that_fails_ends_the_answers_and_the_engine_goes_on() -> None:
    class Failing(ScriptedTarget):
        left = 5

        def verify(self, *offers: Any, rows: int = 0) -> Any:
            self.left -= 1
            if self.left == 0:
                raise DeviceError("the target failed on the CPU: open the engine again")
            return super().verify(*offers, rows=rows)

    async def work() -> None:
        failing = Failing(LOGITS)
        async with AsyncEngine(batch_engine(target=failing)) as engine:
            answers = await asyncio.gather(
                *(engine.generate("abc", 50, raw=True) for _ in range(3)), return_exceptions=True
            )
            assert all(isinstance(answer, DeviceError) for answer in answers)
            assert not failing.texts
            assert (await engine.generate("abc", 5, raw=True)).text == alone("abc", {"max_new_tokens": 5})[0]

    run(work())


def test_requests_from_many_threads_and_loops() -> None:
    engine, texts = AsyncEngine(batch_engine(slots=4, queue=100)), list[tuple[str, str]]()

    def ask(text: str, options: dict[str, Any]) -> None:
        result = asyncio.run(engine.generate(text, raw=True, **options))
        texts.append((result.text, alone(text, options)[0]))

    threads = [threading.Thread(target=ask, args=each) for each in prompts(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(engine.close())
    assert len(texts) == 12 and all(got == want for got, want in texts)


@pytest.mark.parametrize(("slots", "queue"), [(0, 4), (True, 4), (4, -1), (10**6, 1)])
def test_sizes_out_of_range_are_refused(slots: int, queue: int) -> None:
    with pytest.raises(InputError, match=r"(slots|queue) "):
        batch_engine(slots=slots, queue=queue)


def test_a_grammar_that_fails_ends_its_own_answer_alone() -> None:
    def rule(text: tuple[int, ...]) -> list[int]:
        if len(text) == 4:
            raise InputError("the grammar fails on this text (too many items): simplify it")
        return [0, 1]

    async def work() -> None:
        async with AsyncEngine(batch_engine()) as engine:
            asked = [engine.generate("abc", 30, raw=True), engine.generate("ab", 9, raw=True, temperature=1.0, seed=1)]
            failing = engine.generate("abc", 30, raw=True, constraint=ScriptedConstraint(rule))
            one, error, other = await asyncio.gather(asked[0], failing, asked[1], return_exceptions=True)
            assert isinstance(error, InputError) and "too many items" in str(error)
            assert isinstance(one, GenerationResult) and isinstance(other, GenerationResult)
            assert one.text == alone("abc", {"max_new_tokens": 30})[0]
            assert other.text == alone("ab", {"max_new_tokens": 9, "temperature": 1.0, "seed": 1})[0]
            assert engine.stats().requests == 3 and not engine.stats().running

    run(work())


def test_logits_that_are_no_numbers_end_their_own_answer_alone() -> None:
    class Odd(MarkovLogits):
        def __call__(self, prefix: tuple[int, ...]) -> Any:
            return np.full(len(ALPHABET), np.nan, np.float32) if prefix[0] == 6 else super().__call__(prefix)

    async def work() -> None:
        odd = ScriptedTarget(Odd(len(ALPHABET), sharpness=3.0))
        async with AsyncEngine(batch_engine(target=odd)) as engine:
            texts = ["abc", "gab", "bca"]
            answers = await asyncio.gather(
                *(engine.generate(text, 40, raw=True) for text in texts), return_exceptions=True
            )
            assert isinstance(answers[1], DeviceError) and "best logit is nan" in str(answers[1])
            for index in (0, 2):
                answer = answers[index]
                assert not isinstance(answer, BaseException)
                assert answer.text == alone(texts[index], {"max_new_tokens": 40})[0]

    run(work())
