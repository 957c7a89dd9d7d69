"""The OpenVINO properties of a pair's target on this machine: for inspect, doctor and tune."""

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
    """Return the properties as JSON.

    set: all properties by name. chosen: the choice of `tune`, None if `tune` made no choice. given:
    properties from --ov-config.
    """
    chosen = recall_choice(manifest, threads)
    return {
        "set": {**default_properties(), **(chosen.properties if chosen else {}), **(given or {}), **REQUIRED},
        "chosen": asdict(chosen) if chosen else None,
        "given": dict(given or {}),
    }


def properties_line(properties: Mapping[str, Any]) -> str:
    """Return the properties as one line for display."""
    named = ", ".join(f"{name}={value}" for name, value in properties["set"].items())
    chosen = properties["chosen"]
    if properties["given"]:
        return f"{named}; with --ov-config"
    if not chosen:
        return f"{named}; the defaults (dovetail-run tune looks for better ones)"
    why = (
        f"passes {chosen['speedup']:.2f}x as fast"
        if chosen["properties"]
        else "no other that keeps rows equal is surely quicker"
    )
    return f"{named}; tune chose {'them' if chosen['properties'] else 'the defaults'} on {chosen['date'][:10]}: {why}"
