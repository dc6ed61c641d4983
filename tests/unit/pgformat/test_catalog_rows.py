"""Rows of pg_proc and pg_database in a page: only what a new snapshot would see counts."""

import struct

import pytest

from excimer.pgformat.catalog_rows import icu_databases, library_names

COMMITTED, ABORTED = 100, 200
PAGE_SIZE = 8192


def page_of(*tuples: tuple[int, int, int, bytes]) -> bytes:
    """(xmin, xmax, infomask, row) each."""
    page = bytearray(PAGE_SIZE)
    end = PAGE_SIZE
    for number, (xmin, xmax, infomask, row) in enumerate(tuples):
        header = struct.pack("<II12xHBx", xmin, xmax, infomask, 24)
        end -= (len(header) + len(row) + 7) & ~7
        page[end : end + len(header) + len(row)] = header + row
        struct.pack_into("<I", page, 24 + 4 * number, end | 1 << 15 | len(header) + len(row) << 17)
    struct.pack_into("<H", page, 12, 24 + 4 * len(tuples))
    return bytes(page)


def proc(library: bytes, language: int = 13) -> bytes:
    """Its rights follow the library at once, as those of amcheck do: 37 bytes, of which the first is a K."""
    probin = b"$libdir/" + library
    header = (
        bytes([len(probin) + 1 << 1 | 1]) if len(probin) < 126 else struct.pack("<I", len(probin) + 4 << 2)
    )
    head = struct.pack("<I64sIII", 16400, b"f", 2200, 10, language) + b"\x07f"
    return head + bytes(-(len(head) % 4) % 4) + header + probin + b"K" + bytes(36)


def database(name: bytes, provider: bytes) -> bytes:
    return struct.pack("<I64sIIc", 16384, name, 10, 6, provider) + bytes(40)


def is_committed(xid: int) -> bool:
    return xid == COMMITTED


def test_libraries_of_functions_in_c_are_found() -> None:
    pages = [page_of((COMMITTED, 0, 0x0800, proc(b"pgcrypto")), (1, 0, 0x0B00, proc(b"uuid-ossp.so")))]
    assert library_names(pages, is_committed) == {"pgcrypto", "uuid-ossp"}
    long_path = b"a" * 130
    assert library_names([page_of((1, 0, 0x0B00, proc(long_path)))], is_committed) == {long_path.decode()}
    other_language = page_of((COMMITTED, 0, 0x0800, proc(b"in_a_text", language=14)))
    assert library_names([other_language, bytes(PAGE_SIZE)], is_committed) == set()


@pytest.mark.parametrize(
    ("xmin", "xmax", "infomask", "is_seen"),
    [
        (COMMITTED, 0, 0x0800, True),
        (ABORTED, 0, 0x0800, False),
        (ABORTED, 0, 0x0900, True),  # hinted: committed, or frozen
        (COMMITTED, 0, 0x0A00, False),  # hinted: aborted
        (COMMITTED, COMMITTED, 0, False),
        (COMMITTED, ABORTED, 0, True),
        (COMMITTED, ABORTED, 0x0400, False),
        (COMMITTED, COMMITTED, 0x0080, True),  # only locked
        (COMMITTED, COMMITTED, 0x1000, True),
    ],
)
def test_dropped_and_aborted_rows_do_not_count(xmin: int, xmax: int, infomask: int, is_seen: bool) -> None:
    page = page_of((xmin, xmax, infomask, proc(b"pgcrypto")))
    assert library_names([page], is_committed) == ({"pgcrypto"} if is_seen else set())


def test_databases_that_sort_by_icu_are_found() -> None:
    page = page_of(
        (COMMITTED, 0, 0x0800, database(b"app", b"i")),
        (COMMITTED, 0, 0x0800, database(b"plain", b"c")),
        (COMMITTED, 0, 0x0800, database(b"builtin", b"b")),
    )
    assert icu_databases([page], is_committed) == {"app"}


@pytest.mark.parametrize("lower", [0, 24, 26, 65535])
def test_pages_that_are_damaged_end_nothing(lower: int) -> None:
    page = bytearray(b"\xff" * PAGE_SIZE)
    struct.pack_into("<H", page, 12, lower)
    assert library_names([bytes(page)], is_committed) == set()
