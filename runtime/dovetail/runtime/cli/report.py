"""What is said about a generation: the statistics line for a person, the JSON object for a program."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..engine import GenerationResult
from ..metrics import GenerationMetrics


def statistics_line(metrics: GenerationMetrics, target_device: str, drafter_device: str | None) -> str:
    """One line: tokens, speed, what speculation brought, where the time went, on which devices."""
    times = (
        f"prefill {metrics.prefill_ms:.0f} ms, draft {metrics.draft_ms:.0f} ms, "
        f"verify {metrics.verify_ms:.0f} ms, other {metrics.other_ms:.0f} ms"
    )
    return (
        f"[{metrics.new_tokens} tokens, {metrics.tokens_per_second:.1f} tok/s, "
        f"acceptance length {metrics.acceptance_length:.2f} over {metrics.rounds} rounds | {times} | "
        f"target {target_device}, drafter {drafter_device or 'off'}]"
    )


def result_json(
    result: GenerationResult, target_device: str, drafter_device: str | None, drafter_note: str | None
) -> dict[str, Any]:
    """`generate --json`: the answer, then the metrics (times in ms, to the microsecond), then the devices.

    drafter_device is None for plain decoding; drafter_note says why it runs there.
    """
    metrics = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(result.metrics).items()
    }
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        **metrics,
        "target_device": target_device,
        "drafter_device": drafter_device,
        "drafter_note": drafter_note,
    }
