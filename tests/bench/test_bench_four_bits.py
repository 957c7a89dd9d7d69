"""The benchmark of four-bit formats, on tiny pairs: a stopped run goes on, and every format reads the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="formats are exported")

from dovetail.runtime import Engine
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.layout import TARGET_WEIGHTS

INT4 = "int4-sym-32-1"


@pytest.fixture
def script(bench_script: Callable[[str], ModuleType]) -> ModuleType:
    return bench_script("four_bits")


def test_a_stopped_run_goes_on_with_the_texts_and_rounds_that_it_has(
    script: ModuleType, tiny_llama: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.json"
    work.mkdir()
    (work / "int8").symlink_to(tiny_pair)  # an exported format is not exported again

    def run(*arguments: str) -> list[list[str]]:
        asked = [str(tiny_llama), "--work", str(work), "--out", str(out), "--tokens", "300", "--context", "128"]
        result = CliRunner().invoke(script.four_bits, [*asked, "-n", "24", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        rows = [line.split("|")[1:-1] for line in result.stdout.splitlines()]
        assert all(len(row) == 15 for row in rows)
        return [[cell.strip() for cell in row] for row in rows[2:]]

    alone = run("--format", "int8", "--rounds", "1")
    first = json.loads(out.read_text())
    assert [row[0] for row in alone] == ["int8"]
    both = run("--format", INT4, "--rounds", "2")
    kept = json.loads(out.read_text())
    assert kept["texts"] == first["texts"] and kept["scores"]["int8"] == first["scores"]["int8"]
    assert [sorted(each) for each in kept["rounds"]] == [["int8"], ["int4-sym-32-1", "int8"], ["int4-sym-32-1", "int8"]]
    assert run("--format", INT4, "--rounds", "2") == both and json.loads(out.read_text()) == kept
    int8, int4 = both
    assert int8[9:12] == ["100.0%"] * 3 and all(cell != "100.0%" for cell in int4[9:12])
    assert (work / INT4 / TARGET_WEIGHTS).stat().st_size < (tiny_pair / TARGET_WEIGHTS).stat().st_size
    assert all(float(cell) > 0 for row in both for cell in row[2:9])


def test_a_score_is_what_generation_sees(script: ModuleType, tiny_pair: Path) -> None:
    """Greedy answers have INT8's best tokens; the log-probabilities are those of the engine."""
    with Engine.from_pretrained(tiny_pair, threads=1) as engine:
        prompt = [5, 6, 7, 8] * 5
        result = engine.generate(prompt, 100, speculate=False, logprobs=0)
    text = script.Text("chat", [*prompt, *result.token_ids], len(prompt) - 1)
    score = script.scores(script.opened(tiny_pair), [text])["chat"]
    assert score.best == list(result.token_ids) and len(score.best) > script.CHUNK
    assert np.allclose(score.nll, [-each.logprob for each in result.logprobs], atol=1e-3)


def test_texts_have_as_many_counted_positions_as_asked(script: ModuleType, tiny_pair: Path) -> None:
    found = script.texts(tiny_pair, 1000, 24)
    assert [script.counted(found, kind) for kind in script.KINDS] == [1000] * 3
    assert all(len(text.tokens) <= script.WINDOW for text in found)
    chat = [text for text in found if text.kind == "chat"]
    assert all(text.begin > 0 and 1 <= len(text.tokens) - 1 - text.begin <= 24 for text in chat)
    assert len({tuple(text.tokens) for text in chat}) == len(chat) > 20  # prompts that are asked again: other answers
    with pytest.raises(InputError, match=r"docs/guide has only \d+ tokens: give --tokens"):
        script.texts(tiny_pair, 10**7, 24)


def test_formats_are_named_after_the_options_of_the_export(script: ModuleType) -> None:
    assert script.weight_options("int8") == ["--weight-format", "int8"]
    asked = {name: " ".join(script.weight_options(name)) for name in script.FORMATS}
    assert len(set(asked.values())) == 8
    assert asked["int4-sym-128-1"] == "--weight-format int4 --group-size 128 --ratio 1 --sym"
    assert asked["int4-asym-64-0.8"] == "--weight-format int4 --group-size 64 --ratio 0.8"
    every = script.weight_options("int4-asym-64-1-all")
    assert every == ["--weight-format", "int4", "--group-size", "64", "--ratio", "1", "--all-layers"]
    for name in ("int4", "int4-sym-128-2", "int4-sym-x-1", "int4-sym-128-1.0", "int4-sym-128-1-al"):
        with pytest.raises(InputError, match="is unknown: write int8, or a name such as int4-sym-128-1"):
            script.weight_options(name)


def test_a_failed_export_is_told_with_its_command(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dovetail-export target .*absent .*int8 --weight-format int8.* exit code"):
        script.exported(str(tmp_path / "absent"), tmp_path / "int8", ["--weight-format", "int8"])


def test_results_of_another_setting_are_not_mixed(script: ModuleType, tmp_path: Path) -> None:
    out, setting = tmp_path / "out.json", {"model": "a", "context": 256}
    kept = script.read(out, setting)
    script.save(out, kept)
    assert script.read(out, setting)["rounds"] == []
    with pytest.raises(InputError, match="measured with another setting: name another --out"):
        script.read(out, {**setting, "model": "b"})
    script.save(out, {**kept, "versions": {}, "machine": {}})
    with pytest.raises(InputError, match="measured with another machine, versions: name another --out"):
        script.read(out, setting)


def test_the_table_has_medians_of_the_rounds_in_which_all_formats_took_part(script: ModuleType) -> None:
    ones = [1.0] * 6
    rounds = [{"int8": [50.0] * 6}, {"int8": [20.0] * 6, INT4: ones}, {"int8": [10.0] * 6, INT4: ones}]
    whole = script.complete(rounds, ["int8", INT4])
    assert whole == rounds[1:]
    score = {kind: {"nll": [0.0, 0.0], "best": [1, 2]} for kind in script.KINDS}
    worse = {**score, "code": {"nll": [0.0, np.log(4)], "best": [1, 3]}}
    table = script.table(["int8", INT4], {"int8": 40.0, INT4: 20.0}, {"int8": score, INT4: worse}, whole)
    assert table.splitlines()[2:] == [
        "| int8 | 40 | 66.7 " + "| 15.0 " * 6 + "| 100.0% | 100.0% | 100.0% | 1.000 | 1.000 | 1.000 |",
        f"| {INT4} | 20 | 1000.0 " + "| 1.0 " * 6 + "| 100.0% | 50.0% | 100.0% | 1.000 | 2.000 | 1.000 |",
    ]
