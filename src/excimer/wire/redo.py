"""What the page server and a redo worker (`csrc/redo`) say to each other over two pipes.

::

    request   u32 length of what follows these 8 bytes, u32 op
      'R'     u32 spc, db, rel, fork, block, has_base, record count, 0
              the base page (8192 bytes) if has_base
              per record: u64 start LSN, u64 end LSN, u32 length, u32 0, the raw record, zeros up to 8
      'M'     u32 resource manager, u32 block, page         what PostgreSQL ignores when comparing (tests)
      'S'     nothing                                       statistics as text
    answer    u32 status, u32 length of what follows
              status 0: page or text, 1: error text, 100: ready (once, at the start; what of the sandbox
              is in force, as text: "landlock=VERSION own_root=0|1 filtered=0|1")

Integers are little-endian. Answers come in the order of the requests; any number may be under way, as long
as the host reads while it writes. Without a base the first record must initialise the page.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key

ANSWER_PAGE = 0
ANSWER_ERROR = 1
ANSWER_READY = 100

REQUEST_SIZE_BYTES_MAX = 256 << 20
"""A worker ends itself over a longer one."""

REQUEST_HEAD = struct.Struct("<II")
ANSWER_HEAD = struct.Struct("<II")
PAGE_ANSWER_SIZE_BYTES = ANSWER_HEAD.size + BLOCK_SIZE_BYTES
PAGE_ANSWER_HEAD = ANSWER_HEAD.pack(ANSWER_PAGE, BLOCK_SIZE_BYTES)

_PAGE_REQUEST = struct.Struct("<IIIIIIIIII")
_RECORD_HEAD = struct.Struct("<QQII")
_MASK_REQUEST = struct.Struct("<IIII")
_PADDING = tuple(bytes(size) for size in range(8))


class RedoRequestError(RefusedError):
    """Bytes are not a request for a page, or the request would be longer than a worker takes."""


class RedoRecord(NamedTuple):
    start_lsn: int
    end_lsn: int
    raw: bytes


class RedoRequest(NamedTuple):
    relation: Relation
    fork: int
    block: int
    base: bytes | None
    records: list[RedoRecord]


def encode_redo_request(
    relation: tuple[int, int, int],
    fork: int,
    block: int,
    base: bytes | memoryview | None,
    records: Sequence[tuple[int, int, bytes | memoryview]],
) -> bytes:
    """The bytes that ask for a page: `base` (None: zeros) with `records` (start LSN, end LSN, raw) applied.

    Raises `RedoRequestError` for a base that is not a page or a request over `REQUEST_SIZE_BYTES_MAX`.
    """
    parts: list[bytes | memoryview] = [b""]
    size = _PAGE_REQUEST.size - REQUEST_HEAD.size
    if base is not None:
        if len(base) != BLOCK_SIZE_BYTES:
            raise RedoRequestError(f"a base page has {BLOCK_SIZE_BYTES} bytes, not {len(base)}")
        parts.append(base)
        size += BLOCK_SIZE_BYTES
    for start_lsn, end_lsn, raw in records:
        length = len(raw)
        padding = -length & 7
        parts.append(_RECORD_HEAD.pack(start_lsn, end_lsn, length, 0))
        parts.append(raw)
        parts.append(_PADDING[padding])
        size += _RECORD_HEAD.size + length + padding
    if size > REQUEST_SIZE_BYTES_MAX:
        raise RedoRequestError(
            f"{len(records)} records of one page take {size} bytes, too many for one request"
        )
    parts[0] = _PAGE_REQUEST.pack(size, ord("R"), *relation, fork, block, base is not None, len(records), 0)
    return b"".join(parts)


def decode_redo_request(request: bytes) -> RedoRequest:
    """The inverse, for tests and error messages. Raises `RedoRequestError`."""
    try:
        length, op, spc, db, rel, fork, block, has_base, count, _ = _PAGE_REQUEST.unpack_from(request)
        if op != ord("R") or length != len(request) - REQUEST_HEAD.size or has_base > 1:
            raise RedoRequestError("these bytes are not one whole request for a page")
        offset = _PAGE_REQUEST.size + has_base * BLOCK_SIZE_BYTES
        base = request[_PAGE_REQUEST.size : offset] if has_base else None
        records = []
        for _index in range(count):
            start_lsn, end_lsn, size, _ = _RECORD_HEAD.unpack_from(request, offset)
            offset += _RECORD_HEAD.size
            records.append(RedoRecord(start_lsn, end_lsn, request[offset : offset + size]))
            offset += size + (-size & 7)
    except struct.error as error:
        raise RedoRequestError(f"the request is cut short: {error}") from error
    if offset != len(request):
        raise RedoRequestError(f"the request has {len(request)} bytes, its records take {offset}")
    return RedoRequest(Relation(spc, db, rel), fork, block, base, records)


def request_key(request: bytes) -> bytes:
    """The storage key of the page that a request asks for."""
    _, _, spc, db, rel, fork, block, *_ = _PAGE_REQUEST.unpack_from(request)
    return relation_block_key(Relation(spc, db, rel), fork, block)


def encode_mask_request(resource_manager: int, block: int, page: bytes) -> bytes:
    return _MASK_REQUEST.pack(8 + len(page), ord("M"), resource_manager, block) + page


class Sandbox(NamedTuple):
    """What of its sandbox a worker says is in force."""

    landlock_version: int
    """0: Landlock is not in force."""
    has_own_root: bool
    """Its scratch directory is the root of all paths."""
    is_filtered: bool
    """System calls are filtered."""


def parse_greeting(text: bytes) -> Sandbox:
    """What a worker's first answer says; what it does not mention is not in force."""
    said = dict(word.split(b"=", 1) for word in text.split() if b"=" in word)
    landlock, own_root, filtered = (
        int(said[name]) if said.get(name, b"").isdigit() else 0
        for name in (b"landlock", b"own_root", b"filtered")
    )
    return Sandbox(landlock, own_root == 1, filtered == 1)


STATISTICS_REQUEST = REQUEST_HEAD.pack(0, ord("S"))
