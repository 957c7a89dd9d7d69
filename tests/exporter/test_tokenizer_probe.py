"""The probe lets a faithful copy pass and names everything that another tokenizer would do differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dovetail.exporter.tokenizer_probe import ROUND_TRIPS, copy_tokenizer, probe_tokenizer
from dovetail.runtime.errors import ExportError, SourceError
from dovetail.runtime.tokenizer import Tokenizer

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
