"""The metrics of a server: what a scrape says, and that docs and dashboard name what exists."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dovetail.runtime.front import Chunk
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.serve.metrics import ServerMetrics

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"
DASHBOARD: dict[str, Any] = json.loads((REFERENCE / "grafana.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Totals:
    running: int = 2
    waiting: int = 3
    slots: int = 8
    kv_used: float = 0.25
    rounds: int = 10
    drafted: int = 60
    accepted: int = 25
    accepted_per_position: tuple[int, ...] = (9, 8, 8)


@dataclass
class Setup:
    """Metrics on a clock that the test sets."""

    now: float = 100.0
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics("tiny", lambda: self.totals, clock=lambda: self.now)

    def samples(self) -> dict[tuple[str, ...], float]:
        """What a scrape says: (name, values of labels other than the model's) -> value."""
        text = self.metrics.exposition().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "tiny"
                found[(sample.name, *labels.values())] = sample.value
        return found


def chunk(count: int, finish: Any = None, **figures: Any) -> Chunk:
    metrics = None
    if finish:
        metrics = replace(Meter().metrics(), **figures)
    return Chunk("x" * count, (1,) * count, None, finish, metrics)


def test_a_scrape_asks_the_engine() -> None:
    setup = Setup()
    expected = {
        ("dovetail:num_requests_running",): 2,
        ("dovetail:num_requests_waiting",): 3,
        ("dovetail:slots",): 8,
        ("dovetail:kv_cache_usage_perc",): 0.25,
        ("dovetail:spec_decode_num_drafts_total",): 10,
        ("dovetail:spec_decode_num_draft_tokens_total",): 60,
        ("dovetail:spec_decode_num_accepted_tokens_total",): 25,
        ("dovetail:spec_decode_num_accepted_tokens_per_pos_total", "0"): 9,
        ("dovetail:spec_decode_num_accepted_tokens_per_pos_total", "2"): 8,
    }
    assert expected.items() <= setup.samples().items()
    setup.totals = replace(setup.totals, running=0, accepted_per_position=())
    assert setup.samples()["dovetail:num_requests_running",] == 0


def test_a_request_is_counted_as_it_goes_and_measured_at_its_end() -> None:
    setup = Setup()
    with setup.metrics.request(64) as request:
        setup.now += 2.0
        request.add(chunk(1))
        setup.now += 0.3
        request.add(chunk(3))
        assert setup.samples()["dovetail:generation_tokens_total",] == 4
        setup.now += 0.5
        figures = {
            "prompt_tokens": 7,
            "cached_tokens": 4,
            "new_tokens": 4,
            "queue_ms": 1500.0,
            "prefill_ms": 400.0,
        }
        request.add(chunk(0, "stop", **figures))
    found = setup.samples()
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 2.0),
        ("inter_token_latency_seconds", 3, 0.3),
        ("e2e_request_latency_seconds", 1, 2.8),
        ("request_queue_time_seconds", 1, 1.5),
        ("request_prefill_time_seconds", 1, 0.4),
        ("request_decode_time_seconds", 1, 0.8),
        ("request_prompt_tokens", 1, 7),
        ("request_generation_tokens", 1, 4),
        ("request_params_max_tokens", 1, 64),
    ):
        assert found[f"dovetail:{name}_count",] == count
        assert found[f"dovetail:{name}_sum",] == pytest.approx(total)
    assert found["dovetail:inter_token_latency_seconds_bucket", "0.1"] == 3
    assert found["dovetail:prompt_tokens_total",] == found["dovetail:prefix_cache_queries_total",] == 7
    assert found["dovetail:prefix_cache_hits_total",] == 4
    assert reasons(setup) == {"stop": 1}


def reasons(setup: Setup) -> dict[str, float]:
    return {
        key[1]: value for key, value in setup.samples().items() if key[0] == "dovetail:request_success_total" and value
    }


def test_an_answer_without_a_token_is_a_request_too() -> None:
    setup = Setup()
    with setup.metrics.request(1) as request:
        request.add(chunk(0, "stop"))
    assert reasons(setup) == {"stop": 1}
    assert setup.samples()["dovetail:inter_token_latency_seconds_count",] == 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(None, "abort"), (GeneratorExit, "abort"), (asyncio.CancelledError, "abort"), (ValueError, "error")],
)
def test_a_request_that_ends_early_is_counted_once(failure: type[BaseException] | None, reason: str) -> None:
    setup = Setup()

    def leave() -> None:
        with setup.metrics.request(8) as request:
            request.add(chunk(1))
            if failure:
                raise failure

    if failure:
        with pytest.raises(failure):
            leave()
    else:
        leave()
    assert reasons(setup) == {reason: 1}
    assert setup.samples()["dovetail:e2e_request_latency_seconds_count",] == 0


def test_servers_do_not_share_their_metrics() -> None:
    one, other = Setup(), Setup()
    one.metrics.reject()
    assert one.samples()["dovetail:admission_rejections_total",] == 1
    assert other.samples()["dovetail:admission_rejections_total",] == 0


# --- docs and dashboard


def exposed() -> set[str]:
    """Names of all samples that a server exposes."""
    return {key[0] for key in Setup().samples() if not key[0].endswith("_created")}


def expressions(panel: Any) -> Iterator[str]:
    """Every PromQL expression in a part of the dashboard."""
    if isinstance(panel, dict):
        for key, value in panel.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(panel, list):
        for each in panel:
            yield from expressions(each)


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    found = list(expressions(DASHBOARD))
    named = {name for text in found for name in re.findall(r"dovetail:\w+", text)}
    assert named and named <= exposed()
    labels = {label for text in found for label in re.findall(r"(\w+)\s*=~?\s*\"", text)}
    grouped = {
        word.strip() for text in found for group in re.findall(r"by \(([^)]*)\)", text) for word in group.split(",")
    }
    assert labels | grouped <= {"model_name", "le", "position", "finished_reason"}
    for text in found:
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")


def test_the_panels_of_the_dashboard_are_told_apart_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])
        }  # fmt: skip
        assert not own & cells and place["x"] + place["w"] <= 24
        cells |= own
        assert panel["title"] and (panel["type"] == "row" or panel["description"])
        assert panel.get("datasource", {}).get("uid", "${datasource}") == "${datasource}"


def test_the_reference_lists_every_metric_of_a_server() -> None:
    page = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(dovetail:\w+)`", page, re.MULTILINE))
    registered = {family.name for family in Setup().metrics.registry.collect()}
    assert listed == registered


def test_the_reference_lists_every_figure_of_an_answer() -> None:
    page = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in GenerationMetrics.__dataclass_fields__)
