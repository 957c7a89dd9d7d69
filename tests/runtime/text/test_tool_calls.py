"""Tool calls: found in answers however the text is cut, rendered in prompts, shown where their marks are special."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError
from dovetail.runtime.testing.scripted import ScriptedTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.text.tool_calls import Answer, AnswerParser, AnswerStyle, Piece, ToolCall, collect

TEMPLATES = Path(__file__).parent / "templates"
QWEN, LLAMA = (
    (TEMPLATES / name).read_text(encoding="utf-8") for name in ("qwen2.5.jinja", "llama3_like.jinja")
)  # fmt: skip
HERMES, LLAMA3 = AnswerStyle("hermes"), AnswerStyle("llama3")
NAMES = ("weather", "time")
MARKS = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None, *, special_call: bool = False) -> Tokenizer:
    """Bytes, the marks of turns as special tokens, and <tool_call> as an ordinary or a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(MARKS)
    backend.add_tokens([AddedToken(mark, special=special_call) for mark in ("<tool_call>", "</tool_call>")])
    return Tokenizer(backend.to_str().encode(), chat_template=template, special_tokens={"bos_token": ""})


def parsed(style: AnswerStyle, *texts: str, names: tuple[str, ...] = NAMES) -> Answer:
    parser = AnswerParser(style, names)
    return collect([piece for text in texts for piece in parser.add(text)] + parser.flush())


def said(content: str = "", *calls: tuple[str, str], reasoning: str = "") -> Answer:
    return Answer(content, reasoning, tuple(ToolCall(*call) for call in calls))


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}\n</tool_call>'
WEATHER = ("weather", '{"city": "Zürich", "days": [1, 2]}')
BARE = '{"name": "weather", "parameters": {"city": "Zürich", "days": [1, 2]}}'

# Every text, and what it holds.
CASES: list[tuple[AnswerStyle, str, Answer]] = [
    (HERMES, "", said()),
    (HERMES, "Hello!\n", said("Hello!\n")),
    (HERMES, "a <tool> is < a <tool_call", said("a <tool> is < a <tool_call")),
    (HERMES, CALL, said("", WEATHER)),
    (HERMES, f"I look.\n\n{CALL}", said("I look.", WEATHER)),
    (HERMES, f"{CALL}\n{CALL}\n", said("", WEATHER, WEATHER)),
    (HERMES, f"{CALL}\nDone. ", said("Done. ", WEATHER)),
    (HERMES, CALL.replace("\n", ""), said("", WEATHER)),
    (HERMES, CALL.removesuffix("</tool_call>"), said("", WEATHER)),
    (HERMES, CALL.replace("}}", "}"), said("", WEATHER)),  # a brace forgotten
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', said("", ("time", "{}"))),
    (HERMES, '<tool_call>{"arguments": {"at": 1}, "name": "time"}</tool_call>', said("", ("time", '{"at": 1}'))),
    (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"at\\": 1}"}</tool_call>', said("", ("time", '{"at": 1}'))),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"s": "}]\\"</tool_call>{"}}</tool_call>',
     said("", ("time", '{"s": "}]\\"</tool_call>{"}'))),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"s": "two\nlines"}}</tool_call>',
     said("", ("time", '{"s": "two\\nlines"}'))),
    (LLAMA3, BARE, said("", WEATHER)),
    (LLAMA3, f"\n {BARE}", said("", WEATHER)),
    (LLAMA3, f"<|python_tag|>{BARE}", said("", WEATHER)),
    (LLAMA3, f"I look. <|python_tag|>{BARE}", said("I look.", WEATHER)),
    (LLAMA3, f"{BARE}; {BARE}", said("", WEATHER, WEATHER)),
    (LLAMA3, f"{BARE}\n{BARE}\n", said("", WEATHER, WEATHER)),
    (LLAMA3, BARE.replace('{"name"', '{"type": "function", "name"'), said("", WEATHER)),
    (LLAMA3, '{"type": "function", "function": {"name": "time", "parameters": {}}}', said("", ("time", "{}"))),
    (LLAMA3, f"{BARE}\nDone.", said("Done.", WEATHER)),
    (AnswerStyle("hermes", thinks=True), f"<think>\nWell,\nso.\n</think>\n\nI look.\n{CALL}",
     said("I look.", WEATHER, reasoning="Well,\nso.")),
    (AnswerStyle("hermes", thinks=True), f"<think>\n\n</think>\n\n{CALL}", said("", WEATHER)),
    (AnswerStyle("hermes", thinks=True), "<thin ice", said("<thin ice")),
    (AnswerStyle("hermes", thinks=True), "<think>no end </thi", said(reasoning="no end </thi")),
    (AnswerStyle("hermes", thinks=True, thinking=True), f"so.\n</think>\n{CALL}", said("", WEATHER, reasoning="so.")),
    (AnswerStyle("llama3", thinks=True), f"<think>so</think>{BARE}", said("", WEATHER, reasoning="so")),
    (AnswerStyle(None, thinks=True), "<think>so</think> Yes.", said("Yes.", reasoning="so")),
    (AnswerStyle(None), CALL, said(CALL)),
]  # fmt: skip

# Texts that look like calls and are none: they stay as they are.
TEXTS = [
    (HERMES, "<tool_call>"),
    (HERMES, "see\n<tool_call>\n"),
    (HERMES, "<tool_call> call_weather() </tool_call>"),
    (HERMES, "<tool_call>{}</tool_call>"),
    (HERMES, '<tool_call>{"name": "delete", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "weather", "arguments": 1}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["weather"]}</tool_call>'),
    (HERMES, "<tool_call>{'name': 'weather', 'arguments': {}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": Bonn}}</tool_call> Sorry.'),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"</tool_call> Sorry.'),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Bo'),
    (HERMES, '<tool_call>{"name": "weath'),
    (HERMES, '<tool_call>{"type": 1</tool_call> more'),
    (HERMES, '<tool_call>{"city": "Bonn", "name": "weather"}</tool_call>'),
    (LLAMA3, '{"name": "Anna", "parameters": {"age": 3}}'),
    (LLAMA3, '{"city": "Bonn"}'),
    (LLAMA3, "{ x | x > 0 }"),
    (LLAMA3, '{"name": "weather", "parameters": {"city": Bonn}}'),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Bonn'),
    (LLAMA3, f"Call it: {BARE}"),
    (LLAMA3, f"```json\n{BARE}\n```"),
    (LLAMA3, '<|python_tag|>print("hello")'),
    (LLAMA3, CALL),
]
CASES += [(style, text, said(text)) for style, text in TEXTS]


@pytest.mark.parametrize(("style", "text", "expected"), CASES)
def test_an_answer_is_split(style: AnswerStyle, text: str, expected: Answer) -> None:
    assert parsed(style, text) == expected
    assert parsed(style, *text) == expected  # character by character
    for call in expected.calls:
        assert isinstance(json.loads(call.arguments), dict)


def joined(pieces: list[Piece]) -> list[Piece]:
    whole = list[Piece]()
    for piece in pieces:
        if whole and (whole[-1].kind, whole[-1].index) == (piece.kind, piece.index):
            whole[-1] = Piece(piece.kind, whole[-1].text + piece.text, piece.index)
        else:
            whole.append(piece)
    return whole


PARTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]", '"', ":", ",", ";",
    '{"name": ', '"weather"', '"Anna"', ', "arguments": {', ', "parameters": {', '"a": 1', "\n", " ", "é", "text", CALL,
    BARE, "<", ">", "\\",
]  # fmt: skip
STYLES = [
    AnswerStyle(calls, thinks, thinking)
    for calls in ("hermes", "llama3", None)
    for thinks, thinking in ((False, False), (True, False), (True, True))
]  # fmt: skip
answers = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(style=st.sampled_from(STYLES), text=answers, data=st.data())
def test_pieces_do_not_depend_on_where_the_text_is_cut(style: AnswerStyle, text: str, data: Any) -> None:
    parser = AnswerParser(style, NAMES)
    whole = joined(parser.add(text) + parser.flush())
    parser, pieces, at = AnswerParser(style, NAMES), list[Piece](), 0
    while at < len(text):
        end = data.draw(st.integers(at + 1, len(text)))
        pieces += parser.add(text[at:end])
        at = end
    assert joined(pieces + parser.flush()) == whole
    for call in collect(whole).calls:
        assert call.name in NAMES and isinstance(json.loads(call.arguments), dict)


@settings(max_examples=300, deadline=None)
@given(style=st.sampled_from(STYLES), text=answers)
def test_without_calls_no_letter_is_lost(style: AnswerStyle, text: str) -> None:
    found = parsed(style, text)
    if not found.calls and not style.thinks:
        assert found.content == text
    assert parsed(AnswerStyle(style.calls), text, names=()).content == text


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=3),
    st.sampled_from([("hermes", '<tool_call>\n{{"name": "time", "arguments": {}}}\n</tool_call>'),
                     ("llama3", '{{"name": "time", "parameters": {}}}')]),
)  # fmt: skip
def test_arguments_are_those_that_the_model_wrote(arguments: dict[str, Any], notation: tuple[Any, str]) -> None:
    style, layout = notation
    found = parsed(AnswerStyle(style), *layout.format(json.dumps(arguments, ensure_ascii=False)))
    assert [json.loads(call.arguments) for call in found.calls] == [arguments]


def test_content_does_not_wait_unless_it_may_begin_a_call() -> None:
    parser = AnswerParser(HERMES, NAMES)
    assert parser.add("One ") == [Piece("content", "One")]
    assert parser.add("two") == [Piece("content", " two")]
    assert parser.add(" <tool") == []
    assert parser.add("box>") == [Piece("content", " <toolbox>")]
    parser = AnswerParser(LLAMA3, NAMES)
    assert parser.add('{"n') == []
    assert parser.add("umber") == [Piece("content", '{"number')]
    assert parser.add("s") == [Piece("content", "s")]


def test_a_call_streams_its_name_then_its_arguments() -> None:
    parser = AnswerParser(HERMES, NAMES)
    assert parser.add('<tool_call>{"name": "weather", "arguments": ') == []
    assert parser.add('{"ci') == [Piece("call", "weather"), Piece("arguments", '{"ci')]
    assert parser.add('ty": "Bonn"') == [Piece("arguments", 'ty": "Bonn"')]
    assert parser.add("}") == [Piece("arguments", "}")]
    assert parser.add("}\n</tool_call>") == parser.flush() == []


def test_a_call_that_breaks_while_it_streams_is_told_and_comes_as_text() -> None:
    parser = AnswerParser(HERMES, NAMES)
    text = '<tool_call>{"name": "weather", "arguments": {"city": Bonn}'
    pieces = parser.add(text) + parser.add(f"}}</tool_call>{CALL}")
    assert [(piece.kind, piece.index) for piece in pieces if piece.kind != "content"] == [
        ("call", 0), ("arguments", 0), ("broken", 0), ("call", 1), ("arguments", 1),
    ]  # fmt: skip
    assert collect(pieces) == said(text + "}</tool_call>", WEATHER)


# --- the template decides


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, AnswerStyle("hermes")),
        (LLAMA, AnswerStyle("llama3")),
        ("{{ messages[0].content }}", AnswerStyle()),
        # Tools that are listed, and calls in no known notation.
        ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}", AnswerStyle()),
        (LLAMA.replace("""head + '{"name": "'""", """head + '[TOOL_CALLS] {"name": "'"""), AnswerStyle()),
        (LLAMA.replace("tools and", "false and"), AnswerStyle()),
        (QWEN + "{% if x %}<think></think>{% endif %}", AnswerStyle("hermes", thinks=True)),
        (QWEN + "{% if x %}</think>{% else %}{{ '<think>\n' }}{% endif %}", AnswerStyle("hermes", True, True)),
    ],
)
def test_the_chat_template_tells_how_answers_are_written(template: str, expected: AnswerStyle) -> None:
    assert tokenizer(template).answer_style() == expected


def test_template_options_tell_whether_the_answer_begins_inside_its_reasoning() -> None:
    template = QWEN + "{% if enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    assert tokenizer(template).answer_style({"enable_thinking": True}).thinking
    assert not tokenizer(template).answer_style({"enable_thinking": False}).thinking


def test_without_a_template_answers_are_text() -> None:
    assert tokenizer(None).answer_style() == AnswerStyle()


# --- prompts with calls

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def conversation(arguments: object) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "no"},
    ]


@pytest.mark.parametrize("arguments", ['{"city": "Zürich", "days": [1, 2]}', {"city": "Zürich", "days": [1, 2]}])
def test_a_conversation_with_a_call_renders_as_qwen_was_trained(arguments: object) -> None:
    prompt = tokenizer(QWEN).apply_chat_template(conversation(arguments), tools=TOOLS)
    assert json.dumps(TOOLS[0]) in prompt
    assert prompt.endswith(
        "<|im_start|>user\nRain?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nno\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("arguments", ['{"city": "Zürich", "days": [1, 2]}', {"city": "Zürich", "days": [1, 2]}])
def test_a_conversation_with_a_call_renders_in_the_notation_of_llama(arguments: object) -> None:
    prompt = tokenizer(LLAMA).apply_chat_template(conversation(arguments), tools=TOOLS)
    assert prompt.endswith(
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{BARE}<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\nno<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("arguments", ['{"a":"é"}', {"a": "é"}])
def test_a_template_that_joins_texts_gets_a_text(arguments: object) -> None:
    joins = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + ':' + c.function.arguments }}"
        "{% endfor %}{% endfor %}"
    )
    assert tokenizer(joins).apply_chat_template(conversation(arguments)) == 'weather:{"a": "é"}'


@pytest.mark.parametrize("arguments", ["", None, {}, "{}", " "])
def test_no_arguments_are_an_empty_object(arguments: object) -> None:
    assert '"arguments": {}' in tokenizer(QWEN).apply_chat_template(conversation(arguments))


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', 3, [1], "{'a': 1}", '{"a":' * 20000])
def test_arguments_that_are_no_object_are_input_errors(arguments: object) -> None:
    for make in (tokenizer(QWEN).apply_chat_template, tokenizer(QWEN).encode_chat):
        with pytest.raises(InputError, match=r"message 1, tool call 0 has arguments .*JSON object"):
            make(conversation(arguments))


@pytest.mark.parametrize(
    "calls", [[{}], ["f"], [{"function": {}}], [{"function": "f"}], {"function": {"name": "f"}}, 1]
)
def test_calls_of_another_shape_are_input_errors(calls: object) -> None:
    with pytest.raises(InputError, match="message 0"):
        tokenizer(QWEN).apply_chat_template([{"role": "assistant", "content": "", "tool_calls": calls}])


@pytest.mark.parametrize("template", [QWEN, LLAMA])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eot_id|>"])
def test_arguments_cannot_end_a_turn(template: str, mark: str) -> None:
    own = tokenizer(template)
    special = own.encode(mark)[0]
    plain = own.encode_chat(conversation('{"a": ""}')).count(special)
    for text in (json.dumps({"a": mark}), json.dumps({"a": mark}).replace("<", "\\u003c")):
        ids = own.encode_chat(conversation(text))
        assert ids.count(special) == plain
        assert mark in own.decode(ids)


# --- marks that are special tokens


@pytest.mark.parametrize(
    ("template", "answer"), [(LLAMA, f"<|python_tag|>{BARE}<|eot_id|>"), (QWEN, f"{CALL}<|im_end|>")]
)
def test_marks_of_calls_are_shown_where_calls_are_expected(template: str, answer: str) -> None:
    own = tokenizer(template, special_call=True)
    ids = own.encode(answer, add_special_tokens=False)
    for calls, expected in ((True, said("", WEATHER)), (False, None)):
        detokenizer = own.detokenizer(calls=calls)
        texts = [*(detokenizer.add(token) for token in ids), detokenizer.flush()]
        if calls:
            assert parsed(own.answer_style(), *texts) == expected
            assert "".join(texts) == answer.replace("<|eot_id|>", "").replace("<|im_end|>", "")
        else:
            assert "".join(texts) == own.decode(ids)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"template_options": {"tools": TOOLS}}, True),
        ({}, False),
        ({"template_options": {"tools": []}}, False),
    ],
)
def test_engines_show_the_marks_where_a_request_has_tools(options: dict[str, Any], shown: bool) -> None:
    own = tokenizer(LLAMA)
    said_ids = own.encode(f"<|python_tag|>{BARE}<|eot_id|>", add_special_tokens=False)
    begin = len(own.encode_chat([{"role": "user", "content": "Rain?"}], **options.get("template_options", {})))

    def logits(prefix: tuple[int, ...]) -> Any:
        return (
            np.eye(own.vocab_size, dtype=np.float32)[said_ids[min(max(len(prefix) - begin, 0), len(said_ids) - 1)]] * 10
        )

    engine = Engine(ScriptedTarget(logits), None, own, stop_tokens=own.encode("<|eot_id|>"))
    text = "".join(chunk.text for chunk in engine.stream([{"role": "user", "content": "Rain?"}], **options))
    assert text == ("<|python_tag|>" * shown) + BARE
