"""OpenVINO's Python packages and ONNX Runtime report their use unasked; Dovetail declines for both."""

from __future__ import annotations

import os
import sys


def decline_telemetry() -> None:
    """Keep openvino, nncf and ONNX Runtime from reporting; call it before one of them is imported.

    Every report of OpenVINO's is a fork of a process that may hold a model, and a wait of a second where there is no
    network.  ONNX Runtime keeps a device id and a queue of events under ~/.cache/Microsoft; its own switch after the
    import comes too late (https://github.com/microsoft/onnxruntime/pull/27379).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed" to import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
