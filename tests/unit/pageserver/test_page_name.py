"""Pages as people name them."""

import pytest

from excimer.base.keys import Relation, describe_key, relation_block_key, slru_block_key
from excimer.pageserver.page_name import PageNameError, parse_page_name


@pytest.mark.parametrize(
    "key",
    [
        relation_block_key(Relation(1663, 5, 16384), 0, 42),
        relation_block_key(Relation(1664, 0, 1262), 2, 0xFFFFFFFE),
        relation_block_key(Relation(1663, 5, 16384), 3, 0),
        slru_block_key(0, 0, 3),
        slru_block_key(1, 0x1A2B, 31),
        slru_block_key(2, 0x14078, 0),
    ],
)
def test_a_page_is_named_as_errors_name_it(key: bytes) -> None:
    name = describe_key(key).removeprefix("relation block ").replace(" block ", " ")
    assert parse_page_name(name) == key


@pytest.mark.parametrize(
    "text",
    ["", "1663/5/16384", "1663/5/16384 main", "1663/5/16384 side 0", "1663/5 main 0", "1663/5/16384 main -1",
     "pg_xact/0000 main 0", "pg_nothing/0000 0", "pg_xact/xyz 0", "1663/5/4294967296 main 0",
     "1663/5/1 main 99999999999"],
)  # fmt: skip
def test_what_names_no_page_is_refused(text: str) -> None:
    with pytest.raises(PageNameError):
        parse_page_name(text)
