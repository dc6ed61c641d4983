"""What the page truth tests tell of a page that is not the stock server's."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, relation_block_key
from excimer.base.lsn import Lsn
from tests.kit.page_truth import Comparer

KEY = relation_block_key(Relation(1663, 5, 16384), Fork.MAIN, 3)
PAGE = bytes(range(256)) * (BLOCK_SIZE_BYTES // 256)


class OnePage:
    """A timeline all of whose pages are `PAGE`."""

    pg_version = 18

    async def get_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        return PAGE * count

    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None:
        return None

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]:
        return []


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (PAGE, None),
        (b"x" + PAGE[1:], "relation block"),
        (b"", "file ends before it"),
        (PAGE[:100], "file ends before it"),
    ],
    ids=("equal", "another", "missing", "torn"),
)
def test_a_page_is_told_unless_it_is_the_stock_servers(theirs: bytes, told: str | None) -> None:
    comparer = Comparer(OnePage(), Lsn(0x1000), Path(), Random(0))
    asyncio.run(comparer.compare_page(KEY, theirs))
    assert comparer.result.compared["page"] == 1
    if told is None:
        assert comparer.result.wrong == []
    else:
        assert [told in line for line in comparer.result.wrong] == [True]
