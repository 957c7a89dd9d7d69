"""ONNX Runtime: open sessions and run them, with each failure in one line."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from dovetail.runtime.devices.work import Work
from dovetail.runtime.errors import DeviceError, one_line
from dovetail.runtime.system.files import open_regular
from dovetail.runtime.system.telemetry import decline_telemetry

decline_telemetry()  # the commands do so too, but an embedding program may not

CPU = "CPUExecutionProvider"
# WebGPU has no error for a buffer without memory; a copy from the buffer then fails.
# OpenVINO names OpenCL's errors.
_NO_MEMORY = (
    "failed to allocate", "out of memory", "available memory", "invalid buffer",
    "out of gpu resources", "exceeded max size of memory", "allocation_failure",
)  # fmt: skip
_LOOP = b'"\x04Loop'  # an operator's type as protobuf writes it; only a Loop may never end


def session_options(ort: Any) -> Any:
    """Return options of a session that reports errors as exceptions and not also on stderr."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def placed_options(ort: Any, **sizes: int) -> Any:
    """Return options of a session on a GPU that records where nodes run. sizes: of the graph's named axes."""
    options = session_options(ort)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    return options


def open_session(
    ort: Any, model: Path | bytes, options: Any, providers: Sequence[Any], work: Work, remedy: str | None = None
) -> Any:
    """Load a graph. Raises DeviceError.

    providers: none if the options have one. remedy: for a graph that the provider does not load,
    None to say that the file is at fault.
    A provider that does not start is an error, or missing in the session. For any provider except
    the CPU's, ONNX Runtime's own log is silent meanwhile and then back at its default.
    """
    if isinstance(model, Path):
        check_endless(model, work)
    source, what = (str(model), model) if isinstance(model, Path) else (model, "a graph")
    quiet = providers != [CPU]
    if quiet:
        ort.set_default_logger_severity(4)  # the exception below reports a failure in one line
    try:
        return ort.InferenceSession(source, options, providers=list(providers) or None, enable_fallback=0)
    except failures() as error:
        raise failed(f"ONNX Runtime cannot load {what}", error, work, remedy or work.again) from error
    finally:
        if quiet:
            ort.set_default_logger_severity(2)


def check_endless(file: Path, work: Work) -> None:
    """Raise DeviceError for a graph with a Loop, or for an unreadable file."""
    try:
        with open_regular(file) as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            endless = content.find(_LOOP) >= 0
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise DeviceError(f"{file} cannot be read ({error}): {work.again}") from None
    if endless:
        raise DeviceError(f"{file} holds a Loop, which may never end: {work.again}")


def check_placement(session: Any, provider: str, work: Work) -> None:
    """Raise DeviceError unless every node runs on `provider`. The message names the other nodes.

    session: with placed_options.
    """
    if session.get_providers()[0] != provider:
        raise DeviceError(f"ONNX Runtime could not load its {provider}: run dovetail-run doctor for the reason")
    elsewhere = [
        f"{node.op_type} {node.name!r} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    ]
    if elsewhere:
        more = f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else ""
        raise DeviceError(
            f"{len(elsewhere)} nodes would not run on {provider}: {', '.join(elsewhere[:3])}{more}: {work.off}"
        )


def call(session: Any, binding: Any, work: Work, run_options: Any = None) -> None:
    """Run a bound graph. Raises DeviceError."""
    try:
        session.run_with_iobinding(binding, run_options)
    except failures() as error:
        raise run_failed(error, work) from error


def run_failed(error: Exception, work: Work) -> DeviceError:
    """Return the error for a call that failed, or for a copy around it."""
    return failed(f"{work.name} failed", error, work, work.without)


def failed(what: str, error: Exception, work: Work, remedy: str) -> DeviceError:
    """Return the error for a failed call. remedy: for failures other than a lack of memory."""
    said = one_line(error)[:300]
    if any(word in said.lower() for word in _NO_MEMORY):
        remedy = f"free memory, or {work.less}"
    return DeviceError(f"{what}: {said}: {remedy}")


def failures() -> tuple[type[Exception], ...]:
    """Return ONNX Runtime's exceptions, which share no base. Bound runs raise RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, *own)
