"""Prompts of a given length: a module of Python's standard library, and a task about it.

    python tests/bench/long_prompts.py PAIR 16384 > 16k.jsonl

Each prompt has the given number of PAIR's tokens, the chat template included, to within 16.  Modules follow one another
where one alone is too short.  Prompts of one length share no module.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dovetail.runtime.errors import InputError
from dovetail.runtime.text.tokenizer import Tokenizer

TASK = "Write a short manual for the most important class of this code, with an example:\n\n"
SMALLEST = 30_000  # bytes of a module
CLOSE = 16  # tokens between the length of a prompt and the one that was asked for


def modules() -> list[str]:
    """The larger modules of the standard library, in the order of their names."""
    folder = Path(json.__file__).parents[1]
    return [path.read_text() for path in sorted(folder.glob("*.py")) if path.stat().st_size >= SMALLEST]


def cut(tokenizer: Tokenizer, code: str, tokens: int) -> str:
    """A prompt of about `tokens` tokens that begins with TASK and goes on with `code`."""
    low, high = 0, len(code)  # characters: fewer and more than are needed
    while True:
        middle = (low + high) // 2
        text = TASK + code[:middle]
        length = len(tokenizer.encode_chat([{"role": "user", "content": text}]))
        if abs(length - tokens) < CLOSE or high - low < 2:
            return text
        low, high = (middle, high) if length < tokens else (low, middle)


def prompts(tokenizer: Tokenizer, tokens: int, wanted: int) -> list[str]:
    """`wanted` prompts of `tokens` tokens. Raises InputError if the library is too short."""
    made: list[str] = []
    code = ""
    for module in modules():
        code += module
        if len(tokenizer.encode(TASK + code)) >= tokens:
            made.append(cut(tokenizer, code, tokens))
            code = ""
        if len(made) == wanted:
            return made
    raise InputError(f"the standard library has text for {len(made)} prompts of {tokens} tokens: ask for fewer")


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("tokens", type=click.IntRange(64))
@click.option("--count", "wanted", type=click.IntRange(1), default=3, show_default=True)
def main(pair: Path, tokens: int, wanted: int) -> None:
    """Print prompts of TOKENS tokens as JSONL."""
    try:
        for text in prompts(Tokenizer.from_folder(pair / "target"), tokens, wanted):
            click.echo(json.dumps({"prompt": text}))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
