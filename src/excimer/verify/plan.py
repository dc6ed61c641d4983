"""Which files and which blocks one look compares, and at which LSNs. Pure.

After a checkpoint that began at R every page lies on the disk as it was at R, or newer. A page says in pd_lsn
when it was last changed, so between that change and max(R, pd_lsn) nothing happened to it: the pageserver
must serve the same page at max(R, pd_lsn), whatever goes on meanwhile.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from excimer.base.keys import (
    SEGMENT_BLOCKS,
    Fork,
    KeyKind,
    Relation,
    make_key,
    parse_key,
    relation_block_key,
    relation_path,
    slru_block_key,
)
from excimer.base.lsn import Lsn
from excimer.export.layout import PageFile
from excimer.pgformat.cluster_files import FileKind, identify_file
from excimer.verify.judgement import comparable_bits, page_lsn, stamps_lsn

Targets = Mapping[str, Set[int] | None]
"""Blocks of files, by path; None: all of them, and the file's size."""


class ComparedFile(NamedTuple):
    path: str
    key: bytes
    """Of its first block."""
    here_blocks: int | None
    """None: there is no such file here."""
    served_blocks: int | None
    """None: the pageserver knows of none."""


class Layout(NamedTuple):
    files: list[ComparedFile]
    free_space_pages: int
    unlogged_files: int


class Batch(NamedTuple):
    """Adjacent blocks of a file that are compared at one LSN."""

    file: ComparedFile
    block: int
    """Within the file."""
    pages: Sequence[bytes]
    lsn: Lsn

    @property
    def key(self) -> bytes:
        return block_key(self.file, self.block)


def plan_files(here: Mapping[str, int], served: Iterable[PageFile], targets: Targets | None) -> Layout:
    """All files of pages that either side has, by path, or those in `targets`; without what WAL does not
    carry: free space maps, and all but the init fork of unlogged relations.
    """
    served_by_path = {file.path: file for file in served}
    unlogged = {_stem(path) for path in (*here, *served_by_path) if path.endswith("_init")}
    layout = Layout([], 0, 0)
    free_space_pages = unlogged_files = 0
    for path in sorted({*here, *served_by_path} if targets is None else targets):
        theirs = served_by_path.get(path)
        key = _first_key(path) if theirs is None else theirs.key
        fields = parse_key(key)
        if fields.kind == KeyKind.RELATION_BLOCK and fields.fork == Fork.FSM:
            free_space_pages += here.get(path, 0)
        elif fields.fork != Fork.INIT and _stem(path) in unlogged:
            unlogged_files += 1
        else:
            file = ComparedFile(path, key, here.get(path), None if theirs is None else theirs.blocks)
            layout.files.append(file)
    return layout._replace(free_space_pages=free_space_pages, unlogged_files=unlogged_files)


def size_is_wrong(file: ComparedFile) -> bool:
    """Whether blocks that the pageserver has are missing here, or a file that it knows nothing of is here.

    Blocks at the end that only we have are compared one by one: they may be too new.
    """
    fields = parse_key(file.key)
    if file.served_blocks is None:
        is_map = fields.kind == KeyKind.RELATION_BLOCK and fields.fork == Fork.VM
        return file.here_blocks is not None and not fields.block and not is_map
    return file.here_blocks is None or file.here_blocks < file.served_blocks


def plan_batches(file: ComparedFile, block: int, pages: Sequence[bytes | None], lsn: Lsn) -> Iterator[Batch]:
    """The blocks from `block` on that are here, in runs of one LSN; `lsn` is that of the last checkpoint."""
    is_relation = parse_key(file.key).kind == KeyKind.RELATION_BLOCK
    run: list[bytes] = []
    for index, page in enumerate([*pages, None]):
        wanted = lsn
        if page is not None and is_relation:
            wanted = max(lsn, page_lsn(page))
        if page is not None and wanted == lsn:
            run.append(page)
            continue
        if run:
            yield Batch(file, block + index - len(run), run, lsn)
            run = []
        if page is not None:
            yield Batch(file, block + index, [page], wanted)


def block_key(file: ComparedFile, block: int) -> bytes:
    """Of a block within the file."""
    kind, spc, db, rel, fork, first = parse_key(file.key)
    return make_key(kind, spc, db, rel, fork, first + block)


def is_unwritten(file: ComparedFile, block: int, page: bytes) -> bool:
    """PostgreSQL extends files with zeros, and makes maps; that is in WAL only when something is written."""
    if block < (file.served_blocks or 0):
        return False
    return not any(page if stamps_lsn(file.key) else comparable_bits(file.key, page))


def _first_key(path: str) -> bytes:
    file = identify_file(path)
    assert file is not None, "only files that were identified are listed"
    if file.kind is FileKind.SLRU:
        return slru_block_key(file.slru, file.segment, 0)
    return relation_block_key(file.relation, file.fork, file.segment * SEGMENT_BLOCKS)


def _stem(path: str) -> str:
    """Of all files of a relation: the path of its main fork; the path itself for others."""
    file = identify_file(path)
    if file is None or file.kind is not FileKind.RELATION or file.relation == Relation(0, 0, 0):
        return path
    return relation_path(file.relation, Fork.MAIN)
