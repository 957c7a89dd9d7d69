"""`bench`: both modes see every prompt, in turns, from empty caches; the figures are what they are called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.runtime.bench.compare import Paired, Run, Totals, summary
from dovetail.runtime.loop.rescore import Choice
from dovetail.runtime.text.prompts import PromptTurns

KEYS = {
    "speedup", "acceptance_length", "accepted_per_position", "plain_tokens_per_second", "tokens_per_second", "draft_ms",
    "verify_ms", "other_ms", "prompts", "acceptance_per_depth", "peak_rss_mb", "machine", "versions", "date", "command",
}  # fmt: skip
PROMPT_KEYS = {"speedup", "acceptance_length", "new_tokens", "other_tokens", "first_other"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": "One"}, {"question_id": 81, "turns": ["Two", "Three"]}, {"prompt": "Four"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(invoke, pair, opener, prompts: Path, *args: str):
    return invoke("bench", "--pair", str(pair), "--prompts", str(prompts), "-n", "12", *args, obj=opener)


def conversations(asked) -> list[tuple[str, bool]]:
    """(last user turn, speculate) of every answer, without the warm-up and the prompts that empty the caches."""
    turns = [(prompt if isinstance(prompt, str) else prompt[-1]["content"], options) for prompt, options in asked]
    return [(turn, options["speculate"]) for turn, options in turns if turn != "\n"][2:]


def test_json_has_every_figure(invoke, pair, opener, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = bench(invoke, pair, opener, prompts, "--output", str(output), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert report == json.loads(result.stdout)
    assert set(report) >= KEYS and all(set(row) >= PROMPT_KEYS for row in report["prompts"])
    assert {"cpu", "cores", "ram_mb", "os"} <= set(report["machine"]) and report["peak_rss_mb"] > 1
    assert [row["name"] for row in report["prompts"]] == ["1", "81", "3"]
    assert [row["new_tokens"] for row in report["prompts"]] == [12, 24, 12]
    assert report["acceptance_length"] == pytest.approx(1 + sum(report["accepted_per_position"]), abs=1e-3) and (
        report["acceptance_length"] > 1
    )


@pytest.mark.parametrize("name", ["[/bold]", "[red]", ":smile:", "\\[", "a\u0000b"])
def test_a_name_is_no_markup(invoke, pair, opener, tmp_path: Path, name: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "One", "id": name}) + "\n")
    result = bench(invoke, pair, opener, file, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"][0]["name"] == name
    assert name in result.stderr or "\0" in name


@pytest.mark.parametrize("plain", ["--plain", "--no-plain"])
def test_every_token_is_the_target_s_own_choice(invoke, pair, opener, prompts: Path, plain: str) -> None:
    report = json.loads(bench(invoke, pair, opener, prompts, plain, "--json").stdout)
    for row in (report, *report["prompts"]):
        assert (row["other_tokens"], row["largest_margin"], row.get("first_other")) == (0, None, None)


def test_sampled_modes_share_one_seed_that_is_reported(invoke, pair, opener, prompts: Path) -> None:
    report = json.loads(bench(invoke, pair, opener, prompts, "--temp", "1", "--json").stdout)
    seeds = {options["seed"] for _, options in opener.engine.asked if options.get("temperature")}
    assert seeds == {report["settings"]["seed"]} and None not in seeds
    assert report["other_tokens"] == 0


def test_modes_take_turns_in_beginning_and_turns_see_those_before(invoke, pair, opener, prompts: Path) -> None:
    bench(invoke, pair, opener, prompts)
    assert conversations(opener.engine.asked) == [
        ("One", False), ("One", True),
        ("Two", True), ("Three", True), ("Two", False), ("Three", False),
        ("Four", False), ("Four", True),
    ]  # fmt: skip
    third = next(prompt for prompt, _ in opener.engine.asked if not isinstance(prompt, str))
    assert [message["role"] for message in third] == ["user", "assistant", "user"]


def test_nothing_cached_is_used_across_modes(invoke, pair, opener, prompts: Path, monkeypatch) -> None:
    cached = []
    generate = type(opener.engine).generate

    def spy(self, prompt, *args, **options):
        result = generate(self, prompt, *args, **options)
        cached.append((isinstance(prompt, str), result.metrics.cached_tokens))
        return result

    monkeypatch.setattr(type(opener.engine), "generate", spy)
    bench(invoke, pair, opener, prompts)
    assert all(tokens == 0 for first_turn, tokens in cached if first_turn)
    assert all(tokens > 0 for first_turn, tokens in cached if not first_turn)  # a second turn keeps its own


def test_without_plain_only_drafting_is_measured(invoke, pair, opener, prompts: Path) -> None:
    compared = json.loads(bench(invoke, pair, opener, prompts, "--json").stdout)
    opener.engine.asked.clear()
    result = bench(invoke, pair, opener, prompts, "--no-plain", "--json")
    assert result.exit_code == 0 and all(
        options["speculate"] for _, options in opener.engine.asked if "stop" in options
    )
    report = json.loads(result.stdout)
    assert report.keys() == compared.keys() and report["prompts"][0].keys() == compared["prompts"][0].keys()
    for key in ("acceptance_length", "acceptance_per_depth", "accepted_per_position", "rounds", "new_tokens"):
        assert report[key] == compared[key]
    plain = {name for name in report if name.startswith("plain_")} | {"speedup"}
    assert len(plain) == 4 and {report[name] for name in plain} == {None}
    assert all(row[name] is None for row in report["prompts"] for name in plain & row.keys())
    assert "speedup" not in result.stderr and "tok/s" in result.stderr and "plain tok" not in result.stderr


def test_without_plain_a_seed_samples_the_same(invoke, pair, opener, prompts: Path) -> None:
    flags = ("--temp", "1", "--seed", "5", "--json")
    compared = json.loads(bench(invoke, pair, opener, prompts, *flags).stdout)
    alone = json.loads(bench(invoke, pair, opener, prompts, *flags, "--no-plain").stdout)
    assert alone["acceptance_length"] == compared["acceptance_length"] > 1


def test_table_and_progress_go_to_stderr(invoke, pair, opener, prompts: Path) -> None:
    result = bench(invoke, pair, opener, prompts, "--limit", "1")
    assert result.stdout == ""
    assert "speedup" in result.stderr and "per round: draft" in result.stderr


def test_a_bad_row_is_named_before_anything_is_opened(invoke, pair, opener, prompts: Path) -> None:
    prompts.write_text('{"prompt": "fine"}\n{"promt": "typo"}\n')
    result = bench(invoke, pair, opener, prompts)
    assert (result.exit_code, result.stdout, opener.calls) == (2, "", [])
    assert "prompts.jsonl line 2" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--limit", "0"], "limit 0"),
        (["--output", "missing/out.json"], "missing"),
        (["--temperature", "-1"], "temperature -1"),
        (["--no-speculate"], "--no-speculate"),
    ],
)
def test_bad_flags(invoke, pair, opener, prompts: Path, args: list[str], named: str) -> None:
    result = bench(invoke, pair, opener, prompts, *args)
    assert (result.exit_code, opener.calls) == (2, []) and named in result.stderr


def test_an_interrupted_benchmark_writes_nothing(
    invoke, pair, interrupted_opener, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    result = bench(invoke, pair, interrupted_opener(60), prompts, "--output", str(output))
    assert result.exit_code == 130 and not output.exists()


def test_a_pair_without_a_drafter_compares_repeats(invoke, pair, make_opener, prompts: Path) -> None:
    result = bench(invoke, pair, make_opener(drafter=False), prompts, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["drafter_device"] is None and report["speedup"] > 0


def test_output_that_cannot_be_written_is_one_error(invoke, pair, opener, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    result = bench(invoke, pair, opener, prompts, "--limit", "1", "--output", str(tmp_path / "taken"))
    assert result.exit_code == 2 and "is a folder: name a file" in result.stderr
    assert not list(tmp_path.glob(".taken*"))


def paired(plain_ms: float, ours_ms: float, plain=((1, 2, 3),), ours=((1, 2, 3),)) -> Paired:
    def run(answers, decode_ms: float, rounds: int) -> Run:
        later = sum(len(answer) - 1 for answer in answers)
        totals = Totals(new_tokens=later + len(answers), later_tokens=later, decode_ms=decode_ms, rounds=rounds)
        return Run(("x",) * len(answers), tuple(answers), totals)

    chosen = tuple(Choice(token, 0.0) for answer in ours for token in answer)
    return Paired(PromptTurns("x", ("x",)), run(plain, plain_ms, 2), run(ours, ours_ms, 1), chosen)


def test_speedup_is_the_median_of_paired_ratios() -> None:
    pairs = [paired(10, 10), paired(10, 5), paired(100, 20)]
    assert [pair.speedup for pair in pairs] == pytest.approx([1, 2, 5])
    assert summary(pairs)["speedup"] == 2
    assert summary(pairs)["tokens_per_second"] == pytest.approx(6 / 0.035, abs=0.01)


def test_answers_of_one_token_have_no_speedup() -> None:
    short = paired(0, 0, plain=((1,),), ours=((1,),))
    assert short.speedup is None and summary([short])["speedup"] is None
    assert summary([short, paired(10, 5)])["speedup"] == 2


def test_tokens_that_the_target_would_not_choose_are_counted_over_all_answers() -> None:
    choices = (Choice(1, 0.0), Choice(5, 0.25), Choice(3, 0.0), Choice(7, 0.5))
    pair = replace(paired(1, 1, ours=((1, 2), (3, 4))), choices=choices)
    assert pair.others == {1: choices[1], 3: choices[3]}
    report = summary([pair, replace(paired(1, 1), choices=(Choice(1, 0.0), Choice(2, 0.0), Choice(3, 0.0)))])
    assert (report["other_tokens"], report["largest_margin"]) == (2, 0.5)
    first, second = report["prompts"]
    assert (first["other_tokens"], first["first_other"], first["largest_margin"]) == (2, 1, 0.5)
    assert (second["other_tokens"], second["first_other"], second["largest_margin"]) == (0, None, None)


def test_a_near_tie_is_shown_with_its_margin(invoke, pair, opener, prompts: Path, monkeypatch) -> None:
    def choices(self, prompt, answer, **options):
        return [Choice(-1 if at == 2 else token, 0.125 * (at == 2)) for at, token in enumerate(answer)]

    monkeypatch.setattr(type(opener.engine), "choices", choices)
    monkeypatch.setenv("COLUMNS", "200")
    told = bench(invoke, pair, opener, prompts).stderr
    assert "2 (up to 0.12)" in told and "4 (up to 0.12)" in told


def test_totals_add_up_position_by_position() -> None:
    total = Totals(rounds=2, accepted=3, accepted_per_position=(2, 1)) + Totals(
        rounds=1, accepted=1, accepted_per_position=(1,)
    )
    assert total.accepted_per_position == (3, 1) and total.acceptance_length == pytest.approx(1 + 4 / 3)
    assert total.acceptance_per_depth == pytest.approx((3 / 3, 1 / 3)) and Totals().acceptance_per_depth == ()


def test_what_cannot_be_asked_is_told_before_anything_is_measured(invoke, pair, opener, tmp_path: Path) -> None:
    file, output = tmp_path / "long.jsonl", tmp_path / "out.json"
    file.write_text(json.dumps({"prompt": "One"}) + "\n" + json.dumps({"id": "odd", "prompt": "x" * 5000}) + "\n")
    result = bench(invoke, pair, opener, file, "--output", str(output))
    assert result.exit_code == 2 and "prompt odd: a prompt of 50" in result.stderr
    assert not opener.engine.asked and not output.exists()


@pytest.mark.parametrize("name", ["", "no/where.json"])
def test_results_that_cannot_be_written_are_refused_first(invoke, pair, opener, prompts: Path, name: str) -> None:
    result = bench(invoke, pair, opener, prompts, "--output", str(prompts.parent / name))
    assert result.exit_code == 2 and "--output" in result.stderr and not opener.calls


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(invoke, pair, opener, tmp_path: Path) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "One"}\r\n')
    assert bench(invoke, pair, opener, file, "--no-plain").exit_code == 0
