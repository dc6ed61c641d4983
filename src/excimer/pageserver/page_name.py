"""Pages as people name them: `1663/5/16384 main 42`, `pg_xact/0000 3`; the same words as in our errors."""

import re

from excimer.base.errors import RefusedError
from excimer.base.keys import SLRU_DIRECTORIES, Fork, Relation, relation_block_key, slru_block_key

_FORKS = "|".join(fork.name.lower() for fork in Fork)
_RELATION = re.compile(rf"(\d{{1,10}})/(\d{{1,10}})/(\d{{1,10}}) ({_FORKS}) (\d{{1,10}})\Z")
_SLRU = re.compile(rf"({'|'.join(SLRU_DIRECTORIES)})/([0-9A-Fa-f]{{4,8}}) (\d{{1,10}})\Z")
_NUMBER_MAX = 0xFFFFFFFF


class PageNameError(RefusedError):
    """A text does not name a page."""


def parse_page_name(text: str) -> bytes:
    """The page's storage key. Raises `PageNameError`."""
    relation = _RELATION.match(text)
    slru = _SLRU.match(text)
    try:
        if relation is not None:
            spc, db, rel, block = (_number(relation[index]) for index in (1, 2, 3, 5))
            return relation_block_key(Relation(spc, db, rel), Fork[relation[4].upper()], block)
        if slru is not None:
            segment = int(slru[2], 16)
            return slru_block_key(SLRU_DIRECTORIES.index(slru[1]), segment, _number(slru[3]))
    except ValueError as error:
        raise PageNameError(str(error)) from error
    raise PageNameError(
        f"{text!r} names no page: write SPC/DB/REL FORK BLOCK, like '1663/5/16384 main 42' "
        f"(forks: {_FORKS.replace('|', ', ')}), or an SLRU's DIRECTORY/SEGMENT BLOCK, like 'pg_xact/0000 3'"
    )


def _number(text: str) -> int:
    number = int(text)
    if number > _NUMBER_MAX:
        raise ValueError(f"{text} is larger than any object or block number")
    return number
