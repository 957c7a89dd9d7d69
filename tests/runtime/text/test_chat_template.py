"""Chat templates render messages, and bad messages are one typed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.runtime.text.backends import CHATML, byte_level, write_folder

from dovetail.runtime.errors import InputError
from dovetail.runtime.text.tokenizer import Tokenizer


def with_template(template: str | None, **special_tokens: str) -> Tokenizer:
    return Tokenizer(byte_level().to_str().encode(), special_tokens=special_tokens, chat_template=template)


USER = [{"role": "user", "content": "Hello"}]


def test_template_ends_where_the_assistant_begins() -> None:
    tokenizer = with_template(CHATML)
    assert tokenizer.apply_chat_template(USER) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    assert tokenizer.encode_chat(USER) == tokenizer.encode(tokenizer.apply_chat_template(USER))


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": "old"})
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(USER) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(USER) == "new"


def test_of_several_templates_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config={"chat_template": named}))
    assert tokenizer.apply_chat_template(USER) == "plain"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{{ messages | length }}{% endgeneration %}b", "a1b"),
        ("{% if tools is none %}no tools{% endif %}", "no tools"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ custom }}", "kept"),
    ],
)
def test_templates_find_what_checkpoints_expect(template: str, expected: str) -> None:
    assert with_template(template, bos_token="<s>").apply_chat_template(USER, custom="kept") == expected


@pytest.mark.parametrize(
    "messages",
    [
        "Hello",
        {"role": "user", "content": "Hello"},
        [],
        ["Hello"],
        [{"content": "Hello"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
    ],
)
def test_messages_of_another_shape_are_input_errors(messages: Any) -> None:
    with pytest.raises(InputError, match="message"):
        with_template("{{ messages }}").apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('unknown role ' + messages[0].role) }}",
        "{{ messages[7]['content'] + 'x' }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.no.such }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% if %}",
        "{{ 'a' | nosuchfilter }}",
    ],
)
def test_what_a_template_refuses_is_one_line_of_input_error(template: str) -> None:
    with pytest.raises(InputError, match="chat template") as caught:
        with_template(template).apply_chat_template(USER)
    assert "\n" not in str(caught.value)


def test_no_template_is_an_input_error_with_the_remedy() -> None:
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="raw=True"):
        tokenizer.apply_chat_template(USER)


PARTS: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
READS_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}<{{ p.text | trim }}>{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
READS_PARTS_ALONE = "{% for m in messages %}{% for p in m['content'] %}<{{ p['text'] }}>{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        ("{{ messages[0].content }}", PARTS[0]["content"], "hi"),
        ("{{ messages[0]['content'] + '!' }}", PARTS[0]["content"], "hi!"),
        ("{{ messages[0].content | trim }}", PARTS[0]["content"] * 2, "hi\nhi"),
        ("{{ messages[0].content | tojson }}", PARTS[0]["content"], '"hi"'),
        (READS_PARTS, PARTS[0]["content"] * 2, "user:<hi><hi>"),
        (READS_PARTS, "hi", "user:hi"),
        (READS_PARTS_ALONE, PARTS[0]["content"], "<hi>"),
        (READS_PARTS_ALONE, "hi", "<hi>"),
        ("{{ messages[0].content }}", [], ""),
    ],
)
def test_parts_of_a_content_are_its_text(template: str, content: Any, expected: str) -> None:
    assert with_template(template).apply_chat_template([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize(
    ("part", "named"),
    [({"type": "image_url", "image_url": {}}, "'image_url'"), ("hi", "'str'"), ({"type": "text"}, "without text")],
)
def test_parts_that_are_no_text_are_input_errors(part: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        with_template(CHATML).apply_chat_template([{"role": "user", "content": [part]}])


def test_tool_calls_may_stand_for_a_content() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert with_template("{{ messages[0].tool_calls | length }}").apply_chat_template(call) == "1"
