"""One engine under load, in a process of its own: a line of JSON with prompts comes in, a line with times goes out.

    python tests/bench/load_worker.py ENGINE MODEL SLOTS

Needs nothing of Dovetail but for its own engines: peers live in an environment of theirs.
in: {"prompts": [[ids], ...], "users": N, "max_new_tokens": [M, ...]}.  N users ask in turn: as soon as one has an
answer, it asks the next prompt.  out: {"seconds": .., "answers": [{"count", "first_ms", "between_ms", "tokens"}]};
between_ms has the time before each later piece of the answer, per token of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any

Answers = list[dict[str, Any]]
Ask = Callable[[list[list[int]], int, list[int]], Answers]
SAME = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}  # as tests/bench/peer_worker.py


class Times:
    """Collects the pieces of one answer."""

    def __init__(self) -> None:
        self.begin = self.last = perf_counter()
        self.tokens: list[int] = []
        self.first_ms, self.between_ms = 0.0, list[float]()

    def add(self, tokens: list[int]) -> None:
        if not tokens:
            return
        now = perf_counter()
        took = (now - self.last) * 1e3
        if self.tokens:
            self.between_ms.append(took / len(tokens))
        else:
            self.first_ms = took
        self.last = now
        self.tokens += tokens

    def record(self) -> dict[str, Any]:
        return {
            "count": len(self.tokens), "first_ms": self.first_ms, "between_ms": self.between_ms, "tokens": self.tokens,
        }  # fmt: skip


def dovetail(model: str, slots: int, *, speculate: bool) -> Ask:
    import asyncio

    from dovetail.runtime.async_engine import AsyncEngine

    engine = AsyncEngine.from_pretrained(model, slots=slots, drafter_device="cpu")

    def ask(prompts: list[list[int]], users: int, counts: list[int]) -> Answers:
        waiting, answers = [*enumerate(prompts)][::-1], dict[int, dict[str, Any]]()

        async def user() -> None:
            while waiting:
                index, prompt = waiting.pop()
                times = Times()
                async for chunk in engine.stream(prompt, counts[index], speculate=speculate):
                    times.add([*chunk.token_ids])
                answers[index] = times.record()

        async def all_users() -> None:
            await asyncio.gather(*(user() for _ in range(users)))

        asyncio.run(all_users())
        return [answers[index] for index in range(len(prompts))]

    return ask


def genai(model: str, slots: int) -> Ask:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.max_num_seqs, scheduling.dynamic_split_fuse, scheduling.cache_size = slots, True, 2
    pipeline = genai.ContinuousBatchingPipeline(str(Path(model) / "target"), scheduling, "CPU", SAME)
    config = genai.GenerationConfig()
    config.do_sample = False
    stop = json.loads((Path(model) / "target" / "generation_config.json").read_text())["eos_token_id"]
    config.eos_token_id, *others = stop if isinstance(stop, list) else [stop]
    config.stop_token_ids = {config.eos_token_id, *others}
    numbers = iter(range(1 << 30))

    def ask(prompts: list[list[int]], users: int, counts: list[int]) -> Answers:
        waiting, running, answers = [*enumerate(prompts)][::-1], dict[int, tuple[Any, Times]](), dict[int, Any]()
        while waiting or running:
            while waiting and len(running) < users:
                index, prompt = waiting.pop()
                config.max_new_tokens = counts[index]
                tensor = ov.Tensor(np.array([prompt], np.int64))
                running[index] = pipeline.add_request(next(numbers), tensor, config), Times()
            pipeline.step()
            for index, (handle, times) in [*running.items()]:
                while handle.can_read():
                    for output in handle.read().values():
                        times.add([token for token in output.generated_ids if token not in config.stop_token_ids])
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    answers[index] = times.record()
                    del running[index]
        return [answers[index] for index in range(len(prompts))]

    return ask


def llama(model: str, slots: int) -> Ask:
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024 * slots, slots, 0
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.verbosity = -1
    server = x.Server(params)

    def ask(prompts: list[list[int]], users: int, counts: list[int]) -> Answers:
        waiting, answers = SimpleQueue[tuple[int, list[int]]](), dict[int, dict[str, Any]]()
        for each in enumerate(prompts):
            waiting.put(each)

        def user() -> None:
            while True:
                try:
                    index, prompt = waiting.get_nowait()
                except Empty:
                    return
                asked = {"prompt": prompt, "n_predict": counts[index], "temperature": 0, "cache_prompt": False}
                result = server.handle_completions(asked)
                times = result["timings"]
                tokens = result["usage"]["completion_tokens"]
                each = times["predicted_ms"] / max(times["predicted_n"], 1)
                answers[index] = {
                    "count": tokens, "first_ms": times["prompt_ms"] + each,
                    "between_ms": [each] * max(tokens - 1, 0), "tokens": [],
                }  # fmt: skip

        threads = [Thread(target=user) for _ in range(users)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[index] for index in range(len(prompts))]

    return ask


ENGINES: dict[str, Callable[[str, int], Ask]] = {
    "dovetail": lambda model, slots: dovetail(model, slots, speculate=True),
    "dovetail, no drafts": lambda model, slots: dovetail(model, slots, speculate=False),
    "openvino-genai": genai,
    "llama.cpp": llama,
}


def main() -> None:
    """Load, say so with an empty object, then answer line after line."""
    name, model, slots = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    ask = ENGINES[name](model, int(slots))
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = perf_counter()
        answers = ask(request["prompts"], request["users"], request["max_new_tokens"])
        print(json.dumps({"seconds": perf_counter() - begin, "answers": answers}), file=out, flush=True)


if __name__ == "__main__":
    main()
