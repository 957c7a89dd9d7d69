"""A runner for `dovetail-run`, a tiny pair folder, scripted engines, and a cache of its own for every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dovetail.runtime.cli.main import cli
from dovetail.runtime.engine import Engine
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, TargetFacts, file_entry, write_manifest
from dovetail.runtime.testing.scripted import LogitsOf, MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer

CONFIG = json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4})
DIGEST = "0" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DOVETAIL_CACHE", str(folder))
    return folder


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def invoke(*args: str, obj: object = None, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(cli, list(args), obj=obj, input=input, prog_name="dovetail-run")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return invoke


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Path]:
    def make_pair(folder: Path = tmp_path / "tiny", config: str = CONFIG) -> Path:
        files = {
            "target/openvino_model.bin": bytes(4096),
            "target/config.json": config.encode(),
            "drafter/drafter.int8.onnx": bytes(1024),
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        target = TargetFacts(
            model_type="llama", hidden_size=16, feature_size=16, vocab_size=32, num_layers=2, max_context=2**20,
            weight_format="int8", taps=("norm",), eos_token_ids=(0,), tokenizer_sha256=DIGEST,
        )  # fmt: skip
        drafter = DrafterFacts(
            blocks=1, hidden_size=16, feature_size=16, target_vocab_size=32, draft_vocab_size=8,
            num_kv_heads=2, head_size=4, top_k=4, tree_slots=64, max_context=2**20, tokenizer_sha256=DIGEST,
            files={"cpu": "drafter/drafter.int8.onnx"},
        )  # fmt: skip
        entries = {name: file_entry(folder / name) for name in files}
        write_manifest(folder, Manifest(name="tiny", target=target, drafter=drafter, files=entries))
        return folder

    return make_pair


@pytest.fixture
def pair(make_pair: Callable[..., Path]) -> Path:
    return make_pair()


ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!'\n"
LOGITS = MarkovLogits(len(ALPHABET), seed=3)


class RecordingEngine(Engine):
    """A scripted engine that remembers what it was asked for."""

    def __init__(self, logits_of: LogitsOf = LOGITS, drafter: bool = True, max_context: int = 4096) -> None:
        super().__init__(
            ScriptedTarget(logits_of, max_context),
            ScriptedDrafter.copy_of(LOGITS, noise=1.0) if drafter else None,
            ScriptedTokenizer(ALPHABET, has_chat_template=True),
        )
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def stream(self, prompt: Any, max_new_tokens: int = 256, **options: Any) -> Any:
        self.asked.append((prompt, {"max_new_tokens": max_new_tokens, **options}))
        return super().stream(prompt, max_new_tokens, **options)


class FakeOpener:
    """Stands in for Engine.from_pretrained; remembers how it was called, but for who is told of the progress."""

    def __init__(self, **engine: Any) -> None:
        self.engine = RecordingEngine(**engine)
        self.calls: list[tuple[Path, dict[str, Any]]] = []

    def __call__(self, pair: Path, /, *, progress: Any, **options: Any) -> Engine:
        self.calls.append((pair, options))
        return self.engine


def interrupting(after: int) -> LogitsOf:
    """Logits that press Ctrl-C once, when they were asked for `after` times."""
    count = 0

    def logits_of(prefix: tuple[int, ...]) -> Any:
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt
        return LOGITS(prefix)

    return logits_of


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
def make_opener() -> type[FakeOpener]:
    return FakeOpener


@pytest.fixture
def interrupted_opener() -> Callable[[int], FakeOpener]:
    return lambda after: FakeOpener(logits_of=interrupting(after))
