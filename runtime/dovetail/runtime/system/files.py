"""Read files that a stranger may have written: regular, of bounded size, JSON of bounded depth."""

from __future__ import annotations

import errno
import json
import math
import stat
import warnings
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from tokenize import TokenError
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT_BYTES = 64 << 20  # largest JSON or text file
JSON_DEPTH = 64  # nested objects and lists; libraries copy what they read by recursion
ARRAY_BYTES = 64 << 20  # largest size of unpacked arrays, or
ARRAY_RATIO = 50  # times the archive's size: token ids shrink to a fraction, zeros to a thousandth

NO_DEFAULTS: Mapping[str, NDArray[Any]] = MappingProxyType({})

# Exceptions that numpy raises for an unreadable archive. TokenError comes from headers that are no
# Python literals.
_ARRAY_FAILURES = (
    OSError, EOFError, KeyError, IndexError, TypeError, ValueError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, TokenError, BadZipFile, ZlibError, UserWarning,
)  # fmt: skip


def check_regular(file: Path) -> None:
    """Raise OSError if `file` is a pipe, a device or a socket: reading them may never end."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder fails by itself
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def open_regular(file: Path) -> BufferedReader:
    """Open `file` for reading. Raises OSError, also if `file` is not a regular file."""
    check_regular(file)
    return file.open("rb")


def read_bytes(file: Path, most: int = TEXT_BYTES) -> bytes:
    """Return the content of `file`. Raises OSError, and ValueError for more than `most` bytes."""
    with open_regular(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most >> 20} MiB")
    return content


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for deep or non-Unicode JSON.

    finite: refuse NaN, infinity, and numbers that become infinite.
    """
    try:
        value = json.loads(text, parse_float=_finite if finite else None, parse_constant=_finite if finite else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no valid text") from None
    return value


def read_json(file: Path, failure: type[Exception], remedy: str) -> Any:
    """Return the value in a JSON file. Raises `failure` with `remedy`.

    A missing file raises FileNotFoundError or NotADirectoryError.
    """
    try:
        return parse_json(read_bytes(file).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise failure(f"{file} cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise failure(f"{file} is not valid JSON ({error}): {remedy}") from None


def read_object(file: Path, failure: type[Exception], remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file, {} without a file. Raises `failure` with `remedy`."""
    try:
        content = read_json(file, failure, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not isinstance(content, dict):
        raise failure(f"{file} holds a {type(content).__name__}, not an object: {remedy}")
    return content


def read_arrays(
    file: Path, names: tuple[str, ...], failure: type[Exception], remedy: str,
    defaults: Mapping[str, NDArray[Any]] = NO_DEFAULTS,
) -> list[NDArray[Any]]:  # fmt: skip
    """Return arrays of an .npz file of bounded size. Raises `failure` with `remedy`.

    defaults: of arrays that older files lack.
    """
    import numpy as np  # the commands check their arguments with this module and must start without numpy

    try:
        with open_regular(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of a header of Python 2, which Dovetail never writes
            with ZipFile(stream) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > max(ARRAY_BYTES, ARRAY_RATIO * file.stat().st_size):
                raise ValueError(f"the archive unpacks to {size >> 20} MiB")
            stream.seek(0)
            with np.load(stream) as data:
                return [defaults[name] if name in defaults and name not in data else data[name] for name in names]
    except _ARRAY_FAILURES as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise failure(f"{file} cannot be read ({reason:.200}): {remedy}") from error


def check_text(what: str, text: str, failure: type[Exception]) -> None:
    """Raise `failure` if `text` is not valid Unicode or holds a NUL, which files refuse."""
    if "\0" in text or printable(text) != text:
        raise failure(f"{what} {text!r:.80} is no valid text: leave out NUL and bytes that are not UTF-8")


def printable(text: str) -> str:
    """Return `text` with lone surrogates escaped, for file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(text: str, most: int = 300) -> str:
    """Return a stranger's `text` for one line of a terminal: printable, and cut to `most` characters."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number:.20} is no finite number")
    return value


def _inside(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
