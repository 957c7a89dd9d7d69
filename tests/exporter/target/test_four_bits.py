"""Four-bit weights of every kind of source: the pair holds them, and drafts change no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.runtime import Engine, TreeLimits
from dovetail.runtime.target.graph import read_model

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = "to be, or not to be, or not to be, or not"
END = 258  # the token that ends a text of tiny_llama
IN_BLOCKS = 2 * 4  # layers of tiny_llama's two blocks, with q, k and v as one and gate and up as one


def stored(pair: Path) -> Counter[str]:
    """How many layers' weights have each type."""
    found = Counter[str]()
    for node in read_model(pair / "target/openvino_model.xml").get_ops():
        if node.get_type_name() == "MatMul":
            before = node.input_value(1).get_node()
            while before.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape"):
                before = before.input_value(0).get_node()
            if before.get_type_name() == "Constant":
                found[before.get_element_type().get_type_name()] += 1
    return found


def assert_drafts_change_no_token(pair: Path) -> None:
    """The drafts are the plain answer before: a random model repeats itself too seldom."""
    with Engine.from_pretrained(pair, tree=TreeLimits(width=24, lookup=24), lookup_cache=1000) as engine:
        for sampling in ({}, {"temperature": 1.0, "seed": 3}):
            asked: dict[str, Any] = {"raw": True, "logit_bias": {END: -100.0}, **sampling}
            plain = engine.generate(PROMPT, 120, speculate=False, **asked)
            drafted = engine.generate(PROMPT, 120, **asked)
            assert drafted.token_ids == plain.token_ids and plain.metrics.drafted == 0
            assert len(drafted.token_ids) == 120 and drafted.metrics.accepted > 60


@pytest.mark.parametrize(
    ("source", "options", "types"),
    [
        ("tiny_llama", {"sym": False}, {"u4": IN_BLOCKS, "u8": 1}),
        ("tiny_llama", {"sym": True}, {"i4": IN_BLOCKS, "u8": 1}),
        ("tiny_llama", {"all_layers": True}, {"u4": IN_BLOCKS + 1}),
        ("tiny_gguf", {"sym": False}, {"u4": IN_BLOCKS, "u8": 1}),
    ],
)
def test_a_checkpoint_becomes_a_four_bit_target(
    source: str, options: dict[str, Any], types: dict[str, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    weights = WeightOptions("int4", group_size=16, ratio=1.0, **options)
    export_target(str(request.getfixturevalue(source)), tmp_path / "pair", options=TargetOptions(weights))
    assert check_pair_folder(tmp_path / "pair").target.weight_format == "int4"
    assert stored(tmp_path / "pair") == types
    assert_drafts_change_no_token(tmp_path / "pair")


@pytest.mark.parametrize(
    ("ratio", "most", "types"), [("1", "int4", {"u4": IN_BLOCKS, "u8": 1}), ("0.5", "int8", {"u4": 4, "u8": 8})]
)
def test_a_four_bit_ir_of_optimum_stays_as_it_is(
    ratio: str, most: str, types: dict[str, int], optimum_ir: Callable[..., Path], tmp_path: Path
) -> None:
    """With a lower ratio some layers have 8 bits, so query, key and value may stay apart."""
    ir = optimum_ir("--weight-format", "int4", "--group-size", "16", "--ratio", ratio)
    export_target(str(ir), tmp_path / "pair")
    assert check_pair_folder(tmp_path / "pair").target.weight_format == most
    assert stored(tmp_path / "pair") == types
    assert_drafts_change_no_token(tmp_path / "pair")
