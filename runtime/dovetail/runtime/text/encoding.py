"""Prompts to token ids: a text, the messages of a conversation, or ids that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.files import parse_json

Message = Mapping[str, Any]  # {"role": str, "content": str or list of {"type": "text", "text": str}, ...}
Prompt = str | Sequence[Message] | Sequence[int]  # text, a conversation, or token ids


class Detokenizer(Protocol):
    """Tokens to text. All results of `add` and the final `flush` together are the text."""

    def add(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class TextTokenizer(Protocol):
    """The methods of a tokenizer that an Engine needs."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False, **options: Any) -> list[int]: ...
    def has_token(self, token_id: int) -> bool: ...
    def detokenizer(self, *, calls: bool = False) -> Detokenizer: ...


def encode_prompt(
    tokenizer: TextTokenizer, prompt: Prompt, raw: bool, template_options: Mapping[str, Any] | None, parse_special: bool
) -> list[int]:
    """Return the ids of `prompt`. Arguments: see Engine.stream. Raises InputError."""
    options = _check_options(template_options)
    text, templated = isinstance(prompt, str), tokenizer.has_chat_template
    ids = not text and _all_ids(prompt)
    if options and (ids or raw or not templated):
        raise InputError("template options need messages and a chat template: leave them out")
    if isinstance(prompt, str):
        if raw or not templated:
            return tokenizer.encode(prompt)
        if not prompt.strip():
            raise InputError("the prompt is empty: give some text")
        prompt = [{"role": "user", "content": prompt}]
    elif ids:
        return _check_ids(tokenizer, prompt)
    if raw:
        raise InputError("raw=True takes the prompt as it is: give a string or token ids, not messages")
    if not templated:
        raise InputError("this target has no chat template: give the prompt as a string, not as messages")
    return tokenizer.encode_chat(check_messages(prompt), parse_special=parse_special, **options)


def _check_ids(tokenizer: TextTokenizer, prompt: Sequence[Any]) -> list[int]:
    tokens = [int(token) for token in prompt]
    for token in tokens:
        if not tokenizer.has_token(token):
            raise InputError(f"token id {token} is none of the target's: give ids of its tokenizer")
    return tokens


def _all_ids(prompt: object) -> bool:
    """Whether a prompt is token ids; an empty one is none."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | str):
        return bool(prompt) and all(isinstance(each, Integral) and not isinstance(each, bool) for each in prompt)
    return False


def _check_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InputError(f'template options {options!r:.60} cannot be used: give e.g. {{"enable_thinking": False}}')
    if taken := {"messages", "parse_special", "self"} & options.keys():
        raise InputError(f"template option {min(taken)!r} cannot be set: leave it out")
    return options


def check_messages(messages: object) -> Sequence[Message]:
    """Return `messages`. Raises InputError unless each has a role, and a content or tool calls.

    A template renders a missing content as nothing, without an error.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is a {type(messages).__name__}: pass a list of {{'role': ..., 'content': ...}}")
    if not messages:
        raise InputError("messages is empty: pass at least one {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {index} is a {type(message).__name__}: pass {{'role': ..., 'content': ...}}")
        if not isinstance(message.get("role"), str):
            raise InputError(f"message {index} has no role: add 'role': 'user', 'assistant' or 'system'")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise InputError(f"message {index} (role {message['role']!r}) has no content: add 'content'")
        if not isinstance(content, str | list | tuple | None):
            raise InputError(f"message {index} has a content of type {type(content).__name__}: pass a string")
        if isinstance(content, list | tuple):
            _check_parts(index, content)
        if message.get("tool_calls"):
            _check_calls(index, message["tool_calls"])
    return messages


def with_objects(messages: Sequence[Message]) -> list[Message]:
    """Return checked `messages` with the arguments of tool calls as objects.

    OpenAI's clients send arguments as a JSON text, and chat templates expect an object.
    """
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object(call["function"])}
    return {**call, "arguments": arguments_of(call)}


def arguments_of(function: Mapping[str, Any]) -> object:
    """Return the value of a function's arguments, {} for none. Raises ValueError for no JSON, NaN and infinity."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return parse_json(arguments, finite=True) if arguments.strip() else {}
    return {} if arguments is None else arguments


def _check_calls(index: int, calls: object) -> None:
    if not isinstance(calls, list | tuple):
        raise InputError(f"message {index} has tool_calls of type {type(calls).__name__}: pass a list")
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"message {index}, tool call {number} names no function: "
                "pass {'function': {'name': ..., 'arguments': ...}}"
            )
        arguments, reason = None, ""
        try:
            arguments = arguments_of(function)
        except ValueError as error:
            reason = f" ({error})"
        if not isinstance(arguments, Mapping):
            raise InputError(
                f"message {index}, tool call {number} has arguments {function.get('arguments')!r:.60}{reason}: "
                "pass the text of a JSON object"
            )


def _check_parts(index: int, parts: Sequence[object]) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InputError(f"message {index} has a part of type {kind!r}: pass text parts only")
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise InputError(f"message {index} has a part without text: pass {{'type': 'text', 'text': ...}}")
