"""Read and write protobuf messages without their schema: the runtime has no `onnx` package.

A message is a list of numbered fields. A field that is not asked for is kept as its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Self

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is stored
_FIXED = {FIXED64: 8, FIXED32: 4}  # bytes


class Field(NamedTuple):
    """One field. value: an int of a VARINT, else the content."""

    number: int
    wire: int
    value: int | bytes


class Message(list[Field]):
    """The fields of a message, in order."""

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Return the fields of an encoded message. Raises ValueError."""
        found, at = cls(), 0
        while at < len(data):
            key, at = _read_varint(data, at)
            number, wire = key >> 3, key & 7
            if wire == VARINT:
                value, at = _read_varint(data, at)
                found.append(Field(number, wire, value))
                continue
            size, at = (_FIXED[wire], at) if wire in _FIXED else _read_varint(data, at)
            if wire not in (BYTES, *_FIXED) or at + size > len(data):
                raise ValueError(f"no protobuf message: field {number} before byte {at}")
            found.append(Field(number, wire, data[at : at + size]))
            at += size
        return found

    def write(self) -> bytes:
        """Return the encoded message."""
        out = bytearray()
        for number, wire, value in self:
            out += _varint(number << 3 | wire)
            if isinstance(value, int):
                out += _varint(value)
            else:
                out += (_varint(len(value)) if wire == BYTES else b"") + value
        return bytes(out)

    def add(self, number: int, value: int | str | bytes | Message) -> Self:
        """Append a field, and return the message."""
        if isinstance(value, int):
            self.append(Field(number, VARINT, value))
        else:
            content = (
                value.encode() if isinstance(value, str) else value.write() if isinstance(value, Message) else value
            )
            self.append(Field(number, BYTES, content))
        return self

    def contents(self, number: int) -> Iterator[bytes]:
        """Yield the content of each field of that number."""
        for field in self:
            if field.number == number and isinstance(field.value, bytes):
                yield field.value

    def messages(self, number: int) -> list[Message]:
        """Return the fields of that number as messages. Raises ValueError."""
        return [Message.read(content) for content in self.contents(number)]

    def texts(self, number: int) -> list[str]:
        """Return the fields of that number as texts. Raises ValueError."""
        return [content.decode() for content in self.contents(number)]

    def text(self, number: int) -> str:
        """Return the last text of that number, "" if there is none. Raises ValueError."""
        return (self.texts(number) or [""])[-1]

    def at(self, *path: int) -> Message:
        """Return the message behind the numbers of `path`, empty if there is none. Raises ValueError."""
        found: Message = self
        for number in path:
            found = (found.messages(number) or [Message()])[-1]
        return found

    def numbers(self, number: int) -> list[int]:
        """Return the integers of that number, written one by one or packed. Raises ValueError."""
        found = list[int]()
        for field in self:
            if field.number == number and isinstance(field.value, int):
                found.append(_signed(field.value))
            elif field.number == number and isinstance(field.value, bytes):
                at = 0
                while at < len(field.value):
                    value, at = _read_varint(field.value, at)
                    found.append(_signed(value))
        return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a byte, and the byte behind it."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"no protobuf message: it ends in a number at byte {at}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
