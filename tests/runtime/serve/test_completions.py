"""Completions and token routes: texts and ids without a chat template."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import Completion


def complete(client: openai.OpenAI, prompt: Any = "abc", **options: Any) -> Completion:
    return client.completions.create(model="parrot", prompt=prompt, **{"temperature": 0, **options})


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=30)
    Completion.model_validate(answer.to_dict(), strict=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("defghijklmnopqrstuvwxyz", "stop")
    assert answer.usage and answer.usage.prompt_tokens == 3


def test_the_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("defghijklmnopqrs", "length")


def test_token_ids_are_a_prompt(client: openai.OpenAI, parrot: Any) -> None:
    ids = parrot.service.tokenizer.encode("abc")
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text
    both = complete(client, [ids, ids[:1]], max_tokens=2)
    assert [choice.text for choice in both.choices] == ["de", "bc"]


def test_several_prompts_with_several_answers(client: openai.OpenAI) -> None:
    answer = complete(client, ["abc", "xy"], n=2, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["de", "de", "z", "z"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage and answer.usage.prompt_tokens == 5


def test_a_stream(client: openai.OpenAI) -> None:
    with client.completions.create(
        model="parrot", prompt=["abc", "x"], temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["defghijklmnopqrs", "yz"]
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 18


def test_logprobs_as_lists(client: openai.OpenAI) -> None:
    found = complete(client, logprobs=2, max_tokens=4).choices[0].logprobs
    assert found and found.tokens == ["d", "e", "f", "g"]
    assert found.text_offset == [0, 1, 2, 3]
    assert found.top_logprobs and found.token_logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob


def test_a_stop_string(client: openai.OpenAI) -> None:
    assert complete(client, stop=["hi", "g"]).choices[0].text == "def"


@pytest.mark.parametrize("field", [{"echo": True}, {"best_of": 2}, {"suffix": "end"}])
def test_what_is_not_done_is_refused(client: openai.OpenAI, field: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **field)
    assert caught.value.param == next(iter(field))


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").owned_by == "dovetail"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_tokens_there_and_back(parrot: Any) -> None:
    found = parrot.post("/tokenize", {"prompt": "Grüße <|im_end|>", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 9
    assert found["max_model_len"] == 4096
    assert parrot.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Grüße <|im_end|>"}


def test_tokens_of_messages(parrot: Any) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    found = parrot.post("/tokenize", said).json()["tokens"]
    text = parrot.post("/detokenize", {"tokens": found}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    bare = parrot.post("/tokenize", {**said, "add_generation_prompt": False}).json()["tokens"]
    assert bare == found[: len(bare)] != found


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}])
def test_tokenize_takes_one_of_both(parrot: Any, body: Any) -> None:
    assert parrot.post("/tokenize", body).status_code == 400


def test_an_unknown_token_has_no_text(parrot: Any) -> None:
    reply = parrot.post("/detokenize", {"tokens": [5, 100_000]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")
