"""Render chat templates: messages in, one prompt string out.

The environment is that of transformers, for which checkpoints' templates are written. `tojson`
keeps Unicode and HTML characters. `{% generation %}` blocks, which mark training targets in
transformers, render their body. `template_limits` bounds the cost of a rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser

from dovetail.runtime.errors import InputError, one_line
from dovetail.runtime.text.encoding import Message, check_messages
from dovetail.runtime.text.template_limits import LimitedEnvironment, TemplateLimit

# Exceptions from an expression in a template that expects messages of another shape.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
_LIMITS = (TemplateLimit, RecursionError, MemoryError)
_PROBE = "dovetail"  # the probes below look for this content in the rendered text


class ChatTemplate:
    """One compiled template. `variables`: special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile `source` (Jinja). Raises InputError if the template is not valid."""
        self._variables = dict(variables)
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise InputError(
                f"the chat template cannot be compiled ({one_line(error)}): "
                "correct chat_template.jinja, or pass raw text"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **kwargs: Any) -> str:
        """Return the prompt for `messages`. kwargs: for the template. Raises InputError."""
        check_messages(messages)
        turns = [self._as_it_takes(message) for message in messages]
        return self._render(turns, add_generation_prompt=add_generation_prompt, **kwargs)

    def _as_it_takes(self, message: Message) -> dict[str, Any]:
        """Return `message` with the content that the template reads: a text or a list of parts.

        Several texts become lines of one text.
        """
        content, takes_text = message.get("content"), self._takes_text
        if isinstance(content, str) and not takes_text:
            content = [{"type": "text", "text": content}]
        elif isinstance(content, list | tuple) and not (content and self._takes_parts):
            content = "\n".join(part["text"] for part in content)
        return {**message, "content": content} if "content" in message else dict(message)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads the text of a list of parts instead of printing the list."""
        shown = self._probe([{"type": "text", "text": _PROBE}])
        return _PROBE in shown and "'type'" not in shown and '"type"' not in shown

    @cached_property
    def _takes_text(self) -> bool:
        """Whether a content may be a plain text. Some templates read only lists of parts."""
        return _PROBE in self._probe(_PROBE) or not self._takes_parts

    def _probe(self, content: object) -> str:
        try:
            return self._render([{"role": "user", "content": content}], add_generation_prompt=True)
        except InputError as error:
            if isinstance(error.__cause__, _LIMITS):
                raise
            return ""

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        variables = {"tools": None, "documents": None, **self._variables, "messages": messages, **kwargs}
        try:
            return self._environment.render(self._template, variables)
        except _LIMITS as error:
            raise InputError(
                f"the chat template is stopped ({one_line(error)}): correct chat_template.jinja, or pass raw text"
            ) from error
        except _TEMPLATE_FAILURES as error:
            raise InputError(
                f"the chat template refuses these messages ({one_line(error)}): use other roles or contents"
            ) from error


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a mutable set

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.meter_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
