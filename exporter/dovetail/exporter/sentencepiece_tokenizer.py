"""A sentencepiece model as rules of a tokenizer.json.

transformers' own conversion gives every Llama checkpoint a BPE model and its own treatment of spaces: a Unigram model
then gets other ids, and so does a text that begins with a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers  # type: ignore[import-untyped]  # stubs, no py.typed
from tokenizers.models import Unigram  # type: ignore[import-untyped]

from dovetail.runtime.errors import SourceError

_FILES = ("tokenizer.model", "spiece.model")
_UNIGRAM = 1  # TrainerSpec.ModelType


class SentencePiece:
    """A model that the sentencepiece library reads."""

    def __init__(self, file: Path) -> None:
        """Raises SourceError without the library, ValueError for a file of another format."""
        try:
            from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        except ImportError as error:
            raise SourceError(f"{file} needs sentencepiece: pip install 'dovetail-spec[export]'") from error
        try:
            self._model = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file} is no sentencepiece model") from error
        self._proto = sentencepiece_model_pb2.ModelProto.FromString(self._model.serialized_model_proto())
        ids = range(self._model.get_piece_size())
        special = [i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)]
        self._special = {self._model.id_to_piece(i): i for i in special}

    @classmethod
    def of_folder(cls, folder: Path) -> SentencePiece | None:
        """The model of a checkpoint; None where there is none, or a tiktoken file of the same name."""
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        try:
            return None if file is None else cls(file)
        except ValueError:
            return None

    @property
    def encode(self) -> Callable[[str], Sequence[int]]:
        """Text -> ids by the library itself, between special tokens, which it does not look for."""
        names = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

        def encode(text: str) -> list[int]:
            parts = names.split(text)
            return [i for part in parts for i in ([self._special[part]] if part in self._special else self._ids(part))]

        return encode

    def correct(self, tokenizer_json: Path) -> None:
        """Give the converted tokenizer the model's own rules for spaces and bytes, and a Unigram its vocabulary."""
        content: dict[str, Any] = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        trainer, spec = self._proto.trainer_spec, self._proto.normalizer_spec
        if trainer.model_type == _UNIGRAM:
            pieces = [(piece.piece, piece.score) for piece in self._proto.pieces]
            own = Tokenizer(Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
            content["model"] = json.loads(own.to_str())["model"]
        else:
            content["model"]["byte_fallback"] = trainer.byte_fallback
        content["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.normalizer = normalizers.Sequence(_normalizers(spec))
        first = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first]
        )
        tokenizer_json.write_text(tokenizer.to_str(), encoding="utf-8")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids


def _normalizers(spec: Any) -> list[Any]:
    """What a NormalizerSpec does with a text."""
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return [*steps, normalizers.Replace(" ", "▁")]
