"""Which of OpenVINO's GPUs is taken: OpenVINO's CPU stands for the first of several GPUs."""

from __future__ import annotations

import pytest

from dovetail.runtime.devices import openvino
from dovetail.runtime.devices.gpus import gpu_expected
from dovetail.runtime.devices.openvino import CHOICE, OpenVinoDevice, chosen_gpu, openvino_gpu_problem, openvino_gpus
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that OpenVINO's GPUs have here."""
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setattr(openvino, "GPU", "CPU")
    return "CPU"


@pytest.mark.parametrize("chosen", [None, "CPU", "CPU.0"])
def test_the_first_gpu_is_taken_unless_another_is_chosen(
    family: str, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    if chosen:
        monkeypatch.setenv(CHOICE, chosen)
    assert openvino_gpu_problem() is None and gpu_expected("openvino-gpu") and chosen_gpu() == (chosen or family)
    assert OpenVinoDevice(DRAFTING).name == openvino_gpus()[family]


def test_the_chosen_gpu_is_taken(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {f"{family}.0": "Intel(R) UHD Graphics", f"{family}.1": "Intel(R) Arc(TM) A770"}
    monkeypatch.setattr(openvino, "openvino_gpus", lambda: gpus)
    monkeypatch.setattr(openvino, "gpu_facts", gpus.get)
    monkeypatch.setenv(CHOICE, f"{family}.1")
    assert OpenVinoDevice(DRAFTING).name == "Intel(R) Arc(TM) A770"


@pytest.mark.parametrize("chosen", ["CPU.7", "1", "NPU"])
def test_a_gpu_that_is_not_there_is_one_line_with_the_names(
    family: str, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv(CHOICE, chosen)
    with pytest.raises(DeviceError, match=f"{CHOICE} is '{chosen}', but OpenVINO's GPUs are CPU: name one"):
        OpenVinoDevice(DRAFTING)
    assert gpu_expected("openvino-gpu")  # so that "auto" warns


def test_no_gpu_is_expected_where_none_is_found_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "GPU", "NONE")
    monkeypatch.delenv(CHOICE, raising=False)
    assert not gpu_expected("openvino-gpu")
    assert "intel-opencl-icd" in str(openvino_gpu_problem())
