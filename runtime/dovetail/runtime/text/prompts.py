"""Read prompts: text files, and JSONL rows with `prompt`, or `turns` as in spec_bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.files import parse_json

TEXT_MOST = 1 << 30  # bytes of a text: a device or a file of weights must not fill the memory


@dataclass(frozen=True)
class PromptTurns:
    """A user's turns in one conversation, asked one after the other."""

    name: str  # the row's `question_id` or `id`, otherwise the number of its line
    turns: tuple[str, ...]


def read_prompts(path: Path, limit: int | None = None) -> list[PromptTurns]:
    """Return the first `limit` rows of `path`. Raises InputError, which names file and line."""
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is out of range: give 1 or more")
    lines = read_text(path, "a JSONL file").split("\n")  # splitlines would also split at U+2028
    rows = [parse_row(line, f"{path} line {number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path} holds no prompt: give one JSON object a line, with `prompt` or `turns`")
    return rows[:limit]


def read_text(path: Path, kind: str) -> str:
    """Return the text of `path`, as `read_stream` reads it. kind: of the file. Raises InputError."""
    try:
        with path.open("rb") as stream:  # a pipe too, as the shell's <(COMMAND)
            return read_stream(stream, str(path))
    except OSError as err:
        raise InputError(f"{path} cannot be read ({err.strerror}): name {kind}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: name {kind}") from None


def read_stream(stream: BinaryIO, name: str) -> str:
    """Return UTF-8 text without byte order mark and final line break; line breaks become \\n.

    Raises OSError, UnicodeDecodeError, and InputError for a long text.
    """
    content = bytearray()
    while part := stream.read(1 << 20):  # read(n) takes n bytes of memory also for a short text
        content += part
        if len(content) > TEXT_MOST:
            raise InputError(f"{name} has more than {TEXT_MOST >> 30} GiB: name a smaller text")
    text = content.decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def parse_row(line: str, where: str, number: int) -> PromptTurns:
    """Return the turns of one row. Raises InputError with a message that starts with `where`."""
    try:
        row = parse_json(line)
    except ValueError as err:
        raise InputError(f"{where} is not JSON ({err}): give one object a line") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("turns" in row):
        raise InputError(f"{where} is no prompt: give either `prompt` (a text) or `turns` (a list of texts)")
    turns = [row["prompt"]] if "prompt" in row else row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise InputError(f"{where} has an empty turn, or one that is not text: give a text for every turn")
    return PromptTurns(str(row.get("question_id", row.get("id", number))), tuple(turns))
