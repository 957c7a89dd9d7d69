"""All turns of a conversation have one session, and other conversations have others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dovetail.runtime.serve.ray.session import session_of

SYSTEM = {"role": "system", "content": "Be brief."}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def session(**asked: Any) -> str:
    return session_of({}, json.dumps(asked).encode())


@pytest.mark.parametrize("before", [[], [SYSTEM]])
@pytest.mark.parametrize("field", ["messages", "input"])
def test_the_next_turn_has_the_session_of_the_first(field: str, before: list[dict[str, str]]) -> None:
    turns = [*before, turn("user", "Name a fruit.")]
    later = [*turns, turn("assistant", "A fig."), turn("user", "Another one.")]
    assert session(**{field: turns}) == session(**{field: later}) != ""
    assert session(**{field: turns}) != session(**{field: [*before, turn("user", "Name a tree.")]})


def test_another_system_prompt_is_another_session() -> None:
    turns = [turn("user", "Name a fruit.")]
    assert session(messages=turns) != session(messages=[SYSTEM, *turns])
    assert session(input="Name a fruit.") != session(input="Name a fruit.", instructions="Be brief.")


def test_a_long_prompt_is_known_by_its_beginning() -> None:
    assert session(prompt="a" * 5000 + "b") == session(prompt="a" * 5000 + "c") != session(prompt="b" * 5000)
    assert session(prompt=[1] * 5000) == session(prompt=[1] * 5001) != session(prompt=[2] * 5000)


def test_names_of_the_client_come_first() -> None:
    asked: dict[str, Any] = {"messages": [turn("user", "Hello")], "user": "ada", "prompt_cache_key": "chat-7"}
    assert session_of({"x-session-id": "s"}, json.dumps(asked).encode()) == "s"
    assert session(**asked) == "chat-7"
    assert session(messages=asked["messages"], user="ada") == session(messages=[turn("user", "Bye")], user="ada")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b"null", b'{"messages": 7}', b'{"messages": [7]}', b'{"user": 7}', b'{"prompt": {}}',
     b'{"messages": []}', b"[" * 100_000, b'{"prompt": "\\ud800"}'],
)  # fmt: skip
def test_a_strange_body_is_left_to_the_replica(body: bytes) -> None:
    assert isinstance(session_of({}, body), str)
