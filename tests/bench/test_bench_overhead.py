"""The benchmark of the server's overhead: a real server in a process of its own, and a pair that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="a pair is exported")
pytest.importorskip("fastapi", reason="the extra serve")


def test_both_answer_in_turn(tiny_full_pair: Path, bench_script: Callable[[str], ModuleType]) -> None:
    given = [str(tiny_full_pair), "--requests", "1", "-n", "4"]
    result = CliRunner().invoke(bench_script("overhead").main, given)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines()] == ["one body", "a stream"]


def test_a_server_that_does_not_start_is_told(tmp_path: Path, bench_script: Callable[[str], ModuleType]) -> None:
    result = CliRunner().invoke(bench_script("overhead").main, [str(tmp_path)])
    assert "the server did not start (error: " in str(result.exception)
