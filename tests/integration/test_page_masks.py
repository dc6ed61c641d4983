"""Our masks beside PostgreSQL's own: the same bytes of real pages of every version are set to zero.

Truth is `rm_mask` of the version at hand, asked through a redo worker. Pages are those that a stock server
has written, and the same with hints changed at random places.
"""

import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, relation_path
from excimer.pgformat.page_header import PAGE_HEADER_SIZE_BYTES, PageHeader
from excimer.pgformat.page_kinds import PageKind, page_kind
from excimer.pgformat.page_masks import masked_page, sequence_row
from excimer.pgformat.wal_record import Rmgr
from excimer.postgres import PostgresBuild, redo_extension, run_initdb
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_worker import RedoWorker
from excimer.wire.redo import encode_mask_request
from tests.kit.builds import ALL_VERSIONS, build_of
from tests.kit.directories import reachable_directory
from tests.kit.redo_workload import BLOOM, END, RELATIONS, ROUND, SETUP
from tests.kit.stock_server import stock_server

MANAGERS = {
    PageKind.HEAP: Rmgr.HEAP,
    PageKind.BTREE: Rmgr.BTREE,
    PageKind.HASH: Rmgr.HASH,
    PageKind.GIN: Rmgr.GIN,
    PageKind.GIST: Rmgr.GIST,
    PageKind.SPGIST: Rmgr.SPGIST,
    PageKind.BRIN: Rmgr.BRIN,
    PageKind.SEQUENCE: Rmgr.SEQ,
    PageKind.GENERIC: Rmgr.GENERIC,
}
METHODS = {"-": PageKind.HEAP, "bloom": PageKind.GENERIC}
FLAG_BYTES = {
    PageKind.BTREE: range(12, 16),
    PageKind.HASH: range(12, 14),
    PageKind.GIST: (*range(8), 12, 13),
    PageKind.GIN: range(6, 8),
    PageKind.BRIN: range(4, 6),
}
"""Of the special space."""
PAGES_MAX = 150
"""Of each relation; half of them are tried again with changed hints."""
SEED = 1
SETTINGS = {"fsync": "off", "autovacuum": "off", "max_wal_size": "10GB"}


class RealPage(NamedTuple):
    name: str
    kind: PageKind
    """Whose page it is by PostgreSQL's catalogs."""
    block: int
    content: bytes


def real_pages(build: PostgresBuild, root: Path) -> list[RealPage]:
    data_dir = root / "data"
    run_initdb(build, data_dir)
    with stock_server(build, data_dir, SETTINGS) as server:
        script = SETUP + ROUND.format(round=1) + ROUND.format(round=2) + END
        server.sql(script + (BLOOM if "bloom" in build.features.extensions else ""))
        # Readers leave their hints, in the table and that entries of an index are dead.
        server.sql("select count(*) from heap_t; set enable_seqscan = off; delete from heap_t where k < 400")
        server.sql("set enable_seqscan = off; select count(*) from heap_t where k < 400")
        server.sql("select count(*) from heap_t; checkpoint")
        rows = server.sql(RELATIONS)
    return [page for row in rows for page in _pages_of(data_dir, row)]


def _pages_of(data_dir: Path, row: list[str]) -> Iterator[RealPage]:
    spc, db, number, name, relkind, method, persistence = row
    relation = Relation(int(spc), int(db), int(number))
    kind = METHODS.get(method) or PageKind(method)
    content = (data_dir / relation_path(relation, Fork.MAIN)).read_bytes()
    if persistence != "p":
        return
    for block in range(min(len(content) // BLOCK_SIZE_BYTES, PAGES_MAX)):
        page = content[block * BLOCK_SIZE_BYTES : (block + 1) * BLOCK_SIZE_BYTES]
        if not PageHeader.unpack(page).is_new:
            yield RealPage(name, PageKind.SEQUENCE if relkind == "S" else kind, block, page)


def with_other_hints(page: RealPage, chance: random.Random) -> RealPage:
    """The page with bits flipped where PostgreSQL keeps hints, and beside them."""
    changed = bytearray(page.content)
    header = PageHeader.unpack(page.content)
    flags = [header.special + at for at in FLAG_BYTES.get(page.kind, ())]
    has_hole = page.kind is not PageKind.BRIN or header.lower > PAGE_HEADER_SIZE_BYTES
    for places in (flags, range(8, 12), range(20, 24), range(header.lower, header.upper) if has_hole else ()):
        for _ in range(3 if places else 0):
            changed[chance.choice(places)] ^= 1 << chance.randrange(8)
    if page.kind in (PageKind.HEAP, PageKind.BTREE, PageKind.HASH, PageKind.GIST):
        count = (header.lower - PAGE_HEADER_SIZE_BYTES) // 4
        for number in chance.sample(range(count), min(count, 10)):
            at = PAGE_HEADER_SIZE_BYTES + 4 * number
            (pointer,) = struct.unpack_from("<I", changed, at)
            if page.kind is PageKind.HEAP and pointer >> 15 & 3 == 1:
                start = pointer & 0x7FFF
                changed[start + chance.randrange(8, 22)] ^= 1 << chance.randrange(8)
                struct.pack_into("<H", changed, start + 16, chance.choice((0xFFFE, 0xFFFD, 1)))
            elif page.kind is not PageKind.HEAP and pointer >> 17:
                struct.pack_into("<I", changed, at, pointer ^ chance.randrange(4) << 15)
    return page._replace(content=bytes(changed))


def stock_mask(worker: RedoWorker, page: RealPage) -> bytes:
    """With what else we leave out: a sequence's row, and the cache in SP-GiST's metapage."""
    masked = bytearray(worker.ask(encode_mask_request(MANAGERS[page.kind], page.block, page.content)))
    if page.kind is PageKind.SPGIST and page.block == 0:
        masked[28:92] = bytes(64)
    if page.kind is PageKind.SEQUENCE:
        row = sequence_row(page.content)
        assert row is not None
        start = masked.index(struct.pack("<qqB", *row))
        masked[start : start + 17] = bytes(17)
    return bytes(masked)


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_masks_are_postgresqls_own(version: int) -> None:
    chance = random.Random(SEED)
    counts: Counter[PageKind] = Counter()
    wrong = []
    with reachable_directory() as root:
        build = build_of(version)
        pages = real_pages(build, root)
        worker = RedoWorker(build, redo_extension(build), redo_control_file(build), root)
        try:
            changed = [with_other_hints(page, chance) for page in pages[::2]]
            for page in pages + changed:
                counts[page.kind] += 1
                if masked_page(page.content, page.kind, page.block) != stock_mask(worker, page):
                    wrong.append(f"{page.name} block {page.block}, {page.kind.value}")
        finally:
            worker.close()
    assert not wrong, f"{len(wrong)} of {counts.total()}, seed {SEED}: {wrong[:20]}"
    wanted = set(MANAGERS) - ({PageKind.GENERIC} if "bloom" not in build.features.extensions else set())
    assert all(counts[kind] >= 2 for kind in wanted), counts
    told = [page for page in pages if page_kind(page.content, Fork.MAIN, page.block) is not page.kind]
    assert not told, [f"{page.name} block {page.block} is of a {page.kind.value}" for page in told[:20]]
