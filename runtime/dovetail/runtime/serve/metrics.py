"""Metrics of a server for Prometheus, with vLLM's names where vLLM has the metric.

docs/reference/metrics.md lists them, docs/reference/grafana.json draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Protocol, Self

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from dovetail.runtime.front import Chunk

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# The bounds are those of vLLM.
_TO_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))
_REASONS = ("stop", "length", "abort", "error")


class Stats(Protocol):
    """What an engine tells of its work: now, and in total since it was opened."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def kv_used(self) -> float: ...
    @property
    def rounds(self) -> int: ...
    @property
    def drafted(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def accepted_per_position(self) -> Sequence[int]: ...


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model: str, stats: Callable[[], Stats], clock: Callable[[], float] = perf_counter) -> None:
        """model: label of every metric. stats: is called for every scrape. clock: in seconds."""
        self.registry, self.clock = CollectorRegistry(), clock
        self.registry.register(_EngineCollector(model, stats))

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"dovetail:{name}", meaning, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"dovetail:{name}"
            return Histogram(name, meaning, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cache_queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the KV cache.")
        self.cache_hits = counter("prefix_cache_hits", "Tokens of prompts whose keys and values were still there.")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.rejections = counter("admission_rejections", "Requests refused because the queue was full.")
        success = Counter(
            "dovetail:request_success", "Requests that ended, by reason.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self.ended = {reason: success.labels(model, reason) for reason in _REASONS}
        self.to_first = histogram("time_to_first_token_seconds", "From the request to its first token.", _TO_FIRST)
        self.between = histogram("inter_token_latency_seconds", "Time of a token after the first.", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to its end.", _WHOLE)
        self.queued = histogram("request_queue_time_seconds", "Time that a request waited for a slot.", _WHOLE)
        self.prefill = histogram("request_prefill_time_seconds", "Time that reading the prompt took.", _WHOLE)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_size = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.asked_size = histogram("request_params_max_tokens", "Tokens that an answer may have.", _TOKENS)

    def request(self, max_tokens: int) -> RequestMetrics:
        """Return the record of a request that begins now. Use it as a context manager."""
        return RequestMetrics(self, max_tokens)

    def reject(self) -> None:
        """Count a request that was refused because the queue was full."""
        self.rejections.inc()

    def exposition(self) -> bytes:
        """Return the body of a scrape, of type CONTENT_TYPE.

        Every scraper takes this format. The library's OpenMetrics may have `_` for the `:` in names.
        """
        return generate_latest(self.registry)


class RequestMetrics:
    """Records one request. Leaving it before the last chunk counts the request as aborted or failed."""

    def __init__(self, server: ServerMetrics, max_tokens: int) -> None:
        self._server, self._max_tokens = server, max_tokens
        self._begin = self._last = server.clock()
        self._to_first: float | None = None
        self._ended = False

    def add(self, chunk: Chunk) -> None:
        """Count a chunk of the answer."""
        server, now, count = self._server, self._server.clock(), len(chunk.token_ids)
        server.generation_tokens.inc(count)
        if self._to_first is None:
            self._to_first = now - self._begin
            server.to_first.observe(self._to_first)
            self._last, count = now, count - 1
        for _ in range(count):  # a round's tokens share its time
            server.between.observe((now - self._last) / count)
        if count > 0:
            self._last = now
        if chunk.finish_reason and chunk.metrics:
            self._end(chunk, now)

    def _end(self, chunk: Chunk, now: float) -> None:
        server, metrics = self._server, chunk.metrics
        assert metrics and chunk.finish_reason and self._to_first is not None
        server.prompt_tokens.inc(metrics.prompt_tokens)
        server.cache_queries.inc(metrics.prompt_tokens)
        server.cache_hits.inc(metrics.cached_tokens)
        server.whole.observe(now - self._begin)
        server.queued.observe(metrics.queue_ms / 1e3)
        server.prefill.observe(metrics.prefill_ms / 1e3)
        server.decode.observe(now - self._begin - self._to_first)
        server.prompt_size.observe(metrics.prompt_tokens)
        server.answer_size.observe(metrics.new_tokens)
        server.asked_size.observe(self._max_tokens)
        self._close(chunk.finish_reason)

    def _close(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._server.ended[reason].inc()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._close("error" if kind and issubclass(kind, Exception) else "abort")


class _EngineCollector(Collector):
    """Asks the engine at every scrape."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("num_requests_running", "Requests that are being answered.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a slot.", stats.waiting)
        yield self._gauge("slots", "Requests that can be answered at once.", stats.slots)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", stats.kv_used)
        yield self._counter("spec_decode_num_drafts", "Rounds.", stats.rounds)
        yield self._counter("spec_decode_num_draft_tokens", "Nodes of draft trees below the root.", stats.drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", stats.accepted)
        positions = CounterMetricFamily(
            "dovetail:spec_decode_num_accepted_tokens_per_pos",
            "Rounds that accepted a drafted token at this position of a path.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(stats.accepted_per_position):
            positions.add_metric([self._model, str(position)], count)
        yield positions

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"dovetail:{name}", meaning, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(f"dovetail:{name}", meaning, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
