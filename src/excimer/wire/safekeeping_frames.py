"""Frames of the safekeeping protocol: ``u32 length of what follows, u8 type, body``, little-endian.

Not here: what the bodies are (`excimer.wire.safekeeping`).
"""

import struct
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from excimer.base.errors import RefusedError

TOKEN_SIZE_BYTES_MAX: Final = 4096
GREETING_SIZE_BYTES_MAX: Final = TOKEN_SIZE_BYTES_MAX + 256
FRAME_SIZE_BYTES_MAX: Final = (1 << 20) + 512
"""Most bytes after the length word, in any frame."""

_HEAD = struct.Struct("<IB")
_LENGTH = struct.Struct("<I")


class MalformedFrameError(RefusedError):
    """Bytes on the connection are not the safekeeping protocol: close it."""


def encode_frame(kind: bytes, body: bytes, wal: bytes = b"") -> bytes:
    """`wal` is the last part of the body, apart only so that it is copied once."""
    return b"".join((_LENGTH.pack(1 + len(body) + len(wal)), kind, body, wal))


Message = TypeVar("Message")


class FrameParser(Generic[Message]):
    """Cuts a byte stream into messages; holds at most one incomplete frame."""

    def __init__(self, decoders: dict[int, Callable[[memoryview], Message]], greeting_type: int) -> None:
        self._decoders = decoders
        self._greeting_type = greeting_type
        self.is_greeted = False
        """Whether a greeting has come."""
        self._buffer = bytearray()

    @property
    def rest_size_bytes(self) -> int:
        """Bytes held of a message that is not whole yet."""
        return len(self._buffer)

    def take_rest(self) -> bytes:
        """These bytes, to be fed again, by whoever receives what follows them."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """The messages that `data` completes, in order; WAL in them is copied once.

        Raises `MalformedFrameError`, after which the connection is of no further use; messages
        that the same call had completed before the bad frame are dropped with it.
        """
        if self._buffer:
            self._buffer += data
            data = self._buffer
        messages: list[Message] = []
        with memoryview(data) as view:
            position = self._take_frames(view, messages)
        if data is self._buffer:
            del self._buffer[:position]
        else:
            self._buffer += data[position:]
        return messages

    def _take_frames(self, view: memoryview, messages: list[Message]) -> int:
        """Appends whole frames' messages; returns where the first incomplete frame starts."""
        position = 0
        while len(view) - position >= _HEAD.size:
            length, kind = _HEAD.unpack_from(view, position)
            self._check_head(length, kind)
            end = position + _LENGTH.size + length
            if len(view) < end:
                break
            messages.append(self._decode(kind, view[position + _HEAD.size : end]))
            position = end
        return position

    def _check_head(self, length: int, kind: int) -> None:
        if kind not in self._decoders:
            raise MalformedFrameError(f"frame type {kind:#04x} is not one that this side receives")
        length_max = FRAME_SIZE_BYTES_MAX if self.is_greeted else GREETING_SIZE_BYTES_MAX
        if not 1 <= length <= length_max:
            raise MalformedFrameError(f"a frame of {length} bytes; at most {length_max} here")
        if not self.is_greeted and kind not in (self._greeting_type, ord("x")):
            raise MalformedFrameError(f"frame type {kind:#04x} before the greeting")

    def _decode(self, kind: int, body: memoryview) -> Message:
        try:
            message = self._decoders[kind](body)
        except (struct.error, UnicodeDecodeError) as error:
            raise MalformedFrameError(f"a frame of type {chr(kind)!r} does not parse: {error}") from error
        self.is_greeted = self.is_greeted or kind == self._greeting_type
        return message
