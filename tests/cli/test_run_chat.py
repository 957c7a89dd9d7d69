"""`chat`: the conversation grows turn by turn, slash commands work, and nothing but leaving ends it."""

from __future__ import annotations


def talk(invoke, pair, opener, *lines: str, args: tuple[str, ...] = ()):
    text = "".join(f"{line}\n" for line in lines)
    return invoke("chat", "--pair", str(pair), "-n", "10", *args, obj=opener, input=text)


def roles(asked) -> list[tuple[str, ...]]:
    return [tuple(message["role"] for message in prompt) for prompt, _ in asked]


def test_each_turn_sees_those_before_it(invoke, pair, opener) -> None:
    result = talk(invoke, pair, opener, "Hello", "", "And then?")
    assert result.exit_code == 0, result.output
    asked = opener.engine.asked
    assert roles(asked) == [("user",), ("user", "assistant", "user")]
    answers = [message["content"] for message in asked[1][0] if message["role"] == "assistant"]
    assert result.stdout.startswith(answers[0]) and len(answers[0]) == 10


def test_reset_forgets_all_but_the_system_message(invoke, pair, opener) -> None:
    result = talk(invoke, pair, opener, "Hello", "/reset", "Again", args=("--system", "Be brief"))
    assert roles(opener.engine.asked) == [("system", "user"), ("system", "user")]
    assert "(forgotten)" in result.stderr


def test_stats_tell_of_the_last_answer(invoke, pair, opener) -> None:
    result = talk(invoke, pair, opener, "/stats", "Hello", "/stats")
    assert "(no answer yet)" in result.stderr and "[10 tokens, " in result.stderr


def test_help_and_unknown_commands_list_the_commands(invoke, pair, opener) -> None:
    result = talk(invoke, pair, opener, "/help", "/quit")
    assert result.stderr.count("/reset forgets") == 3  # at the start, and for each
    assert "/quit is no command" in result.stderr and opener.engine.asked == []


def test_exit_leaves_at_once(invoke, pair, opener) -> None:
    assert talk(invoke, pair, opener, "/exit", "Hello").exit_code == 0
    assert opener.engine.asked == []


def test_ctrl_c_stops_the_answer_and_the_next_one_works(invoke, pair, opener, interrupted_opener) -> None:
    stopped = interrupted_opener(20)
    result = talk(invoke, pair, stopped, "Hello", "Again")
    assert result.exit_code == 0 and "(stopped)" in result.stderr
    (_, _), (again, _) = stopped.engine.asked
    partial = again[1]["content"]
    whole = opener.engine.generate([{"role": "user", "content": "Hello"}], 10).text
    assert again[1]["role"] == "assistant" and whole.startswith(partial) and len(partial) < 10
    assert result.stdout == f"{partial}\n{opener.engine.generate(again, 10).text}\n"


def test_an_error_is_told_and_leaves_the_conversation_as_it_was(invoke, pair, make_opener) -> None:
    opener = make_opener(max_context=40)
    result = talk(invoke, pair, opener, "Hello", "word " * 20, "x")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("error: ") == 1
    assert roles(opener.engine.asked)[-1] == ("user", "assistant", "user")


def test_bad_flags_are_told_before_anything_is_opened(invoke, pair, opener) -> None:
    result = talk(invoke, pair, opener, args=("--top-p", "0"))
    assert result.exit_code == 2 and "top_p 0" in result.stderr and opener.calls == []


def test_earlier_conversations_are_kept_when_asked_for(invoke, pair, opener) -> None:
    for args, kept in ((("--lookup-cache", "5000"), 5000), ((), 0)):
        assert talk(invoke, pair, opener, "Hello", "/reset", "Hello", args=args).exit_code == 0
        assert opener.calls[-1][1]["lookup_cache"] == kept
    for bad, words in (
        (("--lookup-cache", "-1"), "lookup_cache -1 is out of range"),
        (("--lookup-cache", "5000", "--lookup", "0"), "--lookup-cache continues repeated text"),
    ):
        refused = talk(invoke, pair, opener, args=bad)
        assert refused.exit_code == 2 and words in refused.stderr and len(opener.calls) == 2
