"""Which properties of OpenVINO a pair's target has on this machine, and why: for inspect, doctor and tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.target.paged import REQUIRED, default_properties
from dovetail.runtime.tune.cost_cache import recall_choice


def target_properties(
    manifest: Manifest, threads: int | None = None, given: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As JSON.  set: by name.  chosen: what `tune` chose, None if it was never asked.  given: by --ov-config."""
    chosen = recall_choice(manifest, threads)
    return {
        "set": {**default_properties(), **(chosen.properties if chosen else {}), **(given or {}), **REQUIRED},
        "chosen": asdict(chosen) if chosen else None,
        "given": dict(given or {}),
    }


def properties_line(properties: Mapping[str, Any]) -> str:
    """For a person."""
    named = ", ".join(f"{name}={value}" for name, value in properties["set"].items())
    chosen = properties["chosen"]
    if properties["given"]:
        return f"{named}; with --ov-config"
    if not chosen:
        return f"{named}; the defaults (dovetail-run tune looks for better ones)"
    why = (
        f"passes {chosen['speedup']:.2f}x as fast"
        if chosen["properties"]
        else "none is surely quicker that keeps rows equal"
    )
    return f"{named}; tune chose {'them' if chosen['properties'] else 'the defaults'} on {chosen['date'][:10]}: {why}"
