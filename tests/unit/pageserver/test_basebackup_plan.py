"""What goes into a basebackup: the manifest, the pages that a commit may write, the working set."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import (
    Fork,
    KeyKind,
    Relation,
    Slru,
    parse_key,
    relation_size_key,
    slru_size_key,
)
from excimer.pageserver.basebackup_plan import (
    INIT_FORK_BLOCKS_MAX,
    RUN_BLOCKS_MAX,
    Manifest,
    commit_pages,
    plan_manifest,
    plan_pages,
)
from excimer.pgformat.basebackup import RelationFork, SlruSegment
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.relation_map import RelationMapError, parse_relation_map
from excimer.pgformat.two_phase import (
    PreparedTransaction,
    TwoPhaseError,
    parse_two_phase,
    two_phase_path,
)

ZEROS = CheckPoint.unpack(bytes(88))


def checkpoint(next_xid: int = 0, next_multi: int = 1, next_multi_offset: int = 0) -> CheckPoint:
    values = {name: getattr(ZEROS, name) for name in CheckPoint.__struct_fields__}
    values |= {"next_xid": next_xid, "next_multi": next_multi, "next_multi_offset": next_multi_offset}
    return CheckPoint(**values)


def size(blocks: int) -> bytes:
    return blocks.to_bytes(4, "little")


def test_manifest_keeps_empty_files_and_leaves_unlogged_ones_to_their_init_fork() -> None:
    logged, unlogged = Relation(1663, 5, 100), Relation(1663, 5, 200)
    elsewhere = Relation(16400, 5, 300)
    manifest = plan_manifest(
        [
            (relation_size_key(logged, Fork.MAIN), size(0)),
            (relation_size_key(logged, Fork.VM), size(1)),
            (relation_size_key(unlogged, Fork.MAIN), size(9)),
            (relation_size_key(unlogged, Fork.INIT), size(1)),
            (relation_size_key(elsewhere, Fork.MAIN), size(1)),
        ],
        [(slru_size_key(Slru.XACT, 3), size(32))],
    )
    assert manifest.relation_forks == [
        RelationFork(*logged, Fork.MAIN, 0),
        RelationFork(*logged, Fork.VM, 1),
        RelationFork(*unlogged, Fork.INIT, 1),
    ]
    assert manifest.slru_segments == [SlruSegment(Slru.XACT, 3, 32)]


def test_pages_of_the_next_xid_and_of_prepared_transactions() -> None:
    prepared = [PreparedTransaction(40_000, (819 * 100, 5))]
    pages = commit_pages(checkpoint((7 << 32) + 32_768, 2048, 1636), prepared)
    assert {page for slru, page in pages if slru is Slru.XACT} == {0, 1, 2}
    assert {page for slru, page in pages if slru is Slru.COMMIT_TS} == {
        0,
        32_767 // 819,
        32_768 // 819,
        40_000 // 819,
        100,
    }
    assert {page for slru, page in pages if slru is Slru.MULTIXACT_OFFSETS} == {0, 1}
    assert {page for slru, page in pages if slru is Slru.MULTIXACT_MEMBERS} == {0, 1}


def test_numbers_that_wrap_around() -> None:
    pages = commit_pages(checkpoint(1 << 32, 2**32 - 1, 0), [])
    assert (Slru.XACT, 0) in pages
    assert (Slru.XACT, (2**32 - 1) // 32_768) in pages
    assert (Slru.MULTIXACT_OFFSETS, 0) in pages
    assert all(page >= 0 for _, page in pages)


SEGMENTS = st.dictionaries(
    st.tuples(st.sampled_from(Slru), st.integers(0, 3)), st.integers(0, 32), max_size=10
)
FORKS = st.dictionaries(
    st.tuples(st.just(1663), st.sampled_from([1, 5, 6]), st.sampled_from([1249, 1259, 99, 7000])),
    st.integers(0, 200),
    max_size=8,
)


@given(SEGMENTS, FORKS, st.integers(0, 2**33), st.sets(st.integers(3, 2**18), max_size=20))
def test_every_run_lies_in_an_existing_file(
    segments: dict[tuple[Slru, int], int],
    forks: dict[tuple[int, int, int], int],
    next_xid: int,
    subxids: set[int],
) -> None:
    manifest = Manifest(
        [
            RelationFork(spc, db, rel, Fork.INIT if rel == 99 else Fork.MAIN, blocks)
            for (spc, db, rel), blocks in forks.items()
        ],
        [SlruSegment(slru, segment, blocks) for (slru, segment), blocks in segments.items()],
    )
    maps = {(1663, 1): {}, (1663, 5): {1259: 7000}, (1664, 0): {}}
    prepared = [PreparedTransaction(3, tuple(subxids))]
    runs = plan_pages(manifest, maps, checkpoint(next_xid), prepared)
    sizes = {(KeyKind.RELATION_BLOCK, *fork[:4]): fork.blocks for fork in manifest.relation_forks}
    sizes |= {
        (KeyKind.SLRU_BLOCK, slru, 0, segment, 0): blocks for (slru, segment), blocks in segments.items()
    }
    seen: set[tuple[tuple[int, ...], int]] = set()
    for key, blocks in runs:
        fields = parse_key(key)
        assert 0 < blocks <= RUN_BLOCKS_MAX
        assert fields.block + blocks <= sizes[(KeyKind(fields.kind), *fields[1:5])]
        pages = {(fields[:5], fields.block + index) for index in range(blocks)}
        assert not pages & seen
        seen |= pages
    init = {fork for fork in manifest.relation_forks if fork.fork == Fork.INIT}
    for fork in init:
        assert {((0, *fork[:4]), block) for block in range(min(fork.blocks, INIT_FORK_BLOCKS_MAX))} <= seen
    for slru, page in commit_pages(checkpoint(next_xid), prepared):
        segment, block = divmod(page, 32)
        if block < segments.get((slru, segment), 0):
            assert ((KeyKind.SLRU_BLOCK, slru, 0, segment, 0), block) in seen


def test_catalogs_are_found_through_the_map() -> None:
    manifest = Manifest([RelationFork(1663, 5, 7000, 0, 3), RelationFork(1663, 5, 1259, 0, 9)], [])
    runs = plan_pages(manifest, {(1663, 5): {1259: 7000}}, checkpoint(), [])
    assert [(parse_key(key).rel, blocks) for key, blocks in runs] == [(7000, 3)]


@pytest.mark.parametrize(("pg_version", "header", "gid_at"), [(14, 64, 46), (15, 72, 54), (18, 72, 54)])
def test_two_phase_subtransactions(pg_version: int, header: int, gid_at: int) -> None:
    data = bytearray(header)
    struct.pack_into("<I", data, 8, 777)
    struct.pack_into("<i", data, 28, 2)
    struct.pack_into("<H", data, gid_at, 5)
    data += b"gid1\0\0\0\0" + struct.pack("<II", 778, 790) + bytes(20)
    assert parse_two_phase(bytes(data), pg_version) == (777, (778, 790))
    with pytest.raises(TwoPhaseError):
        parse_two_phase(bytes(data[: header + 12]), pg_version)
    with pytest.raises(TwoPhaseError):
        parse_two_phase(bytes(data[:20]), pg_version)


def test_two_phase_names() -> None:
    assert two_phase_path(0x1_0000_02AB, 16) == "pg_twophase/000002AB"
    assert two_phase_path(0x1_0000_02AB, 17) == "pg_twophase/00000001000002AB"


@given(st.binary(max_size=600))
def test_no_bytes_break_the_relation_map(data: bytes) -> None:
    with pytest.raises(RelationMapError):
        parse_relation_map(data)


def test_relation_map() -> None:
    data = struct.pack("<ii", 0x592717, 2) + struct.pack("<IIII", 1259, 1, 1249, 2) + bytes(496)
    assert parse_relation_map(data) == {1259: 1, 1249: 2}
    with pytest.raises(RelationMapError):
        parse_relation_map(data[:20])
