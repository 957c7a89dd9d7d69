"""The engine on scripted sessions: text, stop strings, streams that are abandoned, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import numpy as np
import pytest

from dovetail.runtime import (
    Chunk,
    ContextOverflow,
    Engine,
    GenerationResult,
    InputError,
    MarkovLogits,
    ScriptedDrafter,
    ScriptedTarget,
    ScriptedTokenizer,
    TargetPass,
    TreeLimits,
)
from dovetail.runtime.text.stop_strings import StopFilter

ALPHABET = "abcdefgh~:\nusr"  # with the letters of "user:"


def engine(
    seed: int = 0,
    *,
    speculative: bool = True,
    chat: bool = False,
    eos: tuple[int, ...] = (),
    max_context: int = 4096,
) -> Engine:
    logits = MarkovLogits(len(ALPHABET), seed)
    drafter = ScriptedDrafter.copy_of(logits, noise=1.0) if speculative else None
    tokenizer = ScriptedTokenizer(ALPHABET, has_chat_template=chat, eos_token_ids=eos)
    return Engine(ScriptedTarget(logits, max_context), drafter, tokenizer, tree=TreeLimits(8, 5, 3, lookup=0))


def same_text(left: GenerationResult, right: GenerationResult) -> bool:
    return dataclasses.replace(left, metrics=right.metrics) == right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_gives_the_same_with_and_without_speculation(temperature: float) -> None:
    for seed in range(5):
        one, other = engine(seed), engine(seed, speculative=False)
        options: dict[str, Any] = {"temperature": temperature, "seed": 4, "repetition_penalty": 1.1}
        speculative = one.generate("abc", 60, **options)
        assert same_text(one.generate("abc", 60, speculate=False, **options), speculative)
        assert same_text(other.generate("abc", 60, **options), speculative)
        assert same_text(one.generate("abc", 60, tree=TreeLimits(4, 3, 1, lookup=0), **options), speculative)
        assert len(speculative.token_ids) == speculative.metrics.new_tokens == 60
        assert speculative.metrics.accepted > 0 and speculative.finish_reason == "length"


def test_chunks_concatenate_to_the_result() -> None:
    chunks = list(engine(2).stream("ab", 50))
    result = engine(2).generate("ab", 50)
    assert (
        "".join(chunk.text for chunk in chunks) == result.text == ScriptedTokenizer(ALPHABET).decode(result.token_ids)
    )
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert all(chunk.finish_reason is None and chunk.metrics is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason == "length" and chunks[-1].metrics is not None
    assert any(len(chunk.token_ids) > 1 for chunk in chunks)


def test_a_drawn_seed_is_reported_and_repeats_the_text() -> None:
    first = engine().generate("ab", 40, temperature=1.2)
    assert first.seed is not None
    assert same_text(engine().generate("ab", 40, temperature=1.2, seed=first.seed), first)
    assert engine().generate("ab", 40).seed is None
    assert len({engine().generate("ab", 40, temperature=1.2).text for _ in range(3)}) > 1


def test_metrics_are_plain_data() -> None:
    result = engine().generate("ab", 40)
    record = json.loads(json.dumps(dataclasses.asdict(result)))
    assert record["metrics"]["prompt_tokens"] == 2 and record["token_ids"] == list(result.token_ids)


def until_stop(text: str, stops: list[str]) -> str | None:
    """Grow the text by one character until a stop string is in it; what precedes it."""
    for end in range(1, len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)]
    return None


@pytest.mark.parametrize("speculate", [True, False])
def test_stop_strings_end_the_text_before_them_wherever_chunks_split(speculate: bool) -> None:
    found = 0
    for seed in range(12):
        whole = engine(seed).generate("ab", 60)
        text = whole.text
        for stops in ([text[7:10]], [text[3:5], text[20:24]], ["~~~~~", text[30:45]], [text[0]], [text[57:60]]):
            one = engine(seed)
            chunks = list(one.stream("ab", 60, stop=stops, speculate=speculate))
            out = "".join(chunk.text for chunk in chunks)
            expected = until_stop(text, stops)
            assert expected is not None and out == expected
            assert chunks[-1].finish_reason == "stop"
            for stop in stops:  # no part of the one that ended the text had been let out
                assert stop not in out
            tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
            assert tokens == whole.token_ids[: len(tokens)]
            assert chunks[-1].metrics is not None and chunks[-1].metrics.new_tokens == len(tokens)
            decoded = ScriptedTokenizer(ALPHABET).decode(tokens)  # "~" is known one token later
            assert any(decoded.removesuffix(decoded[-1]).endswith(stop) or decoded.endswith(stop) for stop in stops)
            assert same_text(one.generate("ab", 60), whole)  # the engine goes on as before
            found += 1
    assert found == 60


def test_a_text_that_only_begins_like_a_stop_string_is_let_out_at_the_end() -> None:
    whole = engine().generate("ab", 20)
    stop = whole.text[-3:] + "x"
    assert same_text(engine().generate("ab", 20, stop=[stop]), whole)
    assert same_text(engine().generate("ab", 20, stop=stop), whole)


@pytest.mark.parametrize("size", range(1, 8))
def test_stop_filter_lets_nothing_out_that_it_would_have_to_take_back(size: int) -> None:
    text, stops = "aabaabaaabab", ["aaab", "bb", "abaaba~"]
    filtered, out = StopFilter(stops), ""
    for start in range(0, len(text), size):
        out += filtered.add(text[start : start + size])
        assert "aabaab".startswith(out)
    assert filtered.stopped and out == "aabaab" and filtered.flush() == "" and filtered.add("more") == ""


def test_stop_tokens_end_the_answer_and_are_no_part_of_it() -> None:
    stopped = 0
    for seed in range(8):
        whole = engine(seed).generate("ab", 60)
        result = engine(seed, eos=(3,)).generate("ab", 60)
        if 3 in whole.token_ids:
            stopped += 1
            assert result.finish_reason == "stop"
            assert result.token_ids == whole.token_ids[: whole.token_ids.index(3)]
        else:
            assert result.finish_reason == "length"
    assert stopped > 3


def test_an_answer_may_be_empty() -> None:
    first = engine().generate("ab", 1).token_ids[0]
    result = engine(eos=(first,)).generate("ab", 10)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "stop")
    assert result.metrics.new_tokens == 0 and result.metrics.tokens_per_second == 0


def test_a_string_is_a_user_turn_where_there_is_a_chat_template() -> None:
    text, messages = "abc", [{"role": "user", "content": "abc"}]
    turn = engine(chat=True).generate(text, 20)
    assert turn.metrics.prompt_tokens == len("user:abc\n")
    assert same_text(engine(chat=True).generate(messages, 20), turn)
    assert same_text(engine().generate("user:abc\n", 20), turn)
    assert same_text(engine(chat=True).generate("user:abc\n", 20, raw=True), turn)
    assert engine(chat=True).generate(text, 20, raw=True).metrics.prompt_tokens == 3
    assert engine().generate(text, 20).metrics.prompt_tokens == 3


def test_of_a_conversation_only_the_last_answer_and_the_new_words_are_read() -> None:
    one, prompt, cached = engine(), "abc", list[int]()
    for _ in range(3):
        answer = one.generate(prompt, 30)
        cached.append(answer.metrics.cached_tokens)
        assert same_text(engine().generate(prompt, 30), answer)
        prompt += answer.text + "def"
    assert cached == [0, 3, 36]


def test_a_reset_engine_reads_from_the_first_token() -> None:
    one = engine()
    first = one.generate("abc", 30)
    one.reset()
    again = one.generate("abc", 30)
    assert again.metrics.cached_tokens == 0 and same_text(again, first)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 7, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("count", [1, 2, 33, 34, 80])
def test_an_answer_that_is_read_again_is_chosen_again(count: int, options: dict[str, Any]) -> None:
    one = engine()
    answer = one.generate("abc", count, **options).token_ids
    assert [choice.token for choice in one.choices("abc", answer, **options)] == list(answer)
    assert one.generate("abc", count, **options).token_ids == answer


def test_a_token_that_was_not_the_target_s_choice_is_told_with_its_margin() -> None:
    one = engine()
    answer = list(one.generate("abc", 40).token_ids)
    answer[35] = next(token for token in range(5) if token != answer[35])
    choices = one.choices("abc", answer)
    assert [at for at in range(36) if choices[at].token != answer[at]] == [35]
    for choice, token in zip(choices, answer, strict=True):
        assert choice.margin is not None and (choice.margin > 0) == (choice.token != token)
    sampled = one.choices("abc", answer, temperature=1.0, seed=1)
    assert {choice.margin for choice in sampled} == {None} and len(sampled) == len(answer)
    assert one.choices("abc", []) == []


def test_an_answer_that_does_not_fit_is_not_read() -> None:
    one = engine(max_context=8)
    answer = one.generate("abc", 20).token_ids
    assert len(answer) == 5 and [choice.token for choice in one.choices("abc", answer)] == list(answer)
    with pytest.raises(ContextOverflow, match="9 tokens"):
        one.choices("abc", [0] * 6)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_what_is_no_token_is_refused(token: int) -> None:
    with pytest.raises(InputError, match=f"token id {token}"):
        engine().choices("abc", [0, token])


def test_without_a_drafter_a_pass_has_one_node() -> None:
    one = engine(speculative=False)
    assert one._sequence is not None and isinstance(one._sequence.target, ScriptedTarget)
    calls = one._sequence.target.calls
    for tree in (None, TreeLimits(1, 0, 1, lookup=0)):
        calls.clear()
        one.generate("abc", 5, tree=tree)
        assert {count for call, count in calls if call == "verify"} == {1}


@pytest.mark.parametrize("after", range(4))
def test_an_abandoned_stream_leaves_the_engine_usable(after: int) -> None:
    one = engine()
    stream = one.stream("abc", 40)
    for _ in range(after):
        next(stream)
    stream.close()
    assert same_text(one.generate("abc", 40), engine().generate("abc", 40))
    for _ in one.stream("abcd", 40):
        break  # dropped without close
    assert same_text(one.generate("abc", 40), engine().generate("abc", 40))


def test_ctrl_c_within_a_pass_leaves_the_engine_usable() -> None:
    class Pressed(ScriptedTarget):
        presses = 3

        def verify(self, *offers: Any, rows: int = 0) -> dict[int, TargetPass]:
            result = super().verify(*offers)
            self.presses -= 1
            if self.presses == 0:
                raise KeyboardInterrupt
            return result

    logits = MarkovLogits(len(ALPHABET))
    one = Engine(Pressed(logits), ScriptedDrafter.copy_of(logits), ScriptedTokenizer(ALPHABET))
    with pytest.raises(KeyboardInterrupt):
        one.generate("abc", 40)
    assert same_text(one.generate("abc", 40), engine().generate("abc", 40))


def test_one_generation_at_a_time() -> None:
    one = engine()
    stream = one.stream("abc", 40)
    waiting = one.stream("abd", 40)  # not started yet: it holds nothing
    next(stream)
    with pytest.raises(InputError, match="another generation of this engine is running"):
        one.generate("abc", 40)
    stream.close()
    assert isinstance(next(waiting), Chunk)
    waiting.close()
    assert one.generate("abc", 5).text


def test_threads_are_told_that_the_engine_is_busy() -> None:
    one, caught = engine(), list[str]()
    stream = one.stream("abc", 40)
    next(stream)

    def intrude() -> None:
        try:
            one.generate("abc", 40)
        except InputError as error:
            caught.append(str(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(caught) == 1
    expected = engine().generate("abc", 40).token_ids
    assert tuple(token for chunk in stream for token in chunk.token_ids) == expected[1:]


def test_a_closed_engine_says_so() -> None:
    with engine() as one:
        assert one.generate("abc", 3).text
    with pytest.raises(InputError, match="engine is closed"):
        one.generate("abc", 3)
    one.close()


def test_devices_are_named() -> None:
    assert (engine().target_device, engine().drafter_device) == ("scripted", "scripted")
    assert engine(speculative=False).drafter_device is None


USER = {"role": "user", "content": "a"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("max_new_tokens", {"max_new_tokens": 0}, "max_new_tokens 0"),
    ("max_new_tokens", {"max_new_tokens": 1.5}, "max_new_tokens 1.5"),
    ("temperature", {"temperature": -1}, "temperature -1"),
    ("top_p", {"top_p": 0}, "top_p 0"),
    ("top_k", {"top_k": -1}, "top_k -1"),
    ("min_p", {"min_p": 2}, "min_p 2"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty 0"),
    ("seed", {"seed": -1}, "seed -1"),
    ("stop", {"stop": [""]}, "stop string ''"),
    ("stop", {"stop": [5]}, "stop string 5"),
    ("tree", {"tree": 12}, "tree 12"),
    ("empty", {"prompt": ""}, "prompt is empty"),
    ("blank turn", {"prompt": " \n", "chat": True}, "prompt is empty"),
    ("no messages", {"prompt": [], "chat": True}, "messages is empty"),
    ("no content", {"prompt": [{"role": "user"}], "chat": True}, "message 0 \\(role 'user'\\) has no content"),
    ("no message", {"prompt": ["hello"], "chat": True}, "message 0 is a str"),
    ("bytes", {"prompt": b"abc", "chat": True}, "messages is a bytes"),
    ("number", {"prompt": 5, "chat": True}, "messages is a int"),
    ("raw messages", {"prompt": [USER], "chat": True, "raw": True}, "raw=True"),
    ("id beyond the vocabulary", {"prompt": [1, 14]}, "token id 14"),
    ("negative id", {"prompt": [-1]}, "token id -1"),
    ("ids and texts", {"prompt": [1, "a"], "chat": True}, "message 0 is a int"),
    ("options without messages", {"prompt": [1], "template_options": {"tools": []}}, "template options need"),
    (
        "options of a raw prompt",
        {"raw": True, "chat": True, "template_options": {"tools": []}},
        "template options need",
    ),
    ("options without a template", {"template_options": {"tools": []}}, "template options need"),
    ("no options", {"chat": True, "template_options": ["tools"]}, "template options \\['tools'\\]"),
    ("messages as an option", {"chat": True, "template_options": {"messages": []}}, "template option 'messages'"),
    ("self as an option", {"chat": True, "template_options": {"self": 1}}, "template option 'self' cannot be set"),
    ("messages without template", {"prompt": [USER]}, "no chat template"),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_refused_at_once_in_one_line(options: dict[str, Any], message: str) -> None:
    options = dict(options)
    one, prompt = engine(chat=options.pop("chat", False)), options.pop("prompt", "abc")
    with pytest.raises(InputError, match=message) as caught:
        one.stream(prompt, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        one.generate(prompt, **options)
    assert one.generate("abc", 3).text


def test_token_ids_are_a_prompt() -> None:
    one, ids = engine(), ScriptedTokenizer(ALPHABET).encode("abc")
    text = one.generate("abc", 20)
    assert same_text(one.generate(ids, 20), text) and same_text(one.generate(tuple(np.array(ids)), 20), text)
    assert same_text(one.generate(ids, 20, raw=True), text)
    assert one.count_tokens(ids) == 3 and len(one.choices(ids, text.token_ids)) == 20


class AskedTokenizer(ScriptedTokenizer):
    """Notes how conversations are to be encoded."""

    def encode_chat(self, messages: Any, **options: Any) -> list[int]:
        self.asked = (messages, options)
        return self.encode("abc")


def test_template_options_reach_the_tokenizer_of_every_question() -> None:
    tokenizer = AskedTokenizer(ALPHABET, has_chat_template=True)
    one = Engine(ScriptedTarget(MarkovLogits(len(ALPHABET), 0), 4096), None, tokenizer)
    options = {"enable_thinking": False, "tools": [{"name": "f"}]}
    for ask in (
        lambda **given: one.generate("usr", 3, **given),
        lambda **given: list(one.stream("usr", 3, **given)),
        lambda **given: one.count_tokens("usr", **given),
        lambda **given: one.choices("usr", [1], **given),
    ):
        ask(template_options=options, parse_special=True)
        assert tokenizer.asked == ([{"role": "user", "content": "usr"}], {**options, "parse_special": True})
        ask()
        assert tokenizer.asked[1] == {"parse_special": False}


def test_a_message_may_hold_tool_calls_alone() -> None:
    tokenizer = AskedTokenizer(ALPHABET, has_chat_template=True)
    one = Engine(ScriptedTarget(MarkovLogits(len(ALPHABET), 0), 4096), None, tokenizer)
    turns: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    one.generate(turns, 3)
    assert tokenizer.asked[0] == turns


def test_a_prompt_longer_than_the_context_names_both_numbers() -> None:
    one = engine(max_context=16)
    for count in (16, 40):
        with pytest.raises(ContextOverflow, match=f"{count} tokens .* 16 tokens"):
            one.stream("a" * count)
    result = one.generate("a" * 10, 100)
    assert len(result.token_ids) == 6 and result.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"drafter_device": "tpu"}, "'tpu'"), ({"threads": 0}, "threads 0"), ({"threads": 1.5}, "threads 1.5")],
)
def test_bad_engine_options_are_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine.from_pretrained("/nowhere", **options)
