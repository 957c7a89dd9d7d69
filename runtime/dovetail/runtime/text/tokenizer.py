"""Text to token ids and back, from the files of a target folder.

`tokenizers` and `jinja2` are imported only when a tokenizer is read and a template is rendered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dovetail.runtime.errors import InputError, IntegrityError, one_line
from dovetail.runtime.pair.layout import TOKENIZER
from dovetail.runtime.system.bounds import check_token_ids
from dovetail.runtime.system.files import read_bytes, read_object
from dovetail.runtime.text.detokenizer import IncrementalDetokenizer, valid_bytes
from dovetail.runtime.text.encoding import Message, check_messages, with_objects
from dovetail.runtime.text.tokenizer_rules import check_rules
from dovetail.runtime.text.tool_calls import CALL_MARKS, AnswerStyle

if TYPE_CHECKING:
    from dovetail.runtime.text.chat_template import ChatTemplate
    from dovetail.runtime.text.plain_text import PlainText

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_AGAIN = "export the target again"
TOKENIZER_BYTES = 1 << 30  # largest tokenizer.json
# Tokens that end an assistant's turn: llama.cpp's list, and the templates of OpenChat, Command R
# and Llama 4.
_END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "< EOT >", "_< EOT >", "[EOT]", "[EOS]",
    "<end_of_utterance>", "<turn|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|eot|>",
    "<\uff5cend▁of▁sentence\uff5c>",
)  # fmt: skip

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = sorted({*range(256)} - _PRINTABLE)
# The characters by which byte-level tokenizers name bytes. Source: bytes_to_unicode of GPT-2.
_BYTES = {chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)): byte for byte in range(256)}


class Spelling(NamedTuple):
    """What a token stands for."""

    text: bytes  # of a special token its name
    special: bool


class Tokenizer:
    """A target's tokenizer: encode, decode, chat template, end-of-sequence ids."""

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """tokenizer_json: bytes of the file. Raises ValueError if `tokenizers` cannot read them."""
        self._backend = _parse_backend(tokenizer_json)
        self._digest = hashlib.sha256(tokenizer_json).hexdigest()
        self._template_source = chat_template
        self.special_tokens = dict(special_tokens or {})  # {"eos_token": "<|im_end|>", ...}
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *self._ends_of_turn())))
        self._bytes = self._byte_tokens()

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Read a target folder's tokenizer. Raises IntegrityError for a missing or bad file."""
        folder = Path(path)
        file = folder / TOKENIZER
        try:
            content = read_bytes(file, TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise IntegrityError(f"{file} cannot be read ({reason}): {_AGAIN}") from error
        config = read_object(folder / "tokenizer_config.json", IntegrityError, _AGAIN)
        try:
            return cls(
                content,
                special_tokens=_special_tokens(folder, config),
                chat_template=_chat_template(folder, config),
                eos_token_ids=_eos_token_ids(folder),
            )
        except (ValueError, InputError) as error:
            raise IntegrityError(f"{file} is not a tokenizer ({one_line(error)}): export the target again") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included. The target's logits may have padding."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Return whether every id of `other` that this vocabulary has too is the same token."""
        ours, theirs = (each._backend.get_vocab(with_added_tokens=True) for each in (self, other))
        named = {number: token for token, number in ours.items()}
        return all(
            named.get(number, token) == token and ours.get(token, number) == number for token, number in theirs.items()
        )

    def spellings(self) -> dict[int, Spelling]:
        """Return the exact bytes of each token id."""
        added = {entry.content for entry in self._backend.get_added_tokens_decoder().values()}
        space = self._backend.token_to_id("\u0120")
        byte_level = space is not None and self._backend.decode([space], skip_special_tokens=False) == " "
        found = {}
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            if number in self._bytes:
                text = bytes([self._bytes[number]])
            elif token in added:
                text = token.encode()
            elif byte_level and _BYTES.keys() >= set(token):
                text = bytes(_BYTES[character] for character in token)
            else:
                text = token.replace("\u2581", " ").encode()  # SentencePiece's mark of a space
            found[number] = Spelling(text, number in self._special_ids)
        return found

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def digest(self) -> str:
        """Return the SHA-256 of tokenizer.json, hexadecimal. Equal digests mean equal token ids."""
        return self._digest

    def definition(self) -> str:
        """Return the JSON text of a tokenizer.json, without padding and truncation."""
        return str(self._backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return token ids of `text`, special tokens recognised. Raises InputError.

        add_special_tokens: let tokenizer.json's post-processor add its own token (Llama's BOS),
        unless the text begins with that token, as the output of `apply_chat_template` may.
        """
        with _readable():
            ids = list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            if add_special_tokens and len(ids) > 1 and ids[0] == ids[1] and ids[0] in self._special_ids:
                own = list(self._backend.encode(text, add_special_tokens=False).ids)
                if ids[: len(own) + 1] == [ids[0], *own]:  # the text already begins with the added token
                    del ids[0]
        return ids

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False, **kwargs: Any) -> list[int]:
        """Return token ids of `apply_chat_template(messages, **kwargs)`, without additions.

        parse_special: whether special tokens spelled out in messages, tools or documents are
        recognised. False encodes them as text, so that only the template gives special tokens.
        """
        with _readable():
            messages = with_objects(check_messages(messages))  # a JSON text may hide a special token
        said: dict[str, Any] = {"messages": messages}
        said |= {name: kwargs[name] for name in ("tools", "documents") if name in kwargs}
        with _readable():
            if not parse_special and self._plain.needed(said):
                return self._plain.encode(lambda said: self.apply_chat_template(**{**kwargs, **said}), said)
        return self.encode(self.apply_chat_template(messages, **kwargs), add_special_tokens=False)

    def has_token(self, token_id: int) -> bool:
        return 0 <= token_id < 2**31 and self._backend.id_to_token(token_id) is not None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Unknown ids give no text; invalid UTF-8 becomes U+FFFD."""
        tokens = [int(token) for token in ids]
        if not self._bytes.keys().isdisjoint(tokens):
            tokens = valid_bytes([t for t in tokens if not self._is_hidden(t, skip_special_tokens)], self._bytes)
        with _readable():
            return str(self._backend.decode(tokens, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the prompt text of a conversation. kwargs: for the template. Raises InputError."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)

    def answer_style(self, template_options: Mapping[str, Any] | None = None) -> AnswerStyle:
        """Return how this target writes answers to a prompt with these options of the template."""
        return self._template.answer_style(**(template_options or {})) if self.has_chat_template else AnswerStyle()

    def detokenizer(self, *, calls: bool = False) -> IncrementalDetokenizer:
        """calls: show the marks of tool calls where they are special tokens, such as <|python_tag|>."""
        shown = {self._backend.token_to_id(mark) for mark in CALL_MARKS} & self._special_ids if calls else frozenset()
        hidden = self._special_ids - shown
        return IncrementalDetokenizer(
            lambda tokens: self.decode(tokens, skip_special_tokens=not shown),
            lambda token: token in hidden or self._backend.id_to_token(token) is None,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        from dovetail.runtime.text.chat_template import ChatTemplate

        if self._template_source is None:
            raise InputError("this target has no chat template: pass a plain string with raw=True")
        return ChatTemplate(self._template_source, self.special_tokens)

    @cached_property
    def _plain(self) -> PlainText:
        from dovetail.runtime.text.plain_text import PlainText

        return PlainText(self._backend)

    def _is_hidden(self, token: int, skip_special_tokens: bool) -> bool:
        """Return whether `decode` leaves the token out: a special token or an unknown id."""
        return (skip_special_tokens and token in self._special_ids) or self._backend.id_to_token(token) is None

    def _ends_of_turn(self) -> Iterator[int]:
        """Yield eos_token, then special tokens that end a turn and that the template spells out."""
        named = self.special_tokens.get("eos_token")
        if named is not None and (eos := self._backend.token_to_id(named)) is not None:
            yield int(eos)
        for name in _END_OF_TURN:
            token = self._backend.token_to_id(name)
            if token not in self._special_ids or name not in (self._template_source or ""):
                continue
            if name == "<|end|>" and self._backend.token_to_id("<|return|>") is not None:
                continue  # in gpt-oss <|end|> ends a message, not a turn
            yield int(token)

    def _byte_tokens(self) -> dict[int, int]:
        """Return token id -> byte if every byte has a token that decodes to it, otherwise {}."""
        by_byte = [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        with _readable():
            if None in by_byte or self._backend.decode([by_byte[ord("A")]]) != "A":
                return {}
        return {token: byte for byte, token in enumerate(by_byte)}


@contextmanager
def _readable() -> Iterator[None]:
    """Raise InputError if the text is not Unicode, nested too deep, or makes `tokenizers` fail."""
    try:
        yield
    except RecursionError as error:
        raise InputError("the messages or tools are nested too deep: pass flatter ones") from error
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"the prompt is not valid Unicode text ({type(error).__name__}): pass a str") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise InputError(f"tokenizer.json fails on this text ({one_line(error)}): export the target again") from error


def _is_panic(error: BaseException) -> bool:
    """Return whether Rust code panicked. PanicException is no Exception, nor importable."""
    return type(error).__name__ == "PanicException"


def _parse_backend(tokenizer_json: bytes) -> Any:
    from tokenizers import Tokenizer as Backend

    text = tokenizer_json.decode("utf-8")
    check_rules(text)
    try:
        backend = Backend.from_str(text)
    except BaseException as error:  # `tokenizers` raises a bare Exception for everything that it cannot parse
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise ValueError(str(error)) from error
    backend.no_truncation()  # a saved training setting must not cut or pad prompts
    backend.no_padding()
    return backend


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return named special tokens. Each is given as a string or as an object with a `content`.

    As in transformers, special_tokens_map.json has priority if the config lists no added tokens.
    """
    given = config
    if "added_tokens_decoder" not in config:
        given = {**config, **read_object(folder / "special_tokens_map.json", IntegrityError, _AGAIN)}
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = given.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return chat_template.jinja, else the config's template, named `default` among several."""
    file = folder / "chat_template.jinja"
    try:
        return read_bytes(file).decode()
    except FileNotFoundError:
        template = config.get("chat_template")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} cannot be read ({one_line(error)}): export the target again") from error
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the end-of-sequence ids of the generation config and the model's config, each once."""
    found = list[int]()
    for name in ("generation_config.json", "config.json"):
        config = read_object(folder / name, IntegrityError, _AGAIN)
        inner = config.get("text_config")
        for value in (config.get("eos_token_id"), inner.get("eos_token_id") if isinstance(inner, dict) else None):
            found += check_token_ids(f"{folder / name}: eos_token_id", value, IntegrityError, _AGAIN)
    return tuple(dict.fromkeys(found))
