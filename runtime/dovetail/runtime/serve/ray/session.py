"""Names the session of a request. Requests of one session go to the replica that has their prefix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from dovetail.runtime.system.files import parse_json

HEADER = "x-session-id"
FIELDS = ("prompt_cache_key", "user", "safety_identifier")  # by which clients name a session or a user
BEGINNING = 1024  # characters of a prompt that has no turns


def session_of(headers: Mapping[str, str], body: bytes) -> str:
    """Return the session of a request: as its header or its body names it, else by how the text begins.

    All turns of a conversation begin alike: with what comes before the first answer.
    """
    if named := headers.get(HEADER):
        return named
    try:
        asked = parse_json(body)
    except ValueError:  # the replica says what is wrong
        return ""
    if not isinstance(asked, dict):
        return ""
    for field in FIELDS:
        if isinstance(named := asked.get(field), str) and named:
            return named
    beginning = json.dumps([asked.get("instructions"), _beginning(asked)], sort_keys=True)
    return sha256(beginning.encode()).hexdigest()


def _beginning(asked: Mapping[str, Any]) -> object:
    """Return the turns before the first answer, or the first characters of a prompt."""
    turns = asked.get("messages", asked.get("input", asked.get("prompt")))
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        roles = [turn.get("role") for turn in turns]
        first = roles.index("user") if "user" in roles else len(turns)
        return turns[: first + 1]
    return turns[:BEGINNING] if isinstance(turns, str | list) else None
