"""Requests drawn from the schemas of the OpenAPI document, and worse: none may make the server fail.

DOVETAIL_FUZZ=2000 draws that many for each route.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dovetail.runtime.serve.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)
from dovetail.runtime.serve.service import Limits

EXAMPLES = int(os.environ.get("DOVETAIL_FUZZ", "60"))
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

plain = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
odd = st.sampled_from(["", "say hi", "\0", "<|im_end|>", "\u202e", "a" * 3000, "noise", "say <tool_call>{"])
texts = plain | odd | st.text(max_size=20)
numbers = st.integers(-5, 300) | st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308])
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
# Names that templates and Python know.
names = st.sampled_from(["self", "messages", "tools", "add_generation_prompt", "enable_thinking", "bos_token", "loop"])
# Grammars are hostile inputs too.
grammars = st.sampled_from([
    {}, {"type": "object"}, {"type": "odd"}, {"$ref": "#/nowhere"}, {"$ref": "http://127.0.0.1/x"}, {"enum": []},
    {"type": "array", "minItems": 10**9}, {"type": "string", "pattern": "(a{1000}){1000}"}, {"anyOf": []},
    {"type": "string", "pattern": "("}, {"const": "x" * 1000}, {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"allOf": [{"type": "integer"}, {"type": "string"}]}, {"type": "number", "minimum": 5, "maximum": 1}, {"not": {}},
])  # fmt: skip


messages = st.fixed_dictionaries({"role": st.just("user"), "content": plain | odd})


def drawn(schema: dict[str, Any], shared: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """What a JSON schema of pydantic allows, and now and then anything."""
    good = fitting(schema, shared, depth)

    @st.composite
    def mostly(draw: st.DrawFn) -> Any:
        return draw(anything if draw(st.integers(0, 39)) == 23 else good)

    return mostly()


def fitting(schema: dict[str, Any], shared: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return fitting(shared[schema["$ref"].rpartition("/")[2]], shared, depth + 1)
    if branches := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*(drawn(branch, shared, depth + 1) for branch in branches))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "object" if "role" in schema.get("properties", {}) and depth:
            return messages | members(schema, shared, depth)
        case "object" if "properties" in schema:
            return members(schema, shared, depth)
        case "object":
            values = schema.get("additionalProperties")
            inner = drawn(values, shared, depth + 1) if isinstance(values, dict) else anything
            return grammars | st.dictionaries(names | texts | st.integers(0, 300).map(str), inner, max_size=3)
        case "array":
            return st.lists(drawn(schema.get("items", {}), shared, depth + 1), min_size=1, max_size=3)
        case "integer":
            return st.integers(schema.get("minimum", 0), min(schema.get("maximum", 20), 20))
        case "number":
            return st.floats(schema.get("minimum", -2), schema.get("maximum", 2), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string":
            return st.sampled_from(["f", "g", "h i"]) if "pattern" in schema else plain | odd
    return anything


def members(schema: dict[str, Any], shared: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """An object with its required members, and a few others."""
    properties = schema["properties"]
    required = {name: drawn(properties[name], shared, depth + 1) for name in schema.get("required", ())}
    names = [name for name in properties if name not in required]

    @st.composite
    def some(draw: st.DrawFn) -> dict[str, Any]:
        found = {name: draw(strategy) for name, strategy in required.items()}
        if draw(st.integers(0, 5)):
            found |= {"messages": [draw(messages)]} if "messages" in names else {}
        for name in draw(st.lists(st.sampled_from(names), max_size=4)) if names else ():
            found[name] = draw(drawn(properties[name], shared, depth + 1))
        return found

    return some()


@pytest.mark.parametrize("path", ROUTES)
def test_no_request_makes_the_server_fail(serve: Callable[..., Any], path: str) -> None:
    server = serve(limits=Limits(new_tokens=6, timeout_s=20))
    with server.http() as client:
        draw_requests(client, path)
    server.wait_idle()


def draw_requests(client: httpx.Client, path: str) -> None:
    document = ROUTES[path].model_json_schema()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn(document, document.get("$defs", {})))
    def ask(body: Any) -> None:
        content = json.dumps(body)
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code < 500, f"{reply.status_code} {reply.text} for {content}"
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        else:
            assert '"server_error"' not in reply.text, content

    ask()
