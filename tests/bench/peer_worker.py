"""One engine in a process of its own: a line of JSON with a prompt comes in, a line with its answer's times goes out.

    python tests/bench/peer_worker.py ENGINE MODEL [DRAFT]

DRAFT is the small model of engines that draft with one.
Needs nothing of Dovetail but for its own engines: peers live in an environment of theirs.
in: {"ids": [...], "max_new_tokens": N}.  out: {"count": .., "first_ms": .., "later_ms": .., "rss_mb": ..} and "tokens"
or "text"; first_ms is the time to the first token, later_ms that from there to the last.  "rounds", where an engine
tells it: passes of the target after the first token.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

Answer = dict[str, Any]
Ask = Callable[[list[int], int], Answer]
# Activations in a group of the quantised matrices, if the environment says a number: 0 leaves them as they are.
GROUPS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": size} if (size := os.environ.get("PEER_GROUP_SIZE")) else {}
CONTEXT = int(os.environ.get("PEER_CONTEXT", "4096"))  # tokens that llama.cpp has room for
# What Dovetail gives its target on an x86 CPU, in place of OpenVINO's defaults.
SAME = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64", **GROUPS}


def dovetail(model: str, *, speculate: bool, exact: bool = True, draft: str | None = None, chain: int = 0) -> Ask:
    """Dovetail; `chain`: draft this many tokens in every round, without repeated text, trees and schedule."""
    from dovetail.runtime.engine import Engine
    from dovetail.runtime.loop.generate import decode
    from dovetail.runtime.loop.metrics import Meter
    from dovetail.runtime.loop.sequence import Request
    from dovetail.runtime.tree.limits import TreeLimits

    engine = Engine.from_pretrained(
        model, exact=exact, draft_model=draft, drafter_device="cpu" if chain else "auto", ov_config=GROUPS
    )

    def ask(ids: list[int], count: int) -> Answer:
        engine.reset()
        limits, scheduler = (engine.tree, engine.scheduler) if speculate else (None, None)
        if chain:
            limits, scheduler = TreeLimits(width=chain + 1, depth=chain, top_k=1, lookup=0), None  # and the root
        request = Request(tuple(ids), count, stop_tokens=engine.stop_tokens, limits=limits, scheduler=scheduler)
        sequence, meter, tokens = engine._open_sequence(), Meter(), list[int]()
        for step in decode(sequence, request, meter):
            tokens += step.tokens
        metrics = meter.metrics()
        times = {"first_ms": metrics.time_to_first_token_ms, "later_ms": metrics.decode_ms}
        return {"count": len(tokens), "tokens": tokens, "rounds": metrics.rounds, **times}

    return ask


def genai(
    model: str, *, lookup: int = 0, properties: dict[str, str] | None = None, draft: str | None = None, tokens: int = 5
) -> Ask:
    """openvino-genai on the same IR; `lookup`: tokens of prompt lookup, 0 for none; `tokens`: of a draft model."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.enable_prefix_caching = False
    options = {"scheduler_config": scheduling, **({"prompt_lookup": True} if lookup else {}), **(properties or {})}
    if draft:
        folder = Path(draft) / "target" if (Path(draft) / "target").is_dir() else Path(draft)
        options["draft_model"] = genai.draft_model(str(folder), "CPU", **(properties or {}))
    pipeline = genai.LLMPipeline(str(Path(model) / "target"), "CPU", **options)
    config = genai.GenerationConfig()
    config.do_sample = False
    stop = json.loads((Path(model) / "target" / "generation_config.json").read_text())["eos_token_id"]
    config.eos_token_id, *others = stop if isinstance(stop, list) else [stop]
    config.stop_token_ids = {config.eos_token_id, *others}
    if lookup:
        config.num_assistant_tokens, config.max_ngram_size = lookup, 3
    if draft:
        config.num_assistant_tokens = tokens

    def ask(ids: list[int], count: int) -> Answer:
        config.max_new_tokens = count
        begin = perf_counter()
        result = pipeline.generate(ov.Tensor(np.array([ids], np.int64)), config)
        took = (perf_counter() - begin) * 1e3
        first = result.perf_metrics.get_ttft().mean
        ids_out = [int(token) for token in result.tokens[0] if token not in config.stop_token_ids]
        answer = {"count": len(ids_out), "tokens": ids_out, "first_ms": first, "later_ms": took - first}
        if more := result.extended_perf_metrics:  # of pipelines with a draft model
            answer["rounds"] = len(more.main_model_metrics.raw_metrics.m_batch_sizes) - 1  # without the prompt's pass
        return answer

    return ask


def block_size(draft: str) -> int:
    """Tokens of a DFlash drafter's block, the known token included."""
    return int(json.loads((Path(draft) / "target" / "config.json").read_text())["block_size"])


def llama(model: str, *, kind: str, sizes: tuple[int, int] | None = None, draft: str | None = None) -> Ask:
    """llama.cpp on a GGUF of the same weights.

    kind: its speculation, NONE for plain.  sizes: tokens to match and to draft, None for its own.  draft: GGUF of a
    small model.
    """
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.speculative.types = [getattr(x.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    if draft:
        params.speculative.draft.mparams.path = draft
        params.speculative.draft.cpuparams.n_threads = params.cpuparams.n_threads
    if sizes:
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = sizes
    params.verbosity = -1
    server = x.Server(params)

    def ask(ids: list[int], count: int) -> Answer:
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False}
        result = server.handle_completions(asked)
        times = result["timings"]
        each = times["predicted_ms"] / max(times["predicted_n"], 1)  # the first token is counted with the others
        return {
            "count": result["usage"]["completion_tokens"],
            "text": result["choices"][0]["text"],
            "first_ms": times["prompt_ms"] + each,
            "later_ms": times["predicted_ms"] - each,
        }

    return ask


ENGINES: dict[str, Callable[[str], Ask]] = {
    "dovetail, plain": lambda model: dovetail(model, speculate=False),
    "dovetail": lambda model: dovetail(model, speculate=True),
    "dovetail, plain, not exact": lambda model: dovetail(model, speculate=False, exact=False),
    "dovetail, not exact": lambda model: dovetail(model, speculate=True, exact=False),
    "openvino-genai, plain": lambda model: genai(model, lookup=0),
    "openvino-genai, prompt lookup 5": lambda model: genai(model, lookup=5),
    "openvino-genai, prompt lookup 10": lambda model: genai(model, lookup=10),
    "openvino-genai, plain, same properties": lambda model: genai(model, lookup=0, properties=SAME),
    "openvino-genai, prompt lookup 3, same properties": lambda model: genai(model, lookup=3, properties=SAME),
    "openvino-genai, prompt lookup 5, same properties": lambda model: genai(model, lookup=5, properties=SAME),
    "openvino-genai, prompt lookup 10, same properties": lambda model: genai(model, lookup=10, properties=SAME),
    "llama.cpp, plain": lambda model: llama(model, kind="NONE"),
    "llama.cpp, ngram-simple": lambda model: llama(model, kind="NGRAM_SIMPLE"),
    "llama.cpp, ngram-simple 3/10": lambda model: llama(model, kind="NGRAM_SIMPLE", sizes=(3, 10)),
    "llama.cpp, ngram-mod": lambda model: llama(model, kind="NGRAM_MOD"),
    "llama.cpp, ngram-map-k": lambda model: llama(model, kind="NGRAM_MAP_K"),
}


# Each with a small model of the same vocabulary as the drafter.
WITH_DRAFT: dict[str, Callable[[str, str], Ask]] = {
    "dovetail, draft model": lambda model, draft: dovetail(model, speculate=True, draft=draft),
    "dovetail, EAGLE-3 plain": lambda model, draft: dovetail(model, speculate=False),
    "dovetail, EAGLE-3 chain 3": lambda model, draft: dovetail(model, speculate=True, chain=3),
    "dovetail, EAGLE-3 chain 5": lambda model, draft: dovetail(model, speculate=True, chain=5),
    "openvino-genai, EAGLE-3 chain 3": lambda model, draft: genai(model, properties=SAME, draft=draft, tokens=3),
    "openvino-genai, EAGLE-3 chain 5": lambda model, draft: genai(model, properties=SAME, draft=draft, tokens=5),
    "openvino-genai, draft model 3, same properties": lambda model, draft: genai(
        model, properties=SAME, draft=draft, tokens=3
    ),
    "openvino-genai, draft model 5, same properties": lambda model, draft: genai(
        model, properties=SAME, draft=draft, tokens=5
    ),
    "openvino-genai, DFlash": lambda model, draft: genai(
        model, properties=SAME, draft=draft, tokens=block_size(draft) - 1
    ),
    "llama.cpp, draft model": lambda model, draft: llama(model, kind="DRAFT_SIMPLE", draft=draft),
}


def main() -> None:
    """Load, say so with an empty object, then answer line after line."""
    name, model, *draft = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    ask = WITH_DRAFT[name](model, *draft) if name in WITH_DRAFT else ENGINES[name](model)
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = ask(request["ids"], request["max_new_tokens"])
        status = Path("/proc/self/status").read_text()
        peak = next(row.split()[1] for row in status.splitlines() if row.startswith("VmHWM"))
        print(json.dumps(answer | {"rss_mb": int(peak) // 1024}), file=out, flush=True)


if __name__ == "__main__":
    main()
