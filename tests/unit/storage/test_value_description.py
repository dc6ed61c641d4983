"""Values in words; damaged ones in words too."""

import struct

import pytest

from excimer.pgformat.native_records import XactStatus, encode_clog_status, encode_members, encode_vm_clear
from excimer.storage.format.value_description import describe_value
from excimer.storage.format.values import Value, ValueKind

HEAP_INSERT_INIT = struct.pack("<QIIQBB2xI", 0x16B3748, 59, 733, 0x16B3700, 0x80, 10, 0)


COMPRESSED = struct.pack("<BBHH", 2, 0, 100, 7000)
CLEARED = encode_vm_clear([(1, 3)], sets_lsn=True)


@pytest.mark.parametrize(
    ("kind", "payload", "words"),
    [
        (ValueKind.WAL_RECORD, HEAP_INSERT_INIT, "Heap INSERT+INIT, xid 733, record at 0/16B3748"),
        (ValueKind.IMAGE, bytes(8192), "image of the whole page"),
        (ValueKind.ZERO_PAGE, b"", "page of zeros"),
        (ValueKind.PAGE_IMAGE, COMPRESSED, "full-page image, lz4, hole of 7000 bytes at 100"),
        (ValueKind.PAGE_IMAGE, struct.pack("<BBHH", 0, 0, 0, 0), "full-page image"),
        (ValueKind.NATIVE, encode_clog_status(XactStatus.COMMITTED, [1, 2]), "2 transactions committed"),
        (ValueKind.NATIVE, encode_members([(1, 700, 2)]), "1 multixact members"),
        (ValueKind.NATIVE, CLEARED, "visibility bits of 1 heap blocks cleared"),
    ],
)
def test_values_in_words(kind: ValueKind, payload: bytes, words: str) -> None:
    assert describe_value(Value(b"", 0x100, kind, False, payload), 18) == words


@pytest.mark.parametrize("kind", [ValueKind.WAL_RECORD, ValueKind.NATIVE, ValueKind.PAGE_IMAGE])
@pytest.mark.parametrize("payload", [b"", b"\xff", b"\xff" * 9, b"\xff" * 40])
def test_damaged_values_are_told_too(kind: ValueKind, payload: bytes) -> None:
    assert describe_value(Value(b"", 0x100, kind, False, payload), 18)
