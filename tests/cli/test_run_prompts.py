"""Benchmark prompts: both row shapes are read, a bad row is one error that names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.runtime.errors import InputError
from dovetail.runtime.text.prompts import PromptTurns, read_prompts


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def test_both_row_shapes_and_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "one"}, "", {"question_id": 7, "turns": ["two\u2028", "three"]})
    assert read_prompts(file) == [PromptTurns("1", ("one",)), PromptTurns("7", ("two\u2028", "three"))]


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": str(i)} for i in range(5)))
    assert [row.turns for row in read_prompts(file, 2)] == [("0",), ("1",)]


@pytest.mark.parametrize(
    "row",
    ["{", "[1]", {}, {"text": "x"}, {"prompt": "a", "turns": ["b"]}, {"prompt": ""}, {"prompt": 3}, {"turns": []},
     {"turns": ["a", " "]}, {"turns": "a"}, "[" * 100_000, '{"prompt": "\\ud800"}', '{"prompt": "a", "id": "\\udc00"}',
     '{"prompt": "a", "id": %s}' % ("9" * 5000)],
)  # fmt: skip
def test_bad_row_names_its_line(tmp_path: Path, row: object) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(InputError, match=r"p\.jsonl line 2"):
        read_prompts(file)


@pytest.mark.parametrize(("content", "message"), [(b"\n\n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")])
def test_unusable_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_missing_file_and_bad_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none")
    with pytest.raises(InputError, match="limit 0"):
        read_prompts(tmp_path / "none", 0)
