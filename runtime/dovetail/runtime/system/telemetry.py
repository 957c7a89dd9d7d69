"""Turn off the usage reports of OpenVINO's Python packages and of ONNX Runtime."""

from __future__ import annotations

import os
import sys


def decline_telemetry() -> None:
    """Stop usage reports of openvino, nncf and ONNX Runtime. Call this before importing them.

    For every report OpenVINO forks a process that may hold a model. ONNX Runtime keeps a device id
    and a queue of events under ~/.cache/Microsoft. Its own switch, after the import, acts too late
    (https://github.com/microsoft/onnxruntime/pull/27379).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed" to import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
