"""A CPU with AVX2 and nothing newer, emulated: a pair opens there, and computes what it computes here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

QEMU = shutil.which("qemu-x86_64")
# The emulated process still reads this machine's /proc/cpuinfo, so the properties for such a CPU are asked for.
SCRIPT = """
import json, sys; from pathlib import Path
import numpy as np, openvino as ov
from dovetail.runtime import DraftTree, Engine, TreeLimits, read_manifest
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.target.openvino import OpenVINOTarget

pair, config = Path(sys.argv[1]), json.loads(sys.argv[2])
target = OpenVINOTarget.load(pair, read_manifest(pair), ov_config=config)
seq, tokens = target.open(), np.arange(40) * 37 % 260
features = np.array(target.prefill(seq, tokens).features)
tree = DraftTree(np.array([5, 6, 7, 8]), np.array([-1, 0, 0, 1]), np.zeros(4))
logits = np.array(target.verify({seq: tree})[seq].logits)
drafter, limits = open_drafter(pair, read_manifest(pair), device="cpu"), TreeLimits(8, 4, 3, lookup=0)
drafter.extend(seq, tokens[1:], features[:-1])
tree = drafter.propose(seq, limits)
engine = Engine.from_pretrained(pair, drafter_device="cpu", tree=limits, ov_config=config)
texts = [engine.generate("the quick brown fox", 16, raw=True, speculate=also).token_ids for also in (True, False)]
found = {"capabilities": ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), "logits": logits.tolist()}
print(json.dumps({**found, "tree": tree.tokens.tolist(), "logprobs": tree.logprobs.tolist(), "texts": texts}))
"""


def run(command: list[str], pair: Path, config: dict[str, str]) -> dict[str, Any]:
    """What SCRIPT finds for a pair, with these properties of OpenVINO."""
    arguments = [*command, sys.executable, "-c", SCRIPT, str(pair), json.dumps(config)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="there is no qemu-x86_64 (Debian: apt-get install qemu-user)")
def test_a_pair_computes_on_avx2_what_it_computes_here(tiny_full_pair: Path) -> None:
    from dovetail.runtime.target.properties import default_properties

    assert QEMU
    old = run([QEMU, "-cpu", "Haswell"], tiny_full_pair, default_properties({"avx2"}))
    here = run([], tiny_full_pair, {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    assert "FP32" in old["capabilities"] and not {"BF16", "FP16"} & set(old["capabilities"])  # both need AVX-512
    np.testing.assert_allclose(old["logits"], here["logits"], atol=1e-3)
    assert old["tree"] == here["tree"]
    np.testing.assert_allclose(old["logprobs"], here["logprobs"], atol=1e-2)
    assert old["texts"][0] == old["texts"][1] == here["texts"][1]
