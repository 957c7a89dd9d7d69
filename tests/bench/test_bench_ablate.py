"""The ablation takes a block's weights from the target that was exported, its fused layers included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch", reason="drafters are torch modules")

from safetensors.torch import load_file
from torch import nn

from dovetail.exporter.drafter.export import load_drafter
from dovetail.models.drafter import DraftModel


@pytest.mark.parametrize(("block", "layer"), [(0, 0), (1, 1), (-1, 1)])
def test_a_block_is_copied_from_the_target(
    bench_script: Callable[[str], ModuleType], tiny_llama: Path, tiny_target: Path, tiny_drafter: Path,
    block: int, layer: int,
) -> None:  # fmt: skip
    drafter = load_drafter(tiny_drafter, tiny_target)
    assert isinstance(drafter, DraftModel)
    bench_script("ablate").copy_block(drafter, tiny_target / "openvino_model.xml", block)
    theirs = load_file(tiny_llama / "model.safetensors")
    first = drafter.blocks()[0]
    assert isinstance(first, nn.Module)
    ours = {name: value for name, value in first.named_parameters() if name.endswith("_proj.weight")}
    assert len(ours) == 7
    for name, value in ours.items():
        expected = theirs[f"model.layers.{layer}.{name}"]
        step = (expected.amax(1) - expected.amin(1)).max() / 255  # of INT8
        assert (value - expected).abs().max() <= step
