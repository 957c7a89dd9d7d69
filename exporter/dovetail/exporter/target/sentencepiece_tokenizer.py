"""Writes a sentencepiece model as rules of a tokenizer.json.

The conversion in transformers differs by release. 5.0.0 reads BPE models as Unigram; other releases
read Unigram models as BPE, and treat spaces differently. The vocabulary here therefore comes from
the model itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers  # stubs, no py.typed
from tokenizers.models import BPE, Unigram

from dovetail.runtime.errors import SourceError, install_extra

_FILES = ("tokenizer.model", "spiece.model")
_UNIGRAM = 1  # TrainerSpec.ModelType
_NORMAL = 1  # SentencePiece.Type of a piece that is no control, byte or user-defined piece


class SentencePiece:
    """A model that the sentencepiece library reads."""

    def __init__(self, model: Any, proto: Any) -> None:
        self._model, self._proto = model, proto
        ids = range(model.get_piece_size())
        self._special = {model.id_to_piece(i): i for i in ids if model.is_control(i) or model.is_unknown(i)}
        self._names = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @classmethod
    def of_folder(cls, folder: Path) -> SentencePiece | None:
        """The model of a checkpoint; None without a model, or for a tiktoken file of that name.

        Raises SourceError if the library is missing.
        """
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            return None
        try:
            from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        except ImportError as error:
            raise SourceError(f"{file} needs sentencepiece: {install_extra('export')}") from error
        try:
            model = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            return None
        return cls(model, sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto()))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: the library encodes the text between special tokens."""
        ids: list[int] = []
        for part in self._names.split(text):
            ids += [self._special[part]] if part in self._special else self._model.encode(part)
        return ids

    def correct(self, tokenizer_json: Path) -> None:
        """Give the converted tokenizer the model's vocabulary and rules for spaces and bytes."""
        content: dict[str, Any] = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        spec = self._proto.normalizer_spec
        content["model"] = json.loads(Tokenizer(self._rules()).to_str())["model"]
        content["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in self._special])
        tokenizer.normalizer = normalizers.Sequence(_normalizers(spec))
        first = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first]
        )
        tokenizer_json.write_text(tokenizer.to_str(), encoding="utf-8")

    def _rules(self) -> BPE | Unigram:
        """The vocabulary for `tokenizers`; merges of BPE follow the scores of the merged pieces."""
        trainer, pieces = self._proto.trainer_spec, self._proto.pieces
        if trainer.model_type == _UNIGRAM:
            scored = [(piece.piece, piece.score) for piece in pieces]
            return Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
        vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
        merged = sorted((piece for piece in pieces if piece.type == _NORMAL), key=lambda piece: -piece.score)
        parts = ((text[:cut], text[cut:]) for text in (piece.piece for piece in merged) for cut in range(1, len(text)))
        merges = [(left, right) for left, right in parts if left in vocabulary and right in vocabulary]
        unknown = pieces[trainer.unk_id].piece
        return BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _normalizers(spec: Any) -> list[Any]:
    """The normalizers that a NormalizerSpec describes."""
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return [*steps, normalizers.Replace(" ", "▁")]
