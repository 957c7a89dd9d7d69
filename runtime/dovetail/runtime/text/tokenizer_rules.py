"""Check the rules of a tokenizer.json, which come with a checkpoint."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from typing import Any

_MAX_GROWTH = 2**12  # characters that the rules may make of one character
# A rule that needs a check, or an ASCII letter written as a number, which may hide the rule's name.
# Most files hold neither, and parsing a large vocabulary takes 0.1 s.
_CHECKED = re.compile(r'"type"\s*:\s*"(Replace|Precompiled)"|\\u00[2-7]')


def check_rules(tokenizer_json: str) -> None:
    """Raise ValueError for rules that make a text much longer or hold a wrong size.

    `tokenizers` aborts the process when memory is short.
    """
    if not _CHECKED.search(tokenizer_json):
        return
    try:
        content = json.loads(tokenizer_json)
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not an object")
    growth, waiting = 1, [content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        rule = waiting.pop()
        if isinstance(rule, list):
            waiting += rule
        if not isinstance(rule, dict):
            continue
        waiting += rule.values()
        if rule.get("type") == "Replace":
            growth *= _growth(rule)
        elif rule.get("type") == "Precompiled":
            _check_precompiled(rule.get("precompiled_charsmap"))
    if growth > _MAX_GROWTH:
        raise ValueError(f"the rules make {growth} characters of one")


def _growth(replace: Mapping[str, Any]) -> int:
    """Return the characters a Replace rule makes of one. Raises ValueError for an empty pattern."""
    pattern, content = replace.get("pattern"), replace.get("content")
    if not isinstance(pattern, dict) or not isinstance(content, str):
        return 1  # `tokenizers` refuses the rule
    text = pattern.get("String")
    if text == "":
        raise ValueError("a rule replaces the empty text")
    if isinstance(text, str):
        return max(1, math.ceil(len(content) / len(text)))
    return max(1, len(content))


def _check_precompiled(charsmap: object) -> None:
    """Raise ValueError unless the map holds the table whose size stands at its beginning."""
    try:
        content = base64.b64decode(charsmap or b"", validate=True)  # type: ignore[arg-type]  # TypeError says so
    except (TypeError, ValueError):
        return  # `tokenizers` refuses the rule
    if content and int.from_bytes(content[:4], "little") > len(content) - 4:
        raise ValueError("the precompiled map is cut")
