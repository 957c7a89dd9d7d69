"""A chat template cannot take the machine: what it may compute, hold and print is bounded, in any thread."""

from __future__ import annotations

import resource
import threading
from time import thread_time
from typing import Any

import pytest

from dovetail.runtime.errors import InputError
from dovetail.runtime.text import template_limits
from dovetail.runtime.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "Hello"}]


def render(template: str, messages: list[dict[str, Any]] = USER) -> str:
    return ChatTemplate(template, {}).render(messages, add_generation_prompt=True)


def doubled(start: str, step: str, shown: str = "n.v") -> str:
    """A template in which a value is made twice as large, sixty times."""
    return (
        f"{{% set n = namespace(v={start}, w={start}) %}}{{% for i in range(60) %}}"
        f"{{% set n.v = {step.replace('V', 'n.v')} %}}{{% set n.w = {step.replace('V', 'n.w')} %}}{{% endfor %}}"
        f"{{{{ {shown} }}}}"
    )


HOSTILE = {
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop recursion": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "break outside": "{% break %}",
    "continue outside": "{% macro m() %}{% continue %}{% endmacro %}{{ m() }}",
    "nested blocks": "{% if 1 %}" * 200 + "x" + "{% endif %}" * 200,
    "nested loops": "{% for a in [1] %}" * 200 + "x" + "{% endfor %}" * 200,
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "attributes": "{{ messages" + ".a" * 50_000 + " }}",
    "long source": "x" * 2**20,
    "repeat": "{{ 'A' * 10**13 }}",
    "repeat folded": "{{ 'A' * 10000000000000 }}",
    "repeat left": "{{ 10**13 * 'A' }}",
    "repeat list": "{{ [1] * 10**11 }}",
    "repeat texts": "{{ [[messages[0].content * 100000] * 100000] * 100000 }}",
    "printf": "{{ '%2000000000d' % 1 }}",
    "printf precision": "{{ '%.2000000000f' % 1 }}",
    "printf star": "{{ '%*d' % (2000000000, 1) }}",
    "printf key": "{{ '%(a)2000000000d' % {'a': 1} }}",
    "printf filter": "{{ '%2000000000d' | format(1) }}",
    "format": "{{ '{:2000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "format map": "{{ '{a:2000000000}'.format_map({'a': 1}) }}",
    "power": "{{ 9**(9**9) }}",
    "power tower": doubled("9", "V * V"),
    "doubled by ~": doubled("'ab'", "V ~ V"),
    "doubled by +": doubled("'ab'", "V + V"),
    "doubled by join": doubled("'ab'", "[V, V] | join"),
    "doubled by replace": doubled("'ab'", "V.replace('a', 'aab')"),
    "doubled by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + doubled("'ab'", "m(V)"),
    "doubled by format": doubled("'ab'", "'{0}{0}'.format(V)"),
    "doubled list": doubled("['ab']", "[V, V]"),
    "doubled list compared": doubled("['ab']", "[V, V]", "n.v == n.w"),
    "doubled list as json": doubled("['ab']", "[V, V]", "n.v | tojson"),
    "joined": "{{ ([messages[0].content * 100000] * 1000) | join('x' * 100000) }}",
    "joined by a method": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "replaced": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replaced nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(10000) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 100000}) }}",
    "bytes": "{{ (1).to_bytes(10000000000) }}",
    "indent": "{{ ('\\n' * 100000) | indent(10000) }}",
    "json indent": "{{ ([1] * 100000) | tojson(indent=10000) }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "lorem": "{{ lipsum(n=1000000) }}",
    "range": "{% for i in range(10**18) %}x{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "loops that keep nothing": "{% set l = range(99999) | list %}"
    "{% for a in l %}{% for b in l if b < 0 %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "output of a variable": "{% set x = 'x' * 1000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
    "output kept": "{% set y %}{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}{% endset %}{{ y | length }}",
    "infinity": "{{ 1e400 | int }}{{ (1e400).as_integer_ratio() }}",
    "unbound": "{% set n = n.x.y %}{{ n }}",
    "include": "{% include 'a' %}",
}  # fmt: skip


@pytest.fixture
def little_memory():
    """Half a GB more than the process has: what asks for more fails, rather than the machine."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_asks_for_too_much_is_one_line(
    template: str, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1.0)
    began = thread_time()
    with pytest.raises(InputError, match="chat template") as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value.__cause__, MemoryError)
    assert thread_time() - began < 8  # the slowest of them compiles for long


def test_the_limits_hold_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1.0)
    found: list[str] = []

    def ask() -> None:
        try:
            render(HOSTILE["loops over a list"])
        except InputError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all("more than 1 seconds" in each for each in found)


def test_a_stopped_template_can_be_rendered_again() -> None:
    template = ChatTemplate("{{ 'A' * (messages[0].content | int) }}", {})
    with pytest.raises(InputError, match="too much text"):
        template.render([{"role": "user", "content": "9" * 12}], add_generation_prompt=True)
    assert template.render([{"role": "user", "content": "3"}], add_generation_prompt=True) == "AAA"


ORDINARY = [
    ("{{ 'ab' * 3 + 'c' }}", "abababc"),
    ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
    ("{{ 2 ** 10 }} {{ 7 % 4 }} {{ '%5.1f|%s' % (1.25, 'x') }}", "1024 3   1.2|x"),
    ("{{ '{:>4}|{a}'.format(1, a=2) }}", "   1|2"),
    ("{{ [1, 2] + [3] }} {{ [0] * 2 }}", "[1, 2, 3] [0, 0]"),
    ("{{ 'a b c'.split(' ') | join('-') }} {{ ','.join(['a', 'b']) }}", "a-b-c a,b"),
    ("{{ ['b', 'a'] | sort | map('upper') | join }} {{ [1, 2] | sum }}", "AB 3"),
    ("{{ 'a\nb' | indent(2) }} {{ 'x' | center(3) }}|{{ 'xx' | replace('x', 'yz') }}", "a\n  b  x |yzyz"),
    ("{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% endfor %}", "1/2:1 2/2:3 "),
    ("{% for x in [] %}a{% else %}none{% endfor %}", "none"),
    ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
    ("{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
    ("{% macro m(a, b='c') %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(2) %}d{% endcall %}", "2cd"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
    ("{{ 1 < 2 < 3 }} {{ 'ell' in messages[0].content }} {{ 'x' not in [1] }}", "True True True"),
    ("{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.role %}{% endfor %}{{ n.t }}", "user"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "expected"), ORDINARY)
def test_ordinary_expressions_are_as_without_limits(template: str, expected: str) -> None:
    assert render(template) == expected


def test_long_conversations_are_within_the_limits() -> None:
    """Two thousand turns, 4 million characters, in a template that reads all turns again at each."""
    template = (
        "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content | trim %}"
        "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{{ messages[loop.index0].role | length }}"
        "{{ messages | length if loop.index == n.last }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 400} for _ in range(2000)]
    assert len(render(template, messages)) > 4_000_000 - 2000
