"""table.py: a row for each benchmark, kept rows, and losses measured again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.bench.scripts import Opener, script

from dovetail.runtime.errors import InputError
from dovetail.runtime.text.prompts import read_prompts


@pytest.fixture
def measure(tiny_full_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs table.py on a tiny pair; gives its result and what `dovetail-run` was asked for, which scripts answer."""
    from dovetail.runtime.cli.main import cli

    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    table, prompts = script("table"), tmp_path / "prompts"
    (tmp_path / "long.txt").write_text("One Two Three " * 200)
    monkeypatch.setattr(table, "OWN_TEXT", tmp_path / "long.txt")
    prompts.mkdir()
    for task in table.TASKS:
        talks = [{"question_id": f"{task}-{turn}", "turns": [turn]} for turn in ("One", "Two", "Three")]
        (prompts / f"{task}.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))

    def measure(*flags: str) -> tuple[Result, list[list[str]]]:
        asked: list[list[str]] = []

        def dovetail_run(*arguments: str) -> str:
            asked.append(list(arguments))
            if arguments[0] == "bench":
                monkeypatch.setattr(sys, "argv", ["dovetail-run", *arguments])
                result = CliRunner().invoke(cli, list(arguments), obj=Opener())
                assert result.exit_code == 0, result.output
            return "{}"

        monkeypatch.setattr(table, "dovetail_run", dovetail_run)
        folders = ["--prompts", str(prompts), "--out", str(tmp_path / "out"), "-n", "12"]
        return CliRunner().invoke(table.table, [str(tiny_full_pair), *folders, *flags]), asked

    return measure


def made_up(file: Path, every: float = 1.5, **first: Any) -> None:
    """Put made-up ratios into a benchmark's results, so that no clock decides; `first`: facts of the first prompt."""
    report = json.loads(file.read_text())
    for prompt in report["prompts"]:
        prompt["speedup"] = every
    report["prompts"][0].update(first)
    file.write_text(json.dumps(report))


def test_the_repository_has_ten_prompts_of_its_own_for_each_task() -> None:
    folder = Path(__file__).with_name("tasks")
    talks = {task: read_prompts(folder / f"{task}.jsonl", None) for task in script("table").TASKS}
    assert all(len(each) == len({talk.turns for talk in each}) == 10 for each in talks.values())
    assert {len(talk.turns) for talk in talks["mt_bench"]} == {2}


def test_a_table_has_a_row_for_every_benchmark_and_goes_on_where_one_is_missing(measure, tmp_path: Path) -> None:
    flags = ("--limit", "2", "--sampled-limit", "1", "--no-repeat-slow")
    result, asked = measure(*flags)
    assert result.exit_code == 0, result.output
    assert [arguments[0] for arguments in asked] == ["tune", *["bench"] * 9]
    assert ["--temperature" in arguments for arguments in asked] == [False] * 5 + [True] * 4 + [False]
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| tiny |")]
    tasks = ("HumanEval", "GSM8K", "MT-bench", "Alpaca")
    assert [(row[1], row[8]) for row in rows] == [
        *((f"2 of {task}", "0 of 24") for task in tasks),
        *((f"1 of {task}, temperature 1", "0 of 12") for task in tasks),
        ("3 of own text, 128 tokens", "0 of 36"),  # of those that the tiny pair's context has room for
    ]
    assert "Note" not in result.stdout

    again, asked = measure(*flags)
    assert asked == [] and [line for line in again.stdout.splitlines() if line.startswith("| ")] == [
        line for line in result.stdout.splitlines() if line.startswith("| ")
    ]
    (tmp_path / "out" / "tiny.gsm8k.t0.json").unlink()
    _, asked = measure(*flags)
    assert [arguments[arguments.index("-o") + 1] for arguments in asked] == [str(tmp_path / "out/tiny.gsm8k.t0.json")]


def test_a_kept_row_of_another_command_is_told_and_one_of_other_prompts_refused(measure, tmp_path: Path) -> None:
    measure("--limit", "2", "--no-repeat-slow")
    result, asked = measure("--no-repeat-slow")
    assert asked == [] and result.stdout.count("was measured with another command: delete it") == 8
    made_up(tmp_path / "out" / "tiny.alpaca.t0.json", name="another")
    refused, _ = measure("--no-repeat-slow")
    assert isinstance(refused.exception, InputError) and "tiny.alpaca.t0.json" in str(refused.exception)


def test_what_lost_or_differs_is_listed_and_losses_are_measured_again(measure, tmp_path: Path) -> None:
    measure("--no-repeat-slow")
    out = tmp_path / "out"
    for file in out.glob("*[0-9].json"):
        made_up(file)
    differs: dict[str, Any] = {"other_tokens": 3, "new_tokens": 12, "largest_margin": 0.25}
    made_up(out / "tiny.humaneval.t0.json", speedup=0.9)
    made_up(out / "tiny.gsm8k.t0.json", every=0.96, **differs)
    made_up(out / "tiny.mt_bench.t0.json", **{**differs, "other_tokens": 0, "largest_margin": None})
    made_up(out / "tiny.alpaca.t0.json", every=0.98)
    made_up(out / "tiny.humaneval.t1.json", every=0.5, **differs)  # of temperature 1: in the table alone
    result, asked = measure()
    assert [arguments[-1] for arguments in asked] == [
        str(out / f"tiny.{task}.t0.slow.json") for task in ("humaneval", "gsm8k")
    ]
    names = [[row["name"] for row in json.loads(Path(each[-1]).read_text())["prompts"]] for each in asked]
    assert names == [["humaneval-One"], ["gsm8k-One", "gsm8k-Two", "gsm8k-Three"]]
    for each in asked:
        made_up(Path(each[-1]), every=1.25)

    result, asked = measure()
    assert asked == [] and "Note" not in result.stdout
    lines = [line for line in result.stdout.splitlines() if "prompt " in line]
    assert lines == [
        "- tiny, HumanEval, prompt 0 (`humaneval-One`): 0.90x, again 1.25x",
        "- tiny, GSM8K, prompt 0 (`gsm8k-One`): 0.96x, again 1.25x",
        "- tiny, GSM8K, prompt 1 (`gsm8k-Two`): 0.96x, again 1.25x",
        "- tiny, GSM8K, prompt 2 (`gsm8k-Three`): 0.96x, again 1.25x",
        "- tiny, GSM8K, prompt 0 (`gsm8k-One`): 3 of 12 tokens, at most 0.25 logits below the best",
    ]  # fmt: skip
    assert "| 0.90x, 1.50x |" in result.stdout  # the table keeps the first


def test_shares_and_memory_are_of_what_passes_and_files_allow(measure, tiny_full_pair: Path, tmp_path: Path) -> None:
    table = script("table")
    facts = {"speedup": 1.8, "acceptance_length": 3.0, "plain_verify_ms": 20.0, "verify_ms": 25.0, "draft_ms": 5.0,
             "plain_tokens_per_second": 40.0, "tokens_per_second": 76.0}  # fmt: skip
    assert table.shares(facts) == pytest.approx((0.95, 0.9))  # 3 tokens in the time of one and a half steps
    assert all(share != share for share in table.shares({**facts, "verify_ms": 0.0, "draft_ms": 0.0}))
    report = {"drafter_device": "CPU (int8)", "settings": {"max_new_tokens": 2**20}}
    talks = [table.PromptTurns("a", ("One",)), table.PromptTurns("b", ("One", "Two"))]
    row = table.Row(str(tiny_full_pair), "gsm8k", 0, tmp_path, report, talks)
    kv_mb = 2 * 2 * (2 * 2 * 8 * 2)  # two turns of 2**20 tokens; layers, keys and values, heads of 8, 16 bits
    files_mb = table.needed_mb(row) - kv_mb
    sizes = [file.stat().st_size for file in tiny_full_pair.glob("target/*.bin")]
    sizes += [file.stat().st_size for file in tiny_full_pair.glob("drafter/drafter.int8.onnx*")]
    assert sum(sizes) / 2**20 == pytest.approx(files_mb, abs=0.2)  # rounded, and the prompt's own KV


def test_a_benchmark_that_fails_stops_the_table() -> None:
    with pytest.raises(InputError, match="dovetail-run bench --nonsense ended with exit code 2"):
        script("table").dovetail_run("bench", "--nonsense")
