"""`generate`: where the prompt comes from, what reaches the engine, what is printed, and every way to be refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from dovetail.runtime.pair.known import REFERENCE_PAIRS
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.text.prompts import read_text
from dovetail.runtime.tree.limits import TreeLimits

KEYS = {
    "text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "tokens_per_second", "acceptance_length",
    "rounds", "prefill_ms", "draft_ms", "verify_ms", "other_ms", "target_device", "drafter_device",
}  # fmt: skip
STATISTICS = re.compile(
    r"\[(\d+) tokens, [\d.]+ tok/s, acceptance length ([\d.]+) over (\d+) rounds \| prefill \d+ ms, draft \d+ ms, "
    r"verify \d+ ms, other \d+ ms \| target scripted, drafter scripted\]\n"
)


def ask(invoke, pair: Path, opener, *args: str, input: str | bytes | None = None):
    return invoke(*args, "--pair", str(pair), obj=opener, input=input)


def test_text_streams_to_stdout_and_statistics_to_stderr(invoke, pair, opener) -> None:
    result = ask(invoke, pair, opener, "Hello", "-n", "40")
    assert result.exit_code == 0, result.output
    assert result.stdout == opener.engine.generate("Hello", 40).text + "\n"
    found = STATISTICS.fullmatch(result.stderr)
    assert found is not None
    tokens, length, rounds = found.groups()
    assert int(tokens) == 40 and float(length) == pytest.approx(1 + (39 - int(rounds)) / int(rounds), abs=0.05)


def test_json_is_one_object_with_the_same_answer(invoke, pair, opener) -> None:
    result = ask(invoke, pair, opener, "Hello", "-n", "40", "--json")
    answer = json.loads(result.stdout)
    assert set(answer) >= KEYS | {"seed", "accepted_per_position"}
    assert answer["text"] + "\n" == ask(invoke, pair, opener, "Hello", "-n", "40").stdout
    assert (answer["new_tokens"], len(answer["token_ids"]), answer["finish_reason"]) == (40, 40, "length")
    assert result.stderr == ""


def test_plain_decoding_gives_the_same_text_and_names_no_drafter(invoke, pair, opener) -> None:
    speculative = json.loads(ask(invoke, pair, opener, "Hello", "-n", "40", "--json").stdout)
    plain = json.loads(ask(invoke, pair, opener, "Hello", "-n", "40", "--json", "--no-speculate").stdout)
    assert plain["token_ids"] == speculative["token_ids"]
    assert plain["drafter_device"] is None and plain["acceptance_length"] == 1 < speculative["acceptance_length"]


def test_a_seed_is_reported_and_repeats_the_text(invoke, pair, opener) -> None:
    first = json.loads(ask(invoke, pair, opener, "Hello", "-n", "20", "--temp", "1", "--json").stdout)
    again = json.loads(
        ask(invoke, pair, opener, "Hello", "-n", "20", "--temp", "1", "--json", "-s", str(first["seed"])).stdout
    )
    assert again["text"] == first["text"] and again["seed"] == first["seed"]


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (["two\nlines"], None),
        (["generate", "two\nlines"], None),
        (["--", "two\nlines"], None),
        (["-"], "two\nlines\n"),
        ([], "two\nlines\n"),
        (["--file", "prompt.txt"], None),
    ],
)
def test_the_prompt_comes_from_anywhere(
    invoke, pair, opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], given: str | None
) -> None:
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    monkeypatch.chdir(tmp_path)
    front, rest = (args[:1], args[1:]) if args[:1] == ["generate"] else ([], args)
    result = invoke(*front, "--pair", str(pair), "-n", "2", *rest, obj=opener, input=given)
    assert result.exit_code == 0, result.output
    assert opener.engine.asked[0][0] == "two\nlines"


@pytest.mark.parametrize("content", [b"two\r\nlines\r\n", b"\xef\xbb\xbftwo\nlines", b"two\rlines\n"])
def test_files_and_pipes_are_read_as_benchmark_prompts_are(
    invoke, pair, opener, tmp_path: Path, content: bytes
) -> None:
    """Without a byte order mark, and with one kind of line break."""
    (tmp_path / "prompt.txt").write_bytes(content)
    assert ask(invoke, pair, opener, "-n", "2", "--file", str(tmp_path / "prompt.txt")).exit_code == 0
    assert ask(invoke, pair, opener, "-n", "2", input=content).exit_code == 0
    assert [prompt for prompt, _ in opener.engine.asked] == ["two\nlines"] * 2


def test_token_ids_can_be_the_prompt(invoke, pair, opener) -> None:
    assert ask(invoke, pair, opener, "[1, 2, 3]", "--token-ids", "-n", "2").exit_code == 0
    assert ask(invoke, pair, opener, "--token-ids", "-n", "2", input="[4]\n").exit_code == 0
    assert [prompt for prompt, _ in opener.engine.asked] == [[1, 2, 3], [4]]
    assert ask(invoke, pair, opener, "[99]", "--token-ids", "-n", "2").stderr.startswith("error: token id 99 is none")


def test_a_raw_prompt_reaches_the_engine_as_such(invoke, pair, opener) -> None:
    assert ask(invoke, pair, opener, "Hello", "-n", "2", "--raw").exit_code == 0
    assert opener.engine.asked[0][1]["raw"] is True


def test_a_command_word_can_be_a_prompt(invoke, pair, opener) -> None:
    assert ask(invoke, pair, opener, "generate", "chat", "-n", "3").exit_code == 0
    assert opener.engine.asked[0][0] == "chat"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upload"], "no such command 'upload': the commands are bench, chat"),
        (["lsit"], "no such command 'lsit': the commands are bench, chat"),
        (["inspct", "--json"], "no such command 'inspct': did you mean inspect?"),
        (["list-pairs"], "no such command 'list-pairs'"),
        (["why", "is", "the", "sky", "blue"], "A prompt of one word goes to dovetail-run generate, others need quotes"),
    ],
)
def test_a_word_that_looks_like_a_command_is_no_prompt(invoke, opener, words: list[str], said: str) -> None:
    """The first answer would cost the building of a pair."""
    result = invoke(*words, obj=opener)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr and opener.calls == []


@pytest.mark.parametrize("prompt", ["Hello", "hi!", "two words", "2", "a,b", "-"])
def test_other_words_are_prompts(invoke, pair, opener, prompt: str) -> None:
    assert invoke(prompt, "--pair", str(pair), "-n", "2", obj=opener, input="typed").exit_code == 0
    assert opener.engine.asked[0][0] == ("typed" if prompt == "-" else prompt)


@pytest.mark.parametrize("arguments", [["a\0b"], ["\udcff"], ["bench", "--prompts", "p.jsonl", "-o", "\udce9.json"]])
def test_an_argument_that_is_no_text_is_one_line(invoke, opener, arguments: list[str]) -> None:
    result = invoke(*arguments, obj=opener)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "is no valid text" in result.stderr and opener.calls == []


def test_the_end_of_a_file_is_no_interrupt(invoke, pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise EOFError

    result = invoke("Hello", "--pair", str(pair), obj=cut_off)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: a file ends too early: copy or build it again"


def test_every_sampling_flag_reaches_the_engine(invoke, pair, opener) -> None:
    flags = "-n 7 --temp 0.5 --top-k 9 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.2 -s 4 --stop AB --stop CD"
    flags += " --presence-penalty 0.5 --frequency-penalty -0.25 --logit-bias 7=-100 --logit-bias 3=1.5"
    template = ["--chat-template-kwargs", '{"enable_thinking": false}', "--parse-special"]
    assert ask(invoke, pair, opener, "Hello", *flags.split(), *template, "--no-speculate").exit_code == 0
    assert opener.engine.asked == [
        ("Hello", {
            "max_new_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1,
            "repetition_penalty": 1.2, "seed": 4, "stop": ("AB", "CD"), "raw": False, "speculate": False,
            "template_options": {"enable_thinking": False}, "parse_special": True, "presence_penalty": 0.5,
            "frequency_penalty": -0.25, "logit_bias": ((7, -100.0), (3, 1.5)), "constraint": None,
        })
    ]  # fmt: skip


def test_every_engine_flag_reaches_the_opener(invoke, pair, opener) -> None:
    flags = "-t 3 --drafter-device auto --vram 3GB --fit --width 5 --tree-top-k 1 --gpu-layers auto -n 2"
    assert ask(invoke, pair, opener, "Hello", *flags.split()).exit_code == 0
    tree = TreeLimits(width=5, depth=TreeLimits().depth, top_k=1)  # depth is the pair's
    device = {
        "drafter_device": "auto",
        "vram": 3 * 10**9,
        "fit": True,
        "threads": 3,
        "ov_config": {},
        "exact": True,
        "max_slowdown": 0.01,
        "draft_model": None,
        "gpu_layers": "auto",
        "lookup_cache": 0,
    }
    assert opener.calls == [(pair, {**device, "tree": tree})]


def test_without_flags_the_pair_decides(invoke, pair, opener) -> None:
    ask(invoke, pair, opener, "Hello", "-n", "2")
    device: dict[str, object] = {
        "drafter_device": "auto",
        "vram": None,
        "fit": False,
        "threads": None,
        "ov_config": {},
        "exact": True,
        "max_slowdown": 0.01,
        "draft_model": None,
        "gpu_layers": None,
        "lookup_cache": 0,
    }
    assert opener.calls == [(pair, {**device, "tree": None})]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu-layers some", "gpu layers 'some' is no number of layers: give 0, 1, 2 ..., or auto"),
        ("-ngl auto", "--gpu-layers auto takes what is left of a limit: give --vram SIZE too, or --gpu-layers K"),
        ("-ngl 3 --drafter-device cpu", "--gpu-layers 3 runs on CUDA or WebGPU, not beside --drafter-device cpu: give "
         "--drafter-device cuda or webgpu, or leave out --gpu-layers"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_are_refused_before_a_pair_is_opened(
    invoke, pair, opener, flags: str, message: str
) -> None:
    result = ask(invoke, pair, opener, "Hello", *flags.split())
    assert result.exit_code == 2 and not opener.calls
    assert result.stderr == f"error: {message}\n"


@pytest.mark.parametrize(("given", "share"), [("2%", 0.02), ("0.02", 0.02), ("0", 0.0), ("100%", 1.0), ("0.5", 0.5)])
def test_a_slowdown_is_a_percentage_or_a_share(invoke, pair, opener, given: str, share: float) -> None:
    assert ask(invoke, pair, opener, "Hello", "-n", "2", "--max-slowdown", given).exit_code == 0
    assert opener.calls[0][1]["max_slowdown"] == pytest.approx(share)


@pytest.mark.parametrize("given", ["1", "2", "-1%", "101%", "nan", "much", "%", ""])
def test_another_slowdown_is_named(invoke, pair, opener, given: str) -> None:
    result = ask(invoke, pair, opener, "Hello", f"--max-slowdown={given}")
    assert result.exit_code == 2 and not opener.calls
    assert result.stderr == f"error: --max-slowdown {given!r} is no share of the time: give e.g. 2% or 0.02\n"


@pytest.mark.parametrize("tree", ["--fixed-tree", "--width=5", "--lookup=0"])
def test_a_slowdown_beside_a_fixed_tree_is_refused(invoke, pair, opener, tree: str) -> None:
    result = ask(invoke, pair, opener, "Hello", "--max-slowdown", "2%", tree)
    assert result.exit_code == 2 and "a fixed tree has none" in result.stderr and not opener.calls


def test_system_message_goes_before_the_prompt(invoke, pair, opener) -> None:
    assert ask(invoke, pair, opener, "Hello", "--system", "Be brief", "-n", "2").exit_code == 0
    assert opener.engine.asked[0][0] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
    ]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "warm"], "'warm'"),
        (["--top-p", "0"], "top_p 0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--top-k", "-1"], "top_k -1"),
        (["--min-p", "2"], "min_p 2"),
        (["--repetition-penalty", "0"], "repetition_penalty 0"),
        (["--seed", "-1"], "seed -1"),
        (["-n", "0"], "max_new_tokens 0"),
        (["--threads", "0"], "threads 0"),
        (["--threads", "99999999999999999999"], "threads 99999999999999999999"),
        (["--seed", "99999999999999999999"], "seed 99999999999999999999"),
        (["--temperature", "1e309"], "temperature inf"),
        (["--ov-config", "A\nB=C"], r"--ov-config 'A\nB=C' is no property: give NAME=VALUE"),
        (["--ov-config", "NUM_STREAMS"], "--ov-config 'NUM_STREAMS' is no property: give NAME=VALUE"),
        (["--width", "0"], "width 0"),
        (["--depth", "-1"], "depth -1"),
        (["--tree-top-k", "0"], "top_k 0"),
        (["--drafter-device", "tpu"], "'tpu'"),
        (["--system", "x", "--raw"], "--system"),
        (["--system", "x", "--token-ids"], "leave out --token-ids"),
        (["--token-ids"], "'Hello' is no list of token ids"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs '[1]' is no JSON object"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs '{' is no JSON object"),
        (["--chat-template-kwargs", "[" * 100_000], "is no JSON object"),
        (["--file", "x.txt"], "leave out the prompt or --file"),
        (["--beams", "4"], "--beams"),
        (["more"], "more"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_opened(invoke, pair, opener, args: list[str], named: str) -> None:
    result = ask(invoke, pair, opener, "Hello", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and named in result.stderr
    assert opener.calls == []


@pytest.mark.parametrize(
    ("args", "given", "named"),
    [
        ([""], None, "empty"),
        ([" \n"], None, "empty"),
        (["-"], "", "empty"),
        ([], "", "empty"),
        (["-"], b"\xff\xfe", "not UTF-8"),
        (["--file", "missing.txt"], None, "missing.txt"),
        (["--file", "."], None, "cannot be read"),
        (["--file", "/dev/zero"], None, "/dev/zero has more than 1 GiB: name a smaller text"),
    ],
)
def test_no_usable_prompt(invoke, pair, opener, args: list[str], given: str | bytes | None, named: str) -> None:
    result = ask(invoke, pair, opener, "generate", *args, input=given)
    assert (result.exit_code, result.stdout) == (2, "") and named in result.stderr
    assert opener.calls == []


def test_a_short_file_takes_little_memory(tmp_path: Path) -> None:
    """The bound on its length is no amount to reserve."""
    (file := tmp_path / "prompt.txt").write_text("Hello")
    tracemalloc.start()
    try:
        assert read_text(file, "a text file") == "Hello"
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_what_the_engine_refuses_is_one_line(invoke, pair, make_opener) -> None:
    result = ask(invoke, pair, make_opener(max_context=8), "Hello out there")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "context" in result.stderr and result.stderr.count("\n") == 1


def test_unknown_pair_name_names_the_known_ones(invoke, opener, cache: Path, make_pair) -> None:
    make_pair(cache / "pairs" / "mine")
    result = invoke("Hello", "--pair", "yours", obj=opener)
    assert (
        result.exit_code == 2
        and f"'yours' is unknown: name a pair folder, or one of mine, {', '.join(sorted(REFERENCE_PAIRS))}"
        in result.stderr
    )
    assert invoke("Hello", "--pair", "mine", "-n", "2", obj=opener).exit_code == 0
    assert opener.calls[0][0] == cache / "pairs" / "mine"


def test_a_folder_that_is_no_pair_is_exit_3(invoke, tmp_path: Path) -> None:
    result = invoke("Hello", "--pair", str(tmp_path))  # the real Engine.from_pretrained
    assert result.exit_code == 3 and "dovetail.json is missing" in result.stderr and result.stderr.count("\n") == 1


def test_ctrl_c_keeps_the_text_so_far_and_exits_130(invoke, pair, opener, interrupted_opener) -> None:
    whole = ask(invoke, pair, opener, "Hello", "-n", "60").stdout
    result = ask(invoke, pair, interrupted_opener(120), "Hello", "-n", "60")
    assert result.exit_code == 130
    text = result.stdout.removesuffix("\n")
    assert text and whole.startswith(text) and len(text) < len(whole) - 1
    assert re.fullmatch(r"\[stopped \| \d+ tokens, [\d.]+ tok/s, acceptance length .*\]\n", result.stderr)


BROKEN_PIPE = """
import runpy, sys
conftest = runpy.run_path(sys.argv[1])
from dovetail.runtime.cli.main import cli
cli.main(["Hello", "--pair", sys.argv[2], "-n", "3000"], obj=conftest["FakeOpener"]())
"""


def test_a_closed_pipe_is_quiet(pair: Path) -> None:
    conftest = str(Path(__file__).with_name("conftest.py"))
    command = [sys.executable, "-c", BROKEN_PIPE, conftest, str(pair)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read()
    assert said == b"" and process.returncode == 1


def run(redirected: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m dovetail.runtime.cli.main {redirected}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)


CHINESE = """
import runpy, sys
conftest = runpy.run_path(sys.argv[1])
from dovetail.runtime.cli.main import cli
from dovetail.runtime.testing.scripted import ScriptedTokenizer
opener = conftest["FakeOpener"]()
opener.engine._front.tokenizer = ScriptedTokenizer("\u4e2d" * len(conftest["ALPHABET"]), has_chat_template=False)
cli.main([sys.argv[3], "-n", "3", "--pair", sys.argv[2], *sys.argv[4:]], obj=opener)
"""


@pytest.mark.parametrize(
    ("encoding", "flags", "expected"),
    [
        ("latin-1", [], b"???\n"),
        ("cp1252:surrogateescape", [], b"???\n"),
        ("ascii", [], "中中中\n".encode()),  # click takes ASCII for a setting that somebody forgot
        ("utf-8", [], "中中中\n".encode()),
        ("latin-1", ["--json"], b'{"text": "\\u4e2d\\u4e2d\\u4e2d", '),
        ("utf-8", ["--json"], '{"text": "中中中", '.encode()),
    ],
)
def test_what_an_encoding_lacks_is_replaced(pair: Path, encoding: str, flags: list[str], expected: bytes) -> None:
    conftest = str(Path(__file__).with_name("conftest.py"))
    done = subprocess.run(
        [sys.executable, "-c", CHINESE, conftest, str(pair), "中", *flags],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected) if flags else done.stdout == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["--version", "--help", "doctor --json"])
def test_an_output_that_cannot_be_written_is_one_line(command: str) -> None:
    done = run(f"{command} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("command", "code"), [("", 2), ("generate", 2), ("chat --pair /nowhere", 3)])
def test_a_closed_standard_input_holds_no_prompt(command: str, code: int) -> None:
    done = run(f"{command} <&-")
    assert done.returncode == code and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_commands_are_imported_when_they_are_called() -> None:
    code = "import sys, dovetail.runtime.cli.main; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_properties_reach_the_engine(invoke, pair, opener) -> None:
    ask(invoke, pair, opener, "Hello", "-n", "2", "--ov-config", "A=1", "--ov-config", "B=x=y")
    assert opener.calls[-1][1]["ov_config"] == {"A": "1", "B": "x=y"}


def test_without_speculation_no_machine_is_measured(invoke, pair, opener) -> None:
    """Limits of the pair are asked for, so that nothing is scheduled."""
    ask(invoke, pair, opener, "Hello", "-n", "2", "--no-speculate")
    assert opener.calls[-1][1]["tree"] == read_manifest(pair).tree


SCHEMA = (
    '{"type": "object", "properties": {"th": {"type": "boolean"}}, "required": ["th"], "additionalProperties": false}'
)


@pytest.mark.parametrize("flag", ["-j", "-jf", "--grammar-file", "--regex"])
def test_an_answer_follows_a_grammar(invoke, tiny_full_pair: Path, tmp_path: Path, flag: str) -> None:
    given = {
        "-j": SCHEMA,
        "-jf": SCHEMA,
        "--grammar-file": 'start: "{" "th" ": " ("true" | "false") "}"\n',
        "--regex": r"\{th: true\}",
    }
    value = given[flag]
    if flag in ("-jf", "--grammar-file"):
        file = tmp_path / "grammar.txt"
        file.write_text(value)
        value = str(file)
    flags = ("--pair", str(tiny_full_pair), "--fixed-tree", "--raw", "-n", "40", flag, value)
    result = invoke("generate", "the quick", *flags)
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r'\{\s*"?th"?\s*:\s*(true|false)\s*\}\n', result.stdout)
    answer = json.loads(invoke("generate", "the quick", *flags, "--json").stdout)
    assert answer["text"] + "\n" == result.stdout and answer["finish_reason"] == "stop"


@pytest.mark.parametrize(("flags", "reason"), [
    (("-j", "{"), "json_schema '{' is no JSON schema"),
    (("--json-schema", '{"type": "objekt"}'), "Invalid type: objekt"),
    (("--regex", "(a"), "unclosed group"),
    (("-jf", "missing.json"), "missing.json cannot be read"),
    (("--regex", "a", "-j", "{}"), "--json-schema and --regex give two grammars"),
    (("--logit-bias", "a=1"), "--logit-bias 'a=1' is no token id with a value: give e.g. 42=-100"),
    (("--logit-bias", "7"), "is no token id with a value"),
    (("--logit-bias", "7=101"), "logit_bias of token 7 101.0 is out of range"),
    (("--presence-penalty", "3"), "presence_penalty 3.0 is out of range: give -2 to 2"),
])  # fmt: skip
def test_a_bad_grammar_is_refused_before_the_model_loads(
    invoke, pair: Path, opener, flags: tuple[str, ...], reason: str
) -> None:
    result = ask(invoke, pair, opener, "Hello", *flags)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and reason in result.stderr
    assert opener.calls == []


def test_without_llguidance_a_grammar_is_refused_before_the_model_loads(
    invoke, pair: Path, opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    result = ask(invoke, pair, opener, "Hello", "--regex", "a")
    assert result.exit_code == 2 and ".[grammar]" in result.stderr and opener.calls == []
    assert ask(invoke, pair, opener, "Hello", "-n", "3").exit_code == 0
