"""The header of a GGUF file is read fast and in bounds; its configuration holds every fact that changes the model."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dovetail.exporter.target.gguf.config import gguf_config
from dovetail.exporter.target.gguf.header import read_header, read_model
from dovetail.runtime.errors import SourceError

U32, F32, TEXT, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def raw_gguf(path: Path, *pairs: tuple[str, int, bytes]) -> Path:
    """A GGUF file of metadata alone: key, type, bytes of the value."""
    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return path


def tiny_header(path: Path, arch: str = "llama", **facts: Any) -> Path:
    """A GGUF model of width 8 with two blocks, of one tensor each; `facts` replace those of its namespace."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 2,
        "feed_forward_length": 16,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in facts.items()},
    }
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{arch}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_float32(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((32, 8), np.float32))
    for block in range(2):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_is_what_gguf_reads(tiny_gguf: Path) -> None:
    ours, theirs = read_header(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(
            ours.tensors[tensor.name].read(), gguf.dequantize(tensor.data, tensor.tensor_type)
        )


@pytest.mark.parametrize(
    "pairs",
    [
        [("a", ARRAY, struct.pack("<IQ", U32, 2**60))],
        [("a", ARRAY, struct.pack("<IQ", TEXT, 2**60))],
        [("a", ARRAY, struct.pack("<IQ", ARRAY, 2**60))],
        [("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", U32, 0))],
        [("a", TEXT, struct.pack("<Q", 2**63))],
        [("a", 77, b"")],
        [("a", U32, b"\0\0\0\0"), ("a", U32, b"\0\0\0\0")],
        [("general.architecture", TEXT, text(b"\xff\xfe"))],
        [("general.architecture", U32, b"\1\0\0\0")],
        [("general.alignment", U32, b"\0\0\0\0")],
    ],
    ids=["numbers", "strings", "arrays", "nested", "string", "type", "twice", "no-utf8", "number", "alignment"],
)
def test_malformed_headers_are_refused_at_once(tmp_path: Path, pairs: list[tuple[str, int, bytes]]) -> None:
    path = raw_gguf(tmp_path / "bad.gguf", *pairs)
    begun = time.monotonic()
    with pytest.raises(SourceError, match=r"bad\.gguf") as error:
        gguf_config(read_model(path))
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"block_count": 2**31}, "block_count is 2147483648"),
        ({"block_count": 3}, "block_count is 3, but the file holds 2 blocks"),
        ({"block_count": 1}, "block_count"),
        ({"block_count": None}, "block_count is missing"),
        ({"embedding_length": 0}, "embedding_length is 0"),
        ({"embedding_length": 1}, "embedding_length"),
        ({"embedding_length": 4}, "embedding_length is 4, but token_embd.weight has 8 columns"),
        ({"embedding_length": 7}, "embedding_length"),
        ({"embedding_length": 8.0}, "embedding_length"),
        ({"attention__head_count": 0}, "head_count is 0"),
        ({"attention__head_count": 3}, "head_count is 3"),
        ({"attention__head_count": [2, 4]}, "differs between layers"),
        ({"attention__head_count_kv": 0}, "head_count_kv is 0"),
        ({"attention__head_count": 4, "attention__head_count_kv": 3}, "no multiple of its 3"),
        ({"attention__layer_norm_rms_epsilon": None}, "epsilon is missing"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "no positive number"),
        ({"attention__sliding_window": 16}, "sliding_window"),
        ({"attention__causal": False}, "causal"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"expert_count": 8}, "expert_count"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"vocab_size": 31}, "vocab_size is 31"),
        ({"rope__dimension_count": 2}, "dimension_count is 2"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 4.0}, "longrope"),
        ({"rope__scaling__attn_factor": 1.5}, "attn_factor"),
        ({"rope__scaling__yarn_attn_factor": 1.0}, "yarn_attn_factor"),
        ({"attention__key_length": 4, "attention__value_length": 8}, "value_length is 8"),
    ],
)
def test_facts_that_cannot_be_applied_are_named(tmp_path: Path, facts: dict[str, Any], named: str) -> None:
    path = tiny_header(tmp_path / "bad.gguf", **facts)
    begun = time.monotonic()
    with pytest.raises(SourceError, match=named) as error:
        gguf_config(read_model(path))
    assert "\n" not in str(error.value) and "bad.gguf" in str(error.value)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope__freq_base": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
            {"rope_type": "default", "rope_theta": 10000.0},
        ),
        ({"rope__scaling__factor": 4.0}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 16,
                "rope__scaling__finetuned": True,
                "rope__scaling__yarn_beta_fast": 24.0,
                "rope__scaling__yarn_ext_factor": 1.0,
            },
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 24.0,
            },
        ),
    ],
)
def test_scaling_of_rope_is_applied(tmp_path: Path, facts: dict[str, Any], expected: dict[str, Any]) -> None:
    assert gguf_config(read_model(tiny_header(tmp_path / "m.gguf", **facts)))["rope_parameters"] == expected


def test_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'rwkv7' is none of llama, qwen2"):
        gguf_config(read_model(tiny_header(tmp_path / "m.gguf", "rwkv7")))


def test_layers_with_a_window_turn_by_a_base_of_their_own_in_gemma_3(tmp_path: Path) -> None:
    """llama.cpp has the base of 10,000 in its code, and scales the layers without a window alone."""
    facts = {"rope__freq_base": 1e6, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    config = gguf_config(read_model(tiny_header(tmp_path / "m.gguf", "gemma3", attention__sliding_window=16, **facts)))
    rope = config["rope_parameters"]
    assert rope["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
