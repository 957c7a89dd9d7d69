"""Chat completions, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": f"say {text}"}]


def ask(client: openai.OpenAI, text: str = "Good morning.", **options: Any) -> Any:
    given = {"messages": say(text), "temperature": 0, **options}
    return client.chat.completions.create(model="parrot", **given)


def stream(client: openai.OpenAI, text: str = "Good morning.", **options: Any) -> list[ChatCompletionChunk]:
    given = {"messages": say(text), "temperature": 0, **options}
    with client.chat.completions.create(model="parrot", stream=True, **given) as chunks:
        return list(chunks)


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


def test_an_answer_is_what_openais_types_say(client: openai.OpenAI) -> None:
    answer = ask(client)
    ChatCompletion.model_validate(answer.to_dict(), strict=True)
    assert answer.choices[0].message.content == "Good morning."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "parrot"


def test_a_stream_has_the_same_text(client: openai.OpenAI) -> None:
    chunks = stream(client)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict(), strict=True)
    assert text_of(chunks) == "Good morning."
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(chunk.usage for chunk in chunks)


def test_usage_counts_tokens_and_drafts(client: openai.OpenAI) -> None:
    usage = ask(client).usage
    assert usage and usage.completion_tokens == len("Good morning.")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details and usage.prompt_tokens_details
    assert usage.completion_tokens_details.accepted_prediction_tokens
    assert usage.completion_tokens_details.rejected_prediction_tokens is not None
    assert usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_ends_with_usage_if_asked(client: openai.OpenAI) -> None:
    chunks = stream(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == len("Good morning.")
    assert not any(chunk.usage for chunk in chunks[:-1])


def test_without_drafts_the_text_is_the_same(client: openai.OpenAI) -> None:
    plain = ask(client, extra_body={"speculate": False})
    assert plain.choices[0].message.content == "Good morning."
    assert plain.usage and plain.usage.completion_tokens_details
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_a_request_may_limit_its_trees(client: openai.OpenAI) -> None:
    narrow = ask(client, "abcdefghijklmnop", extra_body={"tree": {"width": 2, "depth": 1, "top_k": 1, "lookup": 0}})
    assert narrow.usage and narrow.usage.completion_tokens_details
    assert narrow.choices[0].message.content == "abcdefghijklmnop"
    assert narrow.usage.completion_tokens_details.accepted_prediction_tokens == 8


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_ends_an_answer(client: openai.OpenAI, name: str) -> None:
    limit: dict[str, Any] = {name: 4}
    answer = ask(client, **limit)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Good", "length")


@pytest.mark.parametrize("stop", ["mor", ["never", "mor"]])
def test_a_stop_string_ends_an_answer(client: openai.OpenAI, stop: Any) -> None:
    answer = ask(client, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Good ", "stop")


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    noise: list[Any] = [{"role": "user", "content": "noise"}]
    texts = [
        ask(client, messages=noise, temperature=1, seed=seed, max_tokens=20).choices[0].message.content
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_is_on_by_default(client: openai.OpenAI) -> None:
    noise: list[Any] = [{"role": "user", "content": "noise"}]
    texts = {
        client.chat.completions.create(model="parrot", messages=noise, max_tokens=20).choices[0].message.content
        for _ in range(3)
    }
    assert len(texts) == 3


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    noise: list[Any] = [{"role": "user", "content": "noise"}]
    answer = ask(client, messages=noise, temperature=1, seed=5, n=3, max_tokens=20)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    second = ask(client, messages=noise, temperature=1, seed=6, max_tokens=20)
    assert second.choices[0].message.content == texts[1]
    assert answer.usage and answer.usage.completion_tokens == 60


def test_several_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    chunks = stream(client, n=3)
    assert [text_of(chunks, index) for index in range(3)] == ["Good morning."] * 3


def test_a_bias_decides(client: openai.OpenAI, parrot: Any) -> None:
    (token,) = parrot.service.tokenizer.encode("z")
    answer = ask(client, logit_bias={str(token): 100}, max_tokens=3)
    assert answer.choices[0].message.content == "zzz"


def test_a_penalty_changes_the_text(client: openai.OpenAI) -> None:
    noise: list[Any] = [{"role": "user", "content": "noise"}]
    plain = ask(client, messages=noise, max_tokens=40).choices[0].message.content
    penalised = ask(client, messages=noise, max_tokens=40, presence_penalty=2, frequency_penalty=2)
    assert plain != penalised.choices[0].message.content


def test_logprobs_tell_each_token_and_its_rivals(client: openai.OpenAI) -> None:
    answer = ask(client, "Grüße", logprobs=True, top_logprobs=3)
    found = answer.choices[0].logprobs
    assert found and found.content
    assert bytes(byte for each in found.content for byte in each.bytes or ()).decode() == "Grüße"
    for each in found.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == max(top.logprob for top in each.top_logprobs) <= 0


def test_logprobs_stream_with_their_text(client: openai.OpenAI) -> None:
    chunks = stream(client, logprobs=True)
    tokens = [
        each.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for each in choice.logprobs.content or ()
    ]
    assert "".join(tokens) == text_of(chunks) == "Good morning."


def test_a_conversation_with_developer_and_tool_turns(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "refusal": None},
        {"role": "user", "content": "say so"},
    ]
    assert ask(client, messages=messages).choices[0].message.content == "so"


def test_the_model_may_call_a_tool(client: openai.OpenAI) -> None:
    answer = ask(client, CALL, tools=[WEATHER, TIME])
    call = answer.choices[0].message.tool_calls[0]
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
    ChatCompletion.model_validate(answer.to_dict(), strict=True)


def test_a_call_streams_name_first_and_then_arguments(client: openai.OpenAI) -> None:
    chunks = stream(client, f"Well. {CALL}", tools=[WEATHER])
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert calls[0].id and calls[0].function and calls[0].function.name == "weather"
    assert json.loads("".join(call.function.arguments or "" for call in calls if call.function)) == {"city": "Rome"}
    assert text_of(chunks).strip() == "Well."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_two_calls_or_one(client: openai.OpenAI) -> None:
    both = CALL + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    answer = ask(client, both, tools=[WEATHER, TIME])
    assert [call.function.name for call in answer.choices[0].message.tool_calls or ()] == ["weather", "time"]
    one = ask(client, both, tools=[WEATHER, TIME], parallel_tool_calls=False)
    assert [call.function.name for call in one.choices[0].message.tool_calls or ()] == ["weather"]


def test_no_tool_is_called_against_the_choice(client: openai.OpenAI) -> None:
    answer = ask(client, CALL, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == CALL


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_can_be_required(client: openai.OpenAI, streamed: bool) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, TIME], "tool_choice": "required", "max_tokens": 400, "seed": 3,
                               "extra_body": {"top_k": 40}}  # fmt: skip
    names, arguments = called(client, streamed, **options)
    assert names and set(names) <= {"weather", "time"}
    assert all(isinstance(json.loads(each), dict) for each in arguments)


@pytest.mark.parametrize("key", ["$defs", "definitions"])
def test_required_tools_may_share_definitions(client: openai.OpenAI, key: str) -> None:
    def tool(name: str, side: Any) -> Any:
        parameters = {"type": "object", "properties": {"side": {"$ref": f"#/{key}/Side"}}, "required": ["side"]}
        return {"type": "function", "function": {"name": name, "parameters": {**parameters, key: {"Side": side}}}}

    sides = {"enum": ["left", "right"]}
    names, arguments = called(client, False, tools=[tool("turn", sides), tool("look", sides)], tool_choice="required",
                              parallel_tool_calls=False)  # fmt: skip
    assert names in (["turn"], ["look"])
    assert json.loads(arguments[0])["side"] in ("left", "right")
    with pytest.raises(openai.BadRequestError, match="Side"):
        ask(client, tools=[tool("turn", sides), tool("look", {"const": 1})], tool_choice="required")


@pytest.mark.parametrize("streamed", [False, True])
def test_one_function_can_be_required(client: openai.OpenAI, streamed: bool) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    names, arguments = called(client, streamed, tools=[TIME, WEATHER], tool_choice=choice)
    assert names == ["weather"]
    assert isinstance(json.loads(arguments[0])["city"], str)


def called(client: openai.OpenAI, streamed: bool, **options: Any) -> tuple[list[str], list[str]]:
    """Names and arguments of an answer that says nothing by itself: the grammar writes it."""
    if not streamed:
        answer = ask(client, '{"city": "Rome"}', **options)
        assert answer.choices[0].finish_reason == "tool_calls"
        calls = [call.function for call in answer.choices[0].message.tool_calls or ()]
        return [call.name for call in calls], [call.arguments for call in calls]
    names, arguments = list[str](), list[str]()
    for chunk in stream(client, '{"city": "Rome"}', **options):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function
            if call.function.name:
                names.append(call.function.name)
                arguments.append("")
            arguments[call.index] += call.function.arguments or ""
    return names, arguments


class City(BaseModel):
    name: str
    population: int


def test_structured_output_by_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="parrot", messages=say('{"name": "Rome", "population": 2800000}'), temperature=0, response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Rome", population=2800000)


def test_structured_output_against_the_models_will(client: openai.OpenAI) -> None:
    schema = {"name": "colour", "schema": {"enum": ["red", "green"]}, "strict": True}
    answer = ask(client, "blue", response_format={"type": "json_schema", "json_schema": schema})
    assert json.loads(answer.choices[0].message.content or "") in ("red", "green")


def test_any_object(client: openai.OpenAI) -> None:
    answer = ask(client, '{"a": [1, 2]}', response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content or "") == {"a": [1, 2]}


def test_a_stream_of_structured_output(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="parrot", messages=say('{"name": "Oslo", "population": 1}'), temperature=0, response_format=City
    ) as events:
        answer = events.get_final_completion()
    assert answer.choices[0].message.parsed == City(name="Oslo", population=1)


def test_thinking_is_apart_from_the_answer(client: openai.OpenAI) -> None:
    answer = ask(client, "<think>Hm.</think>Yes.")
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].message.model_extra == {"reasoning_content": "Hm."}
    chunks = stream(client, "Hm.</think>Yes.", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    thought = "".join((chunk.choices[0].delta.model_extra or {}).get("reasoning_content", "") for chunk in chunks)
    assert (thought, text_of(chunks)) == ("Hm.", "Yes.")


def test_rounds_are_shown_if_asked(client: openai.OpenAI) -> None:
    chunks = stream(client, extra_body={"stream_options": {"include_rounds": True}})
    own = [found for chunk in chunks if (found := (chunk.model_extra or {}).get("dovetail"))]
    assert sum(each["tokens"] for each in own) == len("Good morning.")
    trees = [each["tree"] for each in own if "tree" in each]
    assert any(tree["accepted"] for tree in trees)
    for tree in trees:
        assert len(tree["tokens"]) == len(tree["parents"]) > max(tree["accepted"], default=0)
    assert own[-1]["metrics"]["new_tokens"] == len("Good morning.")


async def answers_of(client: openai.AsyncOpenAI) -> list[str | None]:
    import asyncio

    async def one(number: int) -> str | None:
        answer = await client.chat.completions.create(model="parrot", messages=say(f"number {number}"), temperature=0)
        return answer.choices[0].message.content

    async with client:
        found = await asyncio.gather(*map(one, range(8)))
        chunks = await client.chat.completions.create(model="parrot", messages=say("last"), temperature=0, stream=True)
        last = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
    return [*found, last]


def test_many_users_at_once(parrot: Any) -> None:
    import asyncio

    found = asyncio.run(answers_of(parrot.async_client()))
    assert found == [*(f"number {number}" for number in range(8)), "last"]
