"""A tar file as a stream: members and their bytes as they arrive, and headers for one that we write.

::

    0      100    108  116  124     136    148     156     157      257     263   345
    +------+------+----+----+-------+------+-------+-------+--------+-------+-----+--------+
    | name | mode |uid |gid | size  | time | sum   | type  | target | ustar | ... | prefix |   512 bytes
    +------+------+----+----+-------+------+-------+-------+--------+-------+-----+--------+
    content, padded with zeros to 512; two blocks of zeros end the file

Numbers are octal text, or binary with the highest bit of the first byte set. That is all that
PostgreSQL's BASE_BACKUP writes (tar.c); tarfile of the standard library wants to *read* a stream,
which costs a thread and a pipe where bytes are pushed to us.

Not here: long-name extensions of other tar programs (a data directory's names are short).
"""

from collections.abc import Iterator
from typing import NamedTuple

from excimer.base.errors import RefusedError

BLOCK_SIZE_BYTES = 512
_NAME_SIZE_BYTES = 100
_ZERO_BLOCK = bytes(BLOCK_SIZE_BYTES)


class TarError(RefusedError):
    """The bytes are not a tar file as PostgreSQL writes it."""


class MemberStart(NamedTuple):
    """A member begins; its `size_bytes` of content follow as MemberData."""

    path: str
    size_bytes: int
    type: bytes
    """``0`` a file, ``5`` a directory, ``2`` a symbolic link."""


class MemberData(NamedTuple):
    data: bytes


class MemberEnd(NamedTuple):
    """The member is complete."""


TarEvent = MemberStart | MemberData | MemberEnd


class TarParser:
    """Bytes in, events out. What follows the end of the tar file is ignored."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._content_left = 0
        self._padding_left = 0
        self.is_ended = False

    @property
    def is_between_members(self) -> bool:
        """Whether no member is left half."""
        return not (self._content_left or self._padding_left or self._header)

    def feed(self, data: bytes) -> Iterator[TarEvent]:
        """Raises `TarError`."""
        at = 0
        while at < len(data) and not self.is_ended:
            if self._content_left:
                part = data[at : at + self._content_left]
                self._content_left -= len(part)
                at += len(part)
                yield MemberData(part)
                if not self._content_left:
                    yield MemberEnd()
            elif self._padding_left:
                step = min(self._padding_left, len(data) - at)
                self._padding_left -= step
                at += step
            else:
                part = data[at : at + BLOCK_SIZE_BYTES - len(self._header)]
                self._header += part
                at += len(part)
                if len(self._header) == BLOCK_SIZE_BYTES:
                    yield from self._begin_member()

    def _begin_member(self) -> Iterator[TarEvent]:
        header = bytes(self._header)
        self._header.clear()
        if header == _ZERO_BLOCK:
            self.is_ended = True
            return
        member = _unpack_header(header)
        self._content_left = member.size_bytes
        self._padding_left = -member.size_bytes % BLOCK_SIZE_BYTES
        yield member
        if not member.size_bytes:
            yield MemberEnd()


def _unpack_header(header: bytes) -> MemberStart:
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if _number(header[148:156]) != total:
        raise TarError("a tar header's checksum is wrong")
    kind = header[156:157].replace(b"\0", b"0")
    if kind not in b"025":
        raise TarError(f"a tar member of type {kind!r} is not PostgreSQL's")
    try:
        name, prefix = (_text(field).decode() for field in (header[:_NAME_SIZE_BYTES], header[345:500]))
    except UnicodeDecodeError as error:
        raise TarError("a tar member's name is not UTF-8") from error
    path = f"{prefix}/{name}" if prefix else name
    return MemberStart(path.removeprefix("./"), _number(header[124:136]) if kind == b"0" else 0, kind)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarError(f"{field!r} is not a number of a tar header")
    return int(digits or b"0", 8)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def pack_file_header(path: str, size_bytes: int) -> bytes:
    """Header of a plain file that only its owner may read. Raises ValueError for a name too long."""
    name = path.encode()
    if len(name) > _NAME_SIZE_BYTES or size_bytes >= 8**11:
        raise ValueError(f"{path} of {size_bytes} bytes does not fit into a tar header")
    head = name.ljust(_NAME_SIZE_BYTES, b"\0") + b"0000600\0" + b"0000000\0" * 2
    head += b"%011o\0" % size_bytes + b"%011o\0" % 0
    tail = (b"0" + bytes(_NAME_SIZE_BYTES) + b"ustar\00000").ljust(BLOCK_SIZE_BYTES - 156, b"\0")
    checksum = sum(head) + 8 * ord(" ") + sum(tail)
    return head + b"%06o\0 " % checksum + tail


def padding(size_bytes: int) -> bytes:
    """Zeros to follow a content of that size."""
    return bytes(-size_bytes % BLOCK_SIZE_BYTES)


END_OF_TAR = bytes(2 * BLOCK_SIZE_BYTES)
