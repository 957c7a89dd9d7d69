"""The real pair with its drafter on WebGPU, on SwiftShader: the text is that of the CPU's drafter."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.drafter.vram import LEAST_CONTEXT

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("swiftshader")]

PROMPT = 'Complete the following Python function.\n\ndef mean(xs):\n    """Return the arithmetic mean of a list."""\n'
TREE = TreeLimits(width=12, depth=3, top_k=4, lookup=0)


def test_the_text_is_that_of_the_cpu_s_drafter(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # SwiftShader takes seconds for a prompt's call over 4,096 pairs.
    monkeypatch.setattr("dovetail.runtime.drafter.vram.CONTEXT", LEAST_CONTEXT)
    found = []
    for device in ("cpu", "webgpu"):
        with Engine.from_pretrained(pair, drafter_device=device, tree=TREE) as engine:
            found.append(engine.generate(PROMPT, 16))
            assert engine.drafter_device == {"cpu": "CPU (int8)", "webgpu": "WebGPU (int8)"}[device]
    cpu, webgpu = found
    assert webgpu.token_ids == cpu.token_ids
    # Both quantise activations, in blocks of their own: near ties may be drafted otherwise.
    assert webgpu.metrics.acceptance_length > 0.8 * cpu.metrics.acceptance_length
    assert webgpu.metrics.bus_bytes > 0
