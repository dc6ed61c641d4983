"""Storage keys: what the page store is indexed by, 18 bytes in memcmp order.

::

    +------+-----+-----+-----+------+-------+
    | kind | spc | db  | rel | fork | block |   big-endian
    |  1   |  4  |  4  |  4  |  1   |   4   |
    +------+-----+-----+-----+------+-------+

A kind uses the fields it needs and leaves the others zero:

===============  ====================================================  =================
kind             fields                                                value
===============  ====================================================  =================
RELATION_BLOCK   spc db rel fork block                                 a page
RELATION_SIZE    spc db rel fork                                       storage.format.relation_size
RELATION_TRUNCATION spc db rel fork block                              the same
SLRU_BLOCK       spc = Slru, rel = segment number, block               a page
SLRU_SIZE        spc = Slru, rel = segment number                      u32 blocks
RELATION_MAP     spc db                                                pg_filenode.map
DATABASE         spc db                                                PG_VERSION text
TWO_PHASE        db:rel = xid (64 bits)                                state file
ORIGIN           rel = replication origin's id                         u64 remote LSN
CHECKPOINT       (none)                                                CheckpointState
CONTROL_FILE     (none)                                                pg_control
COMMIT_TIME      (none)                                                i64 TimestampTz
===============  ====================================================  =================

Sizes have kinds of their own, so that listing what exists at an LSN is one range scan, and
creating a relation writes one key. A dropped relation's size is a tombstone.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

KEY_SIZE_BYTES = 18
BLOCK_SIZE_BYTES = 8192
SEGMENT_BLOCKS = 131_072
"""Blocks in one file of a relation (1 GiB); the file of block b is the (b // SEGMENT_BLOCKS)-th."""

_KEY = struct.Struct(">BIIIBI")

MIN_KEY = bytes(KEY_SIZE_BYTES)
MAX_KEY = b"\xff" * KEY_SIZE_BYTES


class KeyKind(IntEnum):
    RELATION_BLOCK = 0x00
    RELATION_SIZE = 0x10
    RELATION_TRUNCATION = 0x11
    SLRU_BLOCK = 0x20
    SLRU_SIZE = 0x21
    RELATION_MAP = 0x30
    DATABASE = 0x31
    TWO_PHASE = 0x40
    ORIGIN = 0x41
    CHECKPOINT = 0x50
    CONTROL_FILE = 0x51
    COMMIT_TIME = 0x60


class Fork(IntEnum):
    MAIN = 0
    FSM = 1
    VM = 2
    INIT = 3


FORK_SUFFIXES = ("", "_fsm", "_vm", "_init")


class Slru(IntEnum):
    XACT = 0
    MULTIXACT_OFFSETS = 1
    MULTIXACT_MEMBERS = 2
    COMMIT_TS = 3


SLRU_DIRECTORIES = ("pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_commit_ts")
SLRU_SEGMENT_BLOCKS = 32

DEFAULT_TABLESPACE = 1663
GLOBAL_TABLESPACE = 1664


class Relation(NamedTuple):
    """A relation's physical identity (PostgreSQL's RelFileLocator)."""

    spc: int
    db: int
    rel: int


class KeyFields(NamedTuple):
    kind: int
    spc: int
    db: int
    rel: int
    fork: int
    block: int


def make_key(kind: int, spc: int = 0, db: int = 0, rel: int = 0, fork: int = 0, block: int = 0) -> bytes:
    return _KEY.pack(kind, spc, db, rel, fork, block)


def parse_key(key: bytes) -> KeyFields:
    return KeyFields._make(_KEY.unpack(key))


def relation_block_key(relation: Relation, fork: int, block: int) -> bytes:
    return _KEY.pack(KeyKind.RELATION_BLOCK, *relation, fork, block)


def relation_size_key(relation: Relation, fork: int) -> bytes:
    return _KEY.pack(KeyKind.RELATION_SIZE, *relation, fork, 0)


def slru_block_key(slru: int, segment: int, block: int) -> bytes:
    return _KEY.pack(KeyKind.SLRU_BLOCK, slru, 0, segment, 0, block)


def slru_size_key(slru: int, segment: int) -> bytes:
    return _KEY.pack(KeyKind.SLRU_SIZE, slru, 0, segment, 0, 0)


def two_phase_key(xid: int) -> bytes:
    return _KEY.pack(KeyKind.TWO_PHASE, 0, xid >> 32, xid & 0xFFFFFFFF, 0, 0)


def origin_key(origin: int) -> bytes:
    return _KEY.pack(KeyKind.ORIGIN, 0, 0, origin, 0, 0)


def kind_range(kind: KeyKind) -> tuple[bytes, bytes]:
    """Half-open key range [start, end) of a whole kind."""
    return make_key(kind), make_key(kind + 1)


def describe_key(key: bytes) -> str:
    """For error messages: ``relation block 1663/5/16384 main 42``."""
    kind, spc, db, rel, fork, block = parse_key(key)
    if kind in (KeyKind.RELATION_BLOCK, KeyKind.RELATION_SIZE):
        text = f"{spc}/{db}/{rel} {Fork(fork).name.lower() if fork < len(FORK_SUFFIXES) else fork}"
        return f"relation block {text} {block}" if kind == KeyKind.RELATION_BLOCK else f"size of {text}"
    if kind == KeyKind.RELATION_TRUNCATION:
        return f"truncation of {spc}/{db}/{rel} fork {fork & 0xF} at {block << 8 * (fork >> 4)}"
    if kind in (KeyKind.SLRU_BLOCK, KeyKind.SLRU_SIZE):
        directory = SLRU_DIRECTORIES[spc] if spc < len(SLRU_DIRECTORIES) else f"slru {spc}"
        return (
            f"{directory}/{rel:04X} block {block}"
            if kind == KeyKind.SLRU_BLOCK
            else f"size of {directory}/{rel:04X}"
        )
    try:
        name = KeyKind(kind).name.lower().replace("_", " ")
    except ValueError:
        name = f"kind {kind:#x}"
    return f"{name} {spc}/{db}/{rel}"


def relation_path(relation: Relation, fork: int, segment: int = 0) -> str:
    """Path of a relation's file inside a data directory, in PostgreSQL's own naming.

    Raises ValueError for a user tablespace: its directory name carries a catalog version, and
    Excimer's computes have only the two built-in ones.
    """
    suffix = FORK_SUFFIXES[fork] + (f".{segment}" if segment else "")
    if relation.spc == GLOBAL_TABLESPACE:
        return f"global/{relation.rel}{suffix}"
    if relation.spc == DEFAULT_TABLESPACE:
        return f"base/{relation.db}/{relation.rel}{suffix}"
    raise ValueError(f"relation {relation} lies in a user tablespace")
