"""Benchmark prompts from a JSONL file: rows with `prompt`, or with `turns` as in spec_bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.files import parse_json


@dataclass(frozen=True)
class Conversation:
    """User turns that are asked one after the other. name: the row's `question_id` or `id`, else its line."""

    name: str
    turns: tuple[str, ...]


def read_prompts(path: Path, limit: int | None = None) -> list[Conversation]:
    """The first `limit` rows of `path`; blank lines are skipped.

    Raises InputError naming file and line: not JSON, no `prompt` or `turns`, an empty or non-text turn; no rows.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is out of range: give 1 or more")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON texts may hold U+2028
    except OSError as err:
        raise InputError(f"{path} cannot be read ({err.strerror}): name a JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: name a JSONL file") from None
    rows = [parse_row(line, f"{path} line {number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path} holds no prompt: give one JSON object a line, with `prompt` or `turns`")
    return rows[:limit]


def parse_row(line: str, where: str, number: int) -> Conversation:
    """One row. Raises InputError that starts with `where`."""
    try:
        row = parse_json(line)
    except ValueError as err:
        raise InputError(f"{where} is not JSON ({err}): give one object a line") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("turns" in row):
        raise InputError(f"{where} needs either `prompt` (a text) or `turns` (a list of texts)")
    turns = [row["prompt"]] if "prompt" in row else row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise InputError(f"{where}: every turn must be a text that is not empty")
    return Conversation(str(row.get("question_id", row.get("id", number))), tuple(turns))
