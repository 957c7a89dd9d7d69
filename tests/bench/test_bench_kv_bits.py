"""The benchmark of keys and values in 8 bits, on a tiny pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner


def test_a_table_of_texts_and_a_table_of_times(tiny_pair: Path, bench_script: Callable[[str], ModuleType]) -> None:
    options = [
        "--windows",
        "1",
        "--window",
        "128",
        "--rounds",
        "1",
        "--context",
        "100",
        "--context",
        "100000",
        "--group",
        "4",
    ]
    result = CliRunner().invoke(bench_script("kv_bits").kv_bits, [str(tiny_pair), *options])
    assert result.exit_code == 0, result.output
    texts, times = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]
        for part in result.output.split("\n\n")
    )
    assert [row[0] for row in texts] == ["f16", "u8", "u8, keys in groups of 4"]
    sizes = [int(row[1].replace(",", "")) for row in texts]
    assert sizes[1] < sizes[2]
    assert texts[0][2] == "100.0%"
    assert [row[:2] for row in times] == [["100", "1"], ["100", "8"]]
