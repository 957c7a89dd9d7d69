"""OpenVINO's Python packages report their use to Google Analytics unasked; the command lines decline."""

from __future__ import annotations

import sys


def decline_telemetry() -> None:
    """Keep openvino and nncf from reporting imports and conversions; call it before openvino is imported.

    Every report is a fork of a process that may hold a model, and a wait of a second where there is no network.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed" to import
