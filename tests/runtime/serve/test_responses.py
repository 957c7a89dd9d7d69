"""Responses, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def ask(client: openai.OpenAI, text: str = "Good morning.", **options: Any) -> Any:
    return client.responses.create(model="parrot", **{"input": f"say {text}", "temperature": 0, **options})


def stream(client: openai.OpenAI, text: str = "Good morning.", **options: Any) -> list[Any]:
    given = {"input": f"say {text}", "temperature": 0, **options}
    with client.responses.create(model="parrot", stream=True, **given) as events:
        return list(events)


def test_a_response_is_what_openais_types_say(client: openai.OpenAI) -> None:
    response = ask(client)
    Response.model_validate(response.to_dict(), strict=True)
    assert (response.output_text, response.status) == ("Good morning.", "completed")
    assert response.usage and response.usage.output_tokens == len("Good morning.")
    assert response.store is False


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    events = stream(client)
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict(), strict=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Good morning."
    assert events[-1].response.output_text == "Good morning."
    assert events[-1].response.usage


def test_the_clients_own_reader_of_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="parrot", input="say hello", temperature=0) as events:
        assert events.get_final_response().output_text == "hello"


def test_a_cut_response_is_incomplete(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=4)
    assert (response.output_text, response.status) == ("Good", "incomplete")
    assert response.incomplete_details and response.incomplete_details.reason == "max_output_tokens"
    assert stream(client, max_output_tokens=4)[-1].type == "response.incomplete"


def test_inputs_of_a_conversation(client: openai.OpenAI) -> None:
    first = ask(client, CALL, tools=[WEATHER])
    call = first.output[0]
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Rome"}
    history: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "The weather?"}]},
        *(item.to_dict() for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        {"role": "developer", "content": "Be brief."},
        *(item.to_dict() for item in ask(client).output),
        {"role": "user", "content": "say It rains."},
    ]
    assert ask(client, input=history, instructions="Help.").output_text == "It rains."


def test_a_call_streams(client: openai.OpenAI) -> None:
    events = stream(client, f"Well. {CALL}", tools=[WEATHER])
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict(), strict=True)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == ["message", "function_call"]
    assert "".join(deltas) == done[1].arguments and json.loads(done[1].arguments) == {"city": "Rome"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_can_be_required(client: openai.OpenAI, choice: Any) -> None:
    response = ask(client, '{"city": "Rome"}', tools=[WEATHER], tool_choice=choice, max_output_tokens=400)
    call = response.output[0]
    assert call.type == "function_call" and call.name == "weather"
    assert isinstance(json.loads(call.arguments)["city"], str)


class City(BaseModel):
    name: str


def test_structured_output_by_a_pydantic_model(client: openai.OpenAI) -> None:
    response = client.responses.parse(model="parrot", input='say {"name": "Rome"}', temperature=0, text_format=City)
    assert response.output_parsed == City(name="Rome")


def test_thinking_is_an_item(client: openai.OpenAI) -> None:
    response = ask(client, "<think>Hm.</think>Yes.")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == "Yes."
    Response.model_validate(response.to_dict(), strict=True)
    for event in stream(client, "<think>Hm.</think>Yes."):
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict(), strict=True)


def test_logprobs_if_included(client: openai.OpenAI) -> None:
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = response.output[0].content[0]
    assert "".join(each.token for each in part.logprobs) == "Good morning."
    assert all(len(each.top_logprobs) == 2 for each in part.logprobs)


@pytest.mark.parametrize(
    "field",
    [
        {"previous_response_id": "resp_1"},
        {"store": True},
        {"background": True},
        {"truncation": "auto"},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
        {"tools": [{"type": "web_search"}]},
    ],
)
def test_what_is_not_done_is_refused(client: openai.OpenAI, field: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **field)
    assert (caught.value.param or "").startswith(next(iter(field)))


async def text_of(client: openai.AsyncOpenAI) -> str:
    async with client, client.responses.stream(model="parrot", input="say hello", temperature=0) as events:
        return (await events.get_final_response()).output_text


def test_the_async_client(parrot: Any) -> None:
    import asyncio

    assert asyncio.run(text_of(parrot.async_client())) == "hello"
