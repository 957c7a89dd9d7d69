"""`import dovetail.runtime` costs numpy and the standard library; everything it exports can be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dovetail.runtime as runtime

PROBE = """
import sys
before = set(sys.modules)
import numpy
with_numpy = set(sys.modules)
import dovetail.runtime
{use}
added = {{name.partition(".")[0] for name in set(sys.modules) - with_numpy}}
import json
print(json.dumps(sorted(added - set(sys.stdlib_module_names) - {{"numpy"}})))
"""


def third_party_after(use: str) -> list[str]:
    """Top-level modules, neither numpy's nor the standard library's, that are loaded after `use`."""
    code = PROBE.format(use=use)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


@pytest.mark.parametrize(
    "use",
    [
        "",
        "dovetail.runtime.Engine, dovetail.runtime.ScriptedTarget, dovetail.runtime.TreeLimits",
        "from dovetail.runtime import *",
    ],
)
def test_importing_costs_numpy_alone(use: str) -> None:
    assert third_party_after(use) == ["dovetail"]


def test_a_bare_import_loads_no_module_of_its_own() -> None:
    code = "import sys, dovetail.runtime; print([n for n in sys.modules if n.startswith('dovetail.runtime.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_is_sorted_and_loads() -> None:
    assert runtime.__all__ == sorted(set(runtime.__all__))
    assert set(runtime.__all__) <= set(dir(runtime))
    for name in runtime.__all__:
        assert getattr(runtime, name) is not None


def test_every_error_is_exported() -> None:
    errors = import_module("dovetail.runtime.errors")
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(runtime.__all__)


def test_no_exported_name_hides_a_module() -> None:
    for name in runtime.__all__:
        with pytest.raises(ModuleNotFoundError):
            import_module(f"dovetail.runtime.{name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        runtime.Enigne  # noqa: B018


def test_nothing_is_reported(tmp_path: Path, tiny_full_pair: Path) -> None:
    """ONNX Runtime would leave a device id and a queue of events at home, OpenVINO's packages call their own."""
    code = (
        "import sys; from dovetail.runtime import Engine\n"
        f"with Engine.from_pretrained({str(tiny_full_pair)!r}, drafter_device='cpu') as engine:\n"
        "    engine.generate('a', 2, raw=True)\n"
        "assert sys.modules['openvino_telemetry'] is None and 'onnxruntime' in sys.modules"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "DOVETAIL_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env={**inherited, **own})
    assert cache.is_dir() and not list(home.iterdir())
