"""llama.cpp's GGUF of an EAGLE-3 drafter gives the drafter that the converter read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")

from gguf import GGMLQuantizationType, GGUFWriter
from tests.models.formats.eagle3_forward import chain
from tests.models.formats.test_eagle3 import TARGET, ZERO, D, K, V, drafted, weights
from torch import Tensor

from dovetail.exporter.drafter.gguf_checkpoint import _NAMES, converted
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime.errors import SourceError


def permuted(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q_proj and k_proj."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(file: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    facts: dict[str, Any] = {
        "block_count": 1, "embedding_length": D, "feed_forward_length": 48, "context_length": 128, "vocab_size": V,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 500.0, "extract_layers": [2, 4, 5],
        "target_hidden_size": D, "norm_before_residual": True, "rope.dimension_count": 8, **changes,
    }  # fmt: skip
    writer = GGUFWriter(str(file), changes.get("architecture", "eagle3"))
    for name, value in facts.items():
        if value is None or name == "architecture":
            continue
        kinds: dict[type, Any] = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
            str: writer.add_string,
        }  # fmt: skip
        kinds[type(value)](f"eagle3.{name}", value)
    theirs = {f"{name}.weight": given for given, name in _NAMES.items()}
    for name, tensor in tensors.items():
        if name == "t2d":
            continue
        if name == "d2t":
            ids = (tensor + torch.arange(len(tensor))).numpy()
            writer.add_tensor("d2t", ids, raw_dtype=GGMLQuantizationType.I64)
            continue
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            tensor = permuted(tensor, heads) if f".{part}." in name else tensor
        given = f"{theirs[name]}.weight" if name in theirs else name
        writer.add_tensor(given, tensor.numpy().astype(np.float32 if tensor.dim() == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("parts", [{}, {"embed": False}, {"draft": V}], ids=["own rows", "no embedding", "all tokens"])
def test_a_chain_equals_the_formulas(parts: dict[str, Any], tmp_path: Path) -> None:
    tensors = weights(ZERO, **parts)
    tensors = {name: value.half().float() if value.is_floating_point() else value for name, value in tensors.items()}
    found = find_checkpoint(converted(write_gguf(tmp_path / "a.gguf", tensors)))
    rows = torch.randn(V, D)
    module = found.read(TargetParts(TARGET, tensors.get("embed_tokens.weight", rows), torch.randn(V, D)))
    reference = {"embed_tokens.weight": rows, **tensors}
    taps, tokens = torch.randn(9, 3 * D), torch.randint(0, V, (9,))
    want = chain(reference, replace(ZERO, theta=500.0, norm_before_residual=True), taps, tokens, 4)
    with torch.no_grad():
        got = drafted(module, taps, tokens, 4)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert found.needs(TARGET).layers == (1, 3, 4)
    assert found.needs(TARGET).draft_vocab_size == parts.get("draft", K)


def test_a_conversion_is_kept(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", weights(ZERO))
    folder = converted(file)
    before = (folder / "config.json").stat().st_mtime_ns
    assert converted(file) == folder and (folder / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "llama"}, "--draft-model"),
        ({"block_count": 2}, "block_count"),
        ({"extract_layers": None}, "extract_layers"),
        ({"target_hidden_size": "wide"}, "target_hidden_size"),
        ({"rope.scaling.type": "yarn"}, "scaled RoPE"),
        ({"attention.head_count": 0}, "heads"),
        ({"attention.head_count": 7}, "do not divide"),
    ],
)
def test_a_file_that_is_no_such_drafter_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", weights(ZERO), **changes)
    with pytest.raises(SourceError, match=said) as error:
        converted(file)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {**weights(ZERO), "rope_freqs.weight": torch.ones(4)}
    with pytest.raises(SourceError, match="rope_freqs"):
        converted(write_gguf(tmp_path / "a.gguf", tensors))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", weights(ZERO))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(SourceError, match="truncated"):
        converted(file)
