"""A pair of small files, and a cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, TargetFacts, file_entry, write_manifest

TARGET = TargetFacts(
    model_type="llama", hidden_size=32, feature_size=32, vocab_size=300, num_layers=2, max_context=256,
    weight_format="int8", taps=("norm",), eos_token_ids=(2,), tokenizer_sha256="a" * 64,
)  # fmt: skip
DRAFTER = DrafterFacts(
    blocks=1, hidden_size=32, feature_size=32, target_vocab_size=300, draft_vocab_size=64,
    num_kv_heads=2, head_size=8, top_k=4, tree_slots=64, max_context=256, tokenizer_sha256="a" * 64,
    files={"cpu": "drafter/drafter.int8.onnx", "cuda": "drafter/drafter.fp16.onnx"},
)  # fmt: skip
CONTENTS = {
    "target/openvino_model.bin": b"weights" * 100,
    "drafter/drafter.int8.onnx": b"int8",
    "drafter/drafter.fp16.onnx": b"fp16",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    folder = tmp_path / "pair"
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    entries = {name: file_entry(folder / name) for name in CONTENTS}
    write_manifest(folder, Manifest(name="tiny", target=TARGET, drafter=DRAFTER, files=entries))
    return folder
