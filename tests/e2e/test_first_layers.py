"""The first layers of SmolLM2 on a device: the target's own text with any draft, few bytes, and the planned memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.target.layers.device import OrtDevice

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = ("Write a Python function that returns the mean of a list.", "Name three fruits.")
TREES = TreeLimits(12, 4, 3), TreeLimits(24, 6, 3, lookup=0), TreeLimits(6, 5, 1)
HIDDEN = 576
TOKENS = 10


@pytest.mark.parametrize(("layers", "trees"), [(1, 3), (15, 2), (29, 1)])  # a CPU takes 0.5 s for a call of 29
def test_drafts_change_no_token(pair: Path, monkeypatch: pytest.MonkeyPatch, layers: int, trees: int) -> None:
    """Layers 2 and 15 are read by the drafter: their share of the features comes from the device."""
    monkeypatch.setattr("dovetail.runtime.load.layer_device", lambda _: OrtDevice.cpu())
    plain = {}
    with Engine.from_pretrained(pair, gpu_layers=layers, tree=TREES[0]) as engine:
        for prompt in PROMPTS:
            alone = engine.generate(prompt, TOKENS, speculate=False)
            plain[prompt] = alone.token_ids
            rounds = alone.metrics.rounds
            assert 0 < alone.metrics.bus_bytes < rounds * (2 * HIDDEN * 4 + 4096)
            for tree in TREES[:trees]:
                engine.reset()
                drafted = engine.generate(prompt, TOKENS, tree=tree)
                assert drafted.token_ids == plain[prompt]
                rounds = drafted.metrics.rounds
                assert drafted.metrics.bus_bytes < rounds * (2 * tree.width * HIDDEN * 4 + 4096)
            assert rounds < TOKENS - 1  # some drafts were right
    with BatchEngine.from_pretrained(pair, gpu_layers=layers, tree=TREES[0], slots=2) as batch:
        jobs = {prompt: batch.submit(batch.ask(prompt, TOKENS)) for prompt in PROMPTS}
        found = {id(job): list[int]() for job in jobs.values()}
        while not batch.idle:
            for job, chunk in batch.step():
                assert not isinstance(chunk, DovetailError)
                found[id(job)] += chunk.token_ids
    assert {prompt: tuple(found[id(job)]) for prompt, job in jobs.items()} == plain


MEASURE = """
import ctypes, gc, sys
from pathlib import Path
import onnxruntime as ort
from dovetail.runtime.target.features import layer_outputs
from dovetail.runtime.target.graph import read_model, to_paged
from dovetail.runtime.target.layers import session
from dovetail.runtime.target.layers.attention import prefixes
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.target.layers.graph import translate
from dovetail.runtime.target.layers.plan import plans
from dovetail.runtime.target.layers.session import Call, LayerSession

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return 1024 * int(dict(line.split(":") for line in lines)["Anonymous"].split()[0])

# As on CUDA: an arena that takes what is asked for. No second copy of weights for the CPU's kernels.
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
placed_options = session.placed_options

def options(ort, **sizes):
    made = placed_options(ort, **sizes)
    made.add_session_config_entry("session.use_env_allocators", "1")
    made.add_session_config_entry("session.disable_prepacking", "1")
    return made

session.placed_options = options
xml, device, layers, tokens = Path(sys.argv[1]), OrtDevice.cpu(compressed=True), 12, 8192
model = read_model(xml)
outputs = layer_outputs(model)
to_paged(model)

def opened(count, tokens):
    kinds = {"kv_type": device.kv_type, "compressed": True}
    held = LayerSession(translate(outputs, count, None, capacity=tokens, **kinds), device, 1, threads=2)
    for _ in range(3):
        held.run(0, Call.empty(tokens), prefixes(tokens)[-1], 32)
    return held

opened(1, 64).close()  # what ONNX Runtime itself takes
before = anonymous()
held = opened(layers, tokens)
taken = anonymous() - before
print(taken, plans(xml, device, tokens, 1)[layers - 1].total)
"""


def test_the_plan_is_within_a_twentieth_of_what_is_taken(pair: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(pair / "target" / "openvino_model.xml")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    taken, planned = map(int, told.stdout.split())
    assert planned == pytest.approx(taken, rel=0.05)
