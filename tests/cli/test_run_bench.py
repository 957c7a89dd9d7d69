"""`bench`: both modes see every prompt, in turns, from empty caches; the figures are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.runtime.cli.benchmark import Paired, Run, Totals, summary
from dovetail.runtime.cli.prompts import Conversation

KEYS = {
    "speedup", "acceptance_length", "accepted_per_position", "plain_tokens_per_second", "tokens_per_second", "draft_ms",
    "verify_ms", "other_ms", "prompts", "acceptance_per_depth", "peak_rss_mb", "machine", "versions", "date", "command",
}  # fmt: skip
PROMPT_KEYS = {"speedup", "acceptance_length", "new_tokens", "same_tokens", "first_divergence"}


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


def test_both_modes_agree_at_temperature_0(invoke, pair, opener, prompts: Path) -> None:
    report = json.loads(bench(invoke, pair, opener, prompts, "--json").stdout)
    assert report["same_tokens"] == 3
    assert all(row["same_tokens"] and row["first_divergence"] is None for row in report["prompts"])


def test_sampled_modes_share_one_seed_that_is_reported(invoke, pair, opener, prompts: Path) -> None:
    report = json.loads(bench(invoke, pair, opener, prompts, "--temp", "1", "--json").stdout)
    seeds = {options["seed"] for _, options in opener.engine.asked if options.get("temperature")}
    assert seeds == {report["settings"]["seed"]} and None not in seeds
    assert report["same_tokens"] == 3


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
    plain = {name for name in report if name.startswith("plain_")} | {"speedup", "same_tokens"}
    assert len(plain) == 5 and {report[name] for name in plain} == {None}
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


def test_a_pair_without_a_drafter_has_nothing_to_compare(invoke, pair, make_opener, prompts: Path) -> None:
    result = bench(invoke, pair, make_opener(drafter=False), prompts)
    assert result.exit_code == 3 and "no drafter" in result.stderr


def test_output_that_cannot_be_written_is_one_error(invoke, pair, opener, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    result = bench(invoke, pair, opener, prompts, "--limit", "1", "--output", str(tmp_path / "taken"))
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    assert not list(tmp_path.glob(".taken*"))


def paired(plain_ms: float, ours_ms: float, plain=((1, 2, 3),), ours=((1, 2, 3),)) -> Paired:
    def run(answers, decode_ms: float, rounds: int) -> Run:
        later = sum(len(answer) - 1 for answer in answers)
        totals = Totals(new_tokens=later + len(answers), later_tokens=later, decode_ms=decode_ms, rounds=rounds)
        return Run(tuple(answers), totals)

    return Paired(Conversation("x", ("x",)), run(plain, plain_ms, 2), run(ours, ours_ms, 1))


def test_speedup_is_the_median_of_paired_ratios() -> None:
    pairs = [paired(10, 10), paired(10, 5), paired(100, 20)]
    assert [pair.speedup for pair in pairs] == pytest.approx([1, 2, 5])
    assert summary(pairs)["speedup"] == 2
    assert summary(pairs)["tokens_per_second"] == pytest.approx(6 / 0.035, abs=0.01)


def test_answers_of_one_token_have_no_speedup() -> None:
    short = paired(0, 0, plain=((1,),), ours=((1,),))
    assert short.speedup is None and summary([short])["speedup"] is None
    assert summary([short, paired(10, 5)])["speedup"] == 2


@pytest.mark.parametrize(
    ("plain", "ours", "at"),
    [
        (((1, 2, 3),), ((1, 2, 3),), None),
        (((1, 2, 3),), ((1, 9, 3),), 1),
        (((1, 2, 3),), ((1, 2),), 2),
        (((1, 2), (3, 4)), ((1, 2), (3, 5)), 3),
    ],
)
def test_first_divergence_counts_over_all_answers(plain, ours, at) -> None:
    assert paired(1, 1, plain, ours).first_divergence == at


def test_totals_add_up_position_by_position() -> None:
    total = Totals(rounds=2, accepted=3, accepted_per_position=(2, 1)) + Totals(
        rounds=1, accepted=1, accepted_per_position=(1,)
    )
    assert total.accepted_per_position == (3, 1) and total.acceptance_length == pytest.approx(1 + 4 / 3)
    assert total.acceptance_per_depth == pytest.approx((3 / 3, 1 / 3)) and Totals().acceptance_per_depth == ()
