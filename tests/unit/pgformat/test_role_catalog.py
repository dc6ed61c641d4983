"""pg_authid's pages: the bootstrap superuser's name, and a fresh cluster's verifier."""

import struct
from collections.abc import Sequence

import pytest

from excimer.pgformat.role_catalog import (
    RoleCatalogError,
    bootstrap_superuser_names,
    is_initial_verifier,
    replace_verifier,
)
from excimer.wire.scram import make_verifier

PAGE_SIZE = 8192
XMAX_INVALID = 0x0800


def page_of(rows: Sequence[tuple[int, int, int, int, str]], *, verifier: str = "") -> bytes:
    """Rows (xmin, xmax, infomask, oid, name) as tuples of one heap page."""
    page = bytearray(PAGE_SIZE)
    end = PAGE_SIZE
    for number, (xmin, xmax, infomask, oid, name) in enumerate(rows):
        content = struct.pack("<II12xHB1x", xmin, xmax, infomask, 24)[:24].ljust(24, b"\0")
        content += struct.pack("<I64s", oid, name.encode()) + verifier.encode()
        end -= len(content) + -len(content) % 8
        page[end : end + len(content)] = content
        struct.pack_into("<I", page, 24 + 4 * number, end | 1 << 15 | len(content) << 17)
    struct.pack_into("<HH", page, 12, 24 + 4 * len(rows), end)
    return bytes(page)


def test_the_role_with_oid_10_is_found_among_others() -> None:
    rows = [(1, 0, XMAX_INVALID, 6171, "pg_database_owner"), (1, 0, XMAX_INVALID, 10, "alice")]
    assert bootstrap_superuser_names([page_of(rows)]) == ["alice"]
    assert bootstrap_superuser_names([page_of(rows[:1]), page_of(rows[1:])]) == ["alice"]
    assert bootstrap_superuser_names([page_of(rows[:1]), bytes(PAGE_SIZE)]) == []


def test_after_a_rename_both_names_are_candidates_the_new_one_first() -> None:
    old, new = (700, 800, 0, 10, "postgres"), (800, 0, XMAX_INVALID, 10, "boss")
    assert bootstrap_superuser_names([page_of([old, new])]) == ["boss", "postgres"]
    assert bootstrap_superuser_names([page_of([new, old])]) == ["boss", "postgres"]


def test_a_row_that_was_only_locked_or_whose_update_failed_counts_as_alive() -> None:
    rows = [(700, 900, XMAX_INVALID, 10, "postgres"), (650, 700, 0, 10, "before")]
    assert bootstrap_superuser_names([page_of(rows)]) == ["postgres", "before"]


def test_pointers_that_lead_nowhere_are_passed_over() -> None:
    page = bytearray(page_of([(1, 0, XMAX_INVALID, 10, "alice")]))
    struct.pack_into("<H", page, 12, 24 + 4 * 3)
    struct.pack_into("<II", page, 28, 8190 | 1 << 15 | 8 << 17, 100 | 3 << 15)
    assert bootstrap_superuser_names([bytes(page)]) == ["alice"]


def test_the_verifier_is_replaced_and_nothing_else() -> None:
    old, new = make_verifier("old", b"o" * 16), make_verifier("new", b"n" * 16)
    pages = [page_of([(1, 0, 0, 10, "postgres")], verifier=old), page_of([(1, 0, 0, 11, "other")])]
    replaced = replace_verifier(pages, new)
    assert replaced[1] == pages[1]
    assert replaced[0] == pages[0].replace(old.encode(), new.encode())
    with pytest.raises(RoleCatalogError, match="0 passwords"):
        replace_verifier(pages[1:], new)
    with pytest.raises(RoleCatalogError, match="2 passwords"):
        replace_verifier([*pages, *replaced], make_verifier("third", b"t" * 16))


def test_a_verifier_that_does_not_fit_is_refused() -> None:
    page = page_of([(1, 0, 0, 10, "postgres")], verifier=make_verifier("old", b"o" * 16))
    for wrong in (make_verifier("x", b"s" * 17), make_verifier("x", b"s" * 16, 8192), "secret"):
        assert not is_initial_verifier(wrong)
        with pytest.raises(ValueError, match="16 bytes"):
            replace_verifier([page], wrong)
