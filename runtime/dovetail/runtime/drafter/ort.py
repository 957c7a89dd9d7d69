"""ONNX Runtime: sessions that are opened, and calls whose failures are one line."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.files import open_regular
from dovetail.runtime.system.telemetry import decline_telemetry

decline_telemetry()  # whoever embeds this has no command line that would

CPU = "CPUExecutionProvider"
_LOOP = b'"\x04Loop'  # an operator's type, as protobuf writes it: of all operators it alone may never end


def session_options(ort: Any) -> Any:
    """Options of a session whose errors reach the user as exceptions, and not on stderr as well."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def open_session(ort: Any, model: Path | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """Load a graph; providers that do not start are an error, or missing in the session.  Raises DeviceError.

    For any provider but the CPU's, ONNX Runtime's own log is silenced meanwhile, and then back at its default.
    """
    if isinstance(model, Path):
        _check_endless(model)
    source, what = (str(model), model) if isinstance(model, Path) else (model, "a graph")
    quiet = providers != [CPU]
    if quiet:
        ort.set_default_logger_severity(4)  # what fails is told below, in one line
    try:
        return ort.InferenceSession(source, options, providers=list(providers), enable_fallback=0)
    except failures() as error:
        raise _failed(f"ONNX Runtime cannot load {what}", error, "export the drafter again") from error
    finally:
        if quiet:
            ort.set_default_logger_severity(2)


def _check_endless(file: Path) -> None:
    """Raise DeviceError for a graph that could run for ever, or a file that cannot be read."""
    try:
        with open_regular(file) as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            endless = content.find(_LOOP) >= 0
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise DeviceError(f"{file} cannot be read ({error}): export the drafter again") from None
    if endless:
        raise DeviceError(f"{file} holds a Loop, which no drafter has and which may never end: export it again")


def call(session: Any, binding: Any, run_options: Any = None) -> None:
    """Run a bound graph.  Raises DeviceError."""
    try:
        session.run_with_iobinding(binding, run_options)
    except failures() as error:
        raise _failed("the drafter failed", error, "generate without speculation") from error


def _failed(what: str, error: Exception, remedy: str) -> DeviceError:
    """remedy: where it is not memory that lacks."""
    said = one_line(error)
    if any(word in said.lower() for word in ("failed to allocate", "out of memory", "available memory")):
        remedy = "free memory, or shorten the drafter's context on a GPU with --vram SIZE --fit"
    return DeviceError(f"{what}: {said}: {remedy}")


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own exceptions have no common base; a run with bindings raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, *own)


def one_line(error: Exception) -> str:
    """What an engine says, fit for a message of ours."""
    return " ".join(str(error).split())[:300]
