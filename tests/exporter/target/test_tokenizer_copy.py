"""The probe lets a faithful copy pass and names everything that another tokenizer would do differently."""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dovetail.exporter.target.tokenizer_copy import ROUND_TRIPS, copy_tokenizer, probe_tokenizer
from dovetail.runtime.errors import ExportError, SourceError
from dovetail.runtime.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


def byte_level(merges: list[tuple[str, str]]) -> Backend:
    tokens = [*ALPHABET, *(left + right for left, right in merges)]
    backend = Backend(BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return backend


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(byte_level([("t", "h"), ("th", "e")]).to_str())
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_copy_is_the_source_to_the_byte_and_passes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "target"
    encode = copy_tokenizer(source, out)
    probe_tokenizer(out, encode)
    for file in source.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_files_of_another_tokenizer_do_not_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "target"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    (out / "added_tokens.json").write_text('{"<other>": 7}')
    (out / "config.json").write_text("{}")
    copy_tokenizer(source, out)
    assert sorted(file.name for file in out.iterdir()) == sorted(["config.json", *(f.name for f in source.iterdir())])


def test_lost_spaces_are_all_named_in_one_error(source: Path) -> None:
    backend = byte_level([])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), backend.pre_tokenizer])
    (source / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ExportError) as caught:
        probe_tokenizer(source)
    assert str(caught.value).count("comes back as") == len(ROUND_TRIPS)
    assert "\n" not in str(caught.value)


def test_other_ids_are_named_though_the_text_survives(source: Path, tmp_path: Path) -> None:
    encode = copy_tokenizer(source, tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").write_text(byte_level([("h", "e"), ("t", "he")]).to_str())
    probe_tokenizer(tmp_path / "target")
    with pytest.raises(ExportError, match="the source"):
        probe_tokenizer(tmp_path / "target", encode)


def test_normaliser_that_folds_accents_is_caught(source: Path) -> None:
    backend = byte_level([])
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    (source / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ExportError, match="naïve"):
        probe_tokenizer(source)


def test_special_tokens_that_are_none_are_caught(source: Path) -> None:
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [99999]}))
    with pytest.raises(ExportError, match=r"eos_token.*99999"):
        probe_tokenizer(source)


def test_template_that_cannot_render_a_user_turn_is_caught(source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(ExportError, match="no users here"):
        probe_tokenizer(source)


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # transformers' own call of tokenizers
def test_slow_files_are_converted_and_proved(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="only the export extra installs transformers")
    source = tmp_path / "slow"
    source.mkdir()
    vocabulary = {token: index for index, token in enumerate([*ALPHABET, "th", "the", "<|endoftext|>"])}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    encode = copy_tokenizer(source, tmp_path / "target")
    probe_tokenizer(tmp_path / "target", encode)
    assert Tokenizer.from_folder(tmp_path / "target").encode("the") == [vocabulary["the"]]


def test_source_without_or_with_a_broken_tokenizer_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tokenizer"):
        copy_tokenizer(tmp_path, tmp_path / "target")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="fetch the checkpoint again"):
        copy_tokenizer(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# --- sentencepiece


@pytest.fixture
def sentencepiece_source(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a `tokenizer.model` alone, as the first Llama checkpoints had."""
    library = pytest.importorskip("sentencepiece", reason="only the export extra installs sentencepiece")

    def made(kind: str, **options: Any) -> Path:
        rng, folder = random.Random(3), tmp_path / "source"
        words = ["hello", "world", "the", "quick", "brown", "fox", "naïve", "über", "日本", "123", "def", "return"]
        folder.mkdir()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(rng.choices(words, k=8)) for _ in range(500)]),
            model_prefix=str(folder / "tokenizer"),
            model_type=kind,
            vocab_size=400,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return folder

    return made


KEPT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # as Llama's


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # sentencepiece's wrapper
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # transformers' own call of tokenizers
@pytest.mark.parametrize("options", [KEPT, {**KEPT, "add_dummy_prefix": False}], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_alone_gets_its_own_ids(
    sentencepiece_source: Callable[..., Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source = sentencepiece_source(kind, **options)
    encode = copy_tokenizer(source, tmp_path / "target")
    probe_tokenizer(tmp_path / "target", encode)
    tokenizer = Tokenizer.from_folder(tmp_path / "target")
    for text in ("hello world", " hello", "hello  the\n日本語 x</s>hello"):
        assert tokenizer.encode(text, add_special_tokens=False) == list(encode(text))


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_that_loses_spaces_is_refused(
    sentencepiece_source: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    encode = copy_tokenizer(sentencepiece_source(kind), tmp_path / "target")
    with pytest.raises(ExportError, match=r"'two  three .*comes back as 'two three"):
        probe_tokenizer(tmp_path / "target", encode)


def test_a_model_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"needs sentencepiece: run pip install '\.\[export\]'"):
        copy_tokenizer(tmp_path, tmp_path / "target")


def test_other_ids_of_random_texts_are_counted(source: Path, tmp_path: Path) -> None:
    encode = copy_tokenizer(source, tmp_path / "target")
    with pytest.raises(ExportError, match=r"[1-9]\d* of 400 texts of random tokens have other ids"):
        probe_tokenizer(tmp_path / "target", lambda text: [i for i in encode(text) if i != 7])


# --- tokenizers that take the memory


@pytest.mark.parametrize(
    "rule",
    [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes((16, 0, 0, 0)) + b"\xff" * 20).decode()},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 99}] * 9},
    ],
)
def test_a_tokenizer_that_takes_the_memory_is_a_source_error(source: Path, tmp_path: Path, rule: object) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**content, "normalizer": rule}))
    with pytest.raises(SourceError, match=r"tokenizer\.json .*fetch the checkpoint again") as caught:
        copy_tokenizer(source, tmp_path / "target")
    assert "\n" not in str(caught.value) and not (tmp_path / "target").exists()
