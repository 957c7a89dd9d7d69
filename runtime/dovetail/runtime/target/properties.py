"""Properties of OpenVINO's CPU plugin for the target: defaults, what a user may give, and what trees depend on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dovetail.runtime.errors import InputError
from dovetail.runtime.system import machine

PROPERTIES = {"PERFORMANCE_HINT": "LATENCY"}
KV_PRECISION = "KV_CACHE_PRECISION"
# By default OpenVINO quantises keys of 8 bits over a whole block. A key could then not be moved, and a
# row's result would depend on its neighbours.
_KV_PRECISIONS: Mapping[str, dict[str, str]] = {"f16": {}, "u8": {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"}}
_FIXED = (
    "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION", "KEY_CACHE_QUANT_MODE", "VALUE_CACHE_QUANT_MODE",
    "ENABLE_SAGE_ATTN",
)  # fmt: skip
_GROUPS = ("KEY_CACHE_GROUP_SIZE", "VALUE_CACHE_GROUP_SIZE")
_SIZE = re.compile(r"[0-9]{1,5}")  # OpenVINO takes -1 for 2**64 - 1, and gives KV rows of no size
_GROUP_REMEDY = "give a number that divides the head size, such as 16, or 0 for a whole head"
# With INT8 weights bfloat16 only adds conversions. Passes in float32 are quicker and more exact.
# The exactness pays for activations quantised in groups of 64 instead of OpenVINO's 32
# (docs/results/passes.md; other weights were not measured).
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}


def default_properties(instruction_sets: Collection[str] | None = None) -> dict[str, str]:
    """Return OpenVINO's default properties for the target.

    instruction_sets: of the CPU, by default this machine's. With AVX2 activations are float32, also
    on CPUs with bfloat16 units (AMX). In bfloat16 a row's logits change with the number of rows in
    its pass, and passes of a tree's size take longer. On other CPUs OpenVINO chooses precision and
    groups.
    """
    have = machine.cpu().instruction_sets if instruction_sets is None else instruction_sets
    return {**PROPERTIES, **(FLOAT32 if "avx2" in have else {})}


def kv_properties(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the properties of the KV cache: 16 bits, or 8 bits where `given` asks for them. Raises InputError."""
    precision = given.get(KV_PRECISION, "f16")
    if precision not in _KV_PRECISIONS:
        raise InputError(f"{KV_PRECISION}={precision} is not supported: give {' or '.join(_KV_PRECISIONS)}")
    if fixed := [name for name in _FIXED if name in given]:
        raise InputError(
            f"{fixed[0]}={given[fixed[0]]} cannot be given, because trees need keys and values stored as Dovetail "
            f"asks: leave it out; {KV_PRECISION}=u8 alone gives 8 bits"
        )
    if precision != "u8" and (groups := [name for name in _GROUPS if name in given]):
        raise InputError(
            f"{groups[0]}={given[groups[0]]} is for keys and values of 8 bits: give {KV_PRECISION}=u8 too, or leave "
            f"{groups[0]} out"
        )
    for name in _GROUPS:
        if name in given and not _SIZE.fullmatch(str(given[name])):
            raise InputError(f"{name}={given[name]!s:.40} is no group size: {_GROUP_REMEDY}")
    return {KV_PRECISION: precision, **_KV_PRECISIONS[precision]}


def parse_properties(option: str, given: Sequence[str]) -> dict[str, str]:
    """Return the properties of texts such as KV_CACHE_PRECISION=u8, which `option` gave. Raises InputError."""
    for one in given:
        if not all(one.partition("=")) or not one.isprintable():
            raise InputError(f"{option} {one!r} is no property: give NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


def remedy(reason: str, given: Mapping[str, Any]) -> str:
    """Return what to do, as the end of a message, if OpenVINO refused one of the `given` properties."""
    if "group_size" in reason and (groups := [name for name in _GROUPS if name in given]):
        return f": correct {' and '.join(groups)}: {_GROUP_REMEDY}"
    refused = [name for name in given if name in reason]
    return f": correct {refused[0]} or leave it out" if refused else ""
