"""Paths that somebody else has chosen: nothing is written outside of the directory they are for."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TypeGuard

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import Relation, relation_block_key, slru_block_key
from excimer.compute.data_directory import DataDirectoryPlan, LazyFile, write_data_directory
from excimer.export.directory_sink import DirectorySink
from excimer.export.ownership import Owner
from excimer.pageserver.cluster_import import TablespacesError, wanted_file
from excimer.pgformat.basebackup import (
    Basebackup,
    BasebackupContentError,
    InlinePage,
    RelationFork,
    SlruSegment,
    decode_basebackup,
    encode_basebackup,
    pack_relation_forks,
    pack_slru_segments,
)
from excimer.pgformat.cluster_files import ClusterFileError, identify_file
from excimer.pgformat.cluster_paths import UnsafePathError, check_carried_path, check_relative_path
from excimer.pgformat.tar_stream import MemberStart, TarError, TarEvent, TarParser, pack_file_header

GOOD = [
    "base/5/PG_VERSION",
    "base/4294967295/pg_filenode.map",
    "global/pg_filenode.map",
    "pg_twophase/000002F1",
    "pg_twophase/00000001000002F1",
    "pg_logical/replorigin_checkpoint",
    "pg_logical/snapshots/0-15A7B48.snap",
    "pg_replslot/slot_1/state",
    "pg_stat/pgstat.stat",
]
HOSTILE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "base/../../x",
    "base/5/..",
    ".",
    "./base",
    "base//5",
    "base/5/",
    "base/./5",
    "a\0b",
    "\0",
    "\ud800",
    "x" * 256,
    "/".join(["abc"] * 400),
]
NOT_CARRIED = [
    "postgresql.conf",
    "pg_hba.conf",
    "PG_VERSION",
    "standby.signal",
    "global/pg_control",
    "base/5/16384",
    "base/0/PG_VERSION",
    "base/5/PG_VERSION\n",
    "pg_wal/000000010000000000000001",
    "pg_twophase/1",
    "pg_replslot/../state",
    "base/٥/PG_VERSION",
    ".ssh/authorized_keys",
]
ANY_PATH = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["..", ".", "", "base", "5", "a b", "é", "x" * 260, "\0"]), max_size=6).map(
        "/".join
    ),
    st.sampled_from(GOOD + HOSTILE + NOT_CARRIED),
)
BACKUP = Basebackup(
    pg_version=18,
    lsn=0x1000028,
    prev_lsn=0,
    control_file=b"",
    checkpoint=b"",
    files=[],
    relation_forks=b"",
    slru_segments=b"",
    pages=[],
)


def decoded(**changes: object) -> Basebackup:
    return decode_basebackup(encode_basebackup(msgspec.structs.replace(BACKUP, **changes)))


@given(ANY_PATH)
def test_a_checked_path_stays_within(path: str) -> None:
    try:
        check_relative_path(path)
    except UnsafePathError:
        return
    root = Path("/some/root")
    assert (root / path).parts[: len(root.parts)] == root.parts
    assert ".." not in Path(path).parts
    assert str(Path(path)) == path
    assert path


@pytest.mark.parametrize("path", HOSTILE)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(UnsafePathError):
        check_relative_path(path)


@pytest.mark.parametrize("path", GOOD)
def test_what_a_basebackup_carries(path: str) -> None:
    assert check_carried_path(path) == path
    assert decoded(files=[(path, b"x")]).files == [(path, b"x")]


@pytest.mark.parametrize("path", [path for path in HOSTILE if path != "\ud800"] + NOT_CARRIED)
def test_a_basebackup_with_another_path_is_refused_before_anything_is_written(path: str) -> None:
    with pytest.raises(BasebackupContentError, match="path"):
        decoded(files=[("base/5/PG_VERSION", b"18"), (path, b"x")])


@given(
    st.lists(st.tuples(ANY_PATH.filter(lambda path: "\ud800" not in path), st.binary(max_size=8)), max_size=4)
)
def test_what_is_decoded_can_be_written_within_a_directory(files: list[tuple[str, bytes]]) -> None:
    """And what cannot is an error of its own, whatever the paths."""
    try:
        backup = decoded(files=files)
    except (BasebackupContentError, UnicodeEncodeError):
        return
    directories = sorted({str(parent) for path, _ in backup.files for parent in Path(path).parents} - {"."})
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "inner" / "data"
        root.parent.mkdir()
        write_data_directory(root, DataDirectoryPlan(directories, backup.files, [], [], []), 16 << 20)
        assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == dict(
            files
        ).keys()
        assert [path.name for path in Path(place).iterdir()] == ["inner"]


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [("base/5/PG_VERSION", b"1")] * 2},
        {"files": [("pg_twophase/00000001", bytes((64 << 20) + 1))]},
        {"relation_forks": pack_relation_forks([RelationFork(1663, 5, 1, 4, 1)])},
        {"relation_forks": pack_relation_forks([RelationFork(1663, 0, 1, 0, 1)])},
        {"relation_forks": pack_relation_forks([RelationFork(1664, 5, 1, 0, 1)])},
        {"relation_forks": pack_relation_forks([RelationFork(1665, 5, 1, 0, 1)])},
        {"relation_forks": pack_relation_forks([RelationFork(1663, 5, 0, 0, 1)])},
        {"relation_forks": pack_relation_forks([RelationFork(1663, 5, 7, 0, 1)] * 2)},
        {
            "relation_forks": pack_relation_forks(
                [RelationFork(1663, 5, rel, 0, 0xFFFFFFFE) for rel in range(1, 140)]
            )
        },
        {"relation_forks": bytes(19)},
        {"slru_segments": pack_slru_segments([SlruSegment(4, 0, 1)])},
        {"slru_segments": pack_slru_segments([SlruSegment(0, 0x1000, 1)])},
        {"slru_segments": pack_slru_segments([SlruSegment(0, 0, 33)])},
        {"slru_segments": bytes(11)},
        {"pages": [InlinePage(relation_block_key(Relation(1663, 5, 1), 0, 0), bytes(8191))]},
        {"pages": [InlinePage(bytes(17), bytes(8192))]},
        {"pages": [InlinePage(b"\x50" + bytes(17), bytes(8192))]},
        {"pages": [InlinePage(relation_block_key(Relation(99, 5, 1), 0, 0), bytes(8192))]},
        {"pages": [InlinePage(slru_block_key(7, 0, 0), bytes(8192))]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_no_cluster_has_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BasebackupContentError):
        decoded(**changes)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_basebackup_or_a_named_error(data: bytes) -> None:
    whole = encode_basebackup(BACKUP)
    for damaged in (data, whole[: len(data)] + data, data + whole[len(data) :]):
        with contextlib.suppress(msgspec.DecodeError, BasebackupContentError):
            decode_basebackup(damaged)


@pytest.mark.parametrize("path", ["../out", "/tmp/excimer-path-test", "base/../../out"])
def test_whoever_writes_checks_again(tmp_path: Path, path: str) -> None:
    """What was decoded is checked; should a path come in another way, it still leads nowhere."""
    root = tmp_path / "inner" / "data"
    root.parent.mkdir()
    empty = DataDirectoryPlan([], [], [], [], [])
    for plan in (
        empty._replace(directories=[path]),
        empty._replace(files=[(path, b"x")]),
        empty._replace(lazy_files=[LazyFile(path, 1)]),
    ):
        with pytest.raises(UnsafePathError):
            write_data_directory(root, plan, 16 << 20)
        assert not root.exists()
    sink = DirectorySink(root, Owner.of_uid(os.geteuid()))
    sink.begin()
    with pytest.raises(UnsafePathError):
        sink.add_directory(path)
    with pytest.raises(UnsafePathError):
        sink.add_file(path, b"x")
    sink.abandon()
    assert [found.name for found in tmp_path.rglob("*")] == ["inner"]
    assert not Path("/tmp/excimer-path-test").exists()


# -- the files of an import


@given(ANY_PATH)
def test_any_name_in_a_tar_is_taken_ignored_or_refused(path: str) -> None:
    for kind in (b"0", b"5", b"2"):
        try:
            file = wanted_file(MemberStart(path, 0, kind))
        except (ClusterFileError, TablespacesError):
            continue
        assert kind != b"2"
        if file is not None:
            assert check_relative_path(path) == path
            assert max(file.relation) <= 0xFFFFFFFF


@pytest.mark.parametrize("path", HOSTILE)
def test_an_import_takes_no_file_from_elsewhere(path: str) -> None:
    with pytest.raises(ClusterFileError):
        wanted_file(MemberStart(path, 8192, b"0"))


@pytest.mark.parametrize(
    "path",
    [
        "base/5/4294967296",
        "base/4294967296/1",
        "base/5/1.32768",
        f"base/5/{'9' * 5000}",
        "pg_xact/1000",
        "pg_multixact/members/FFFFFFFFFFFFFFF",
    ],
)
def test_numbers_that_postgresql_does_not_use_are_refused(path: str) -> None:
    with pytest.raises(ClusterFileError):
        identify_file(path)


def test_digits_of_other_scripts_are_no_relation() -> None:
    assert identify_file("base/٥/١٢٣") is None


@pytest.mark.parametrize(
    ("path", "size_bytes"),
    [("base/5/16384", (1 << 30) + 1), ("pg_xact/0000", 32 * 8192 + 1), ("global/pg_control", 1 << 25)],
)
def test_sizes_that_postgresql_does_not_write_are_refused(path: str, size_bytes: int) -> None:
    with pytest.raises(ClusterFileError, match="too many"):
        wanted_file(MemberStart(path, size_bytes, b"0"))
    assert wanted_file(MemberStart(path, 8192, b"0")) is not None


def is_start(event: TarEvent) -> TypeGuard[MemberStart]:
    return isinstance(event, MemberStart)


@pytest.mark.parametrize("kind", [b"1", b"2"])
def test_links_are_refused(kind: bytes) -> None:
    header = bytearray(pack_file_header("base/5/16384", 0))
    header[156:157] = kind
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    header[148:156] = b"%06o\0 " % total
    with pytest.raises((ClusterFileError, TarError), match=r"is a link|of type"):
        list(map(wanted_file, filter(is_start, TarParser().feed(bytes(header)))))


@pytest.mark.parametrize("field", [b"-0000000001\0", b"0000_000010\0", b"+0000000010\0", b"0x000000010\0"])
def test_a_size_that_is_no_octal_number_is_refused(field: bytes) -> None:
    """A negative one made the parser go backwards."""
    header = bytearray(pack_file_header("base/5/16384", 0))
    header[124:136] = field
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    header[148:156] = b"%06o\0 " % total
    with pytest.raises(TarError, match="not a number"):
        list(TarParser().feed(bytes(header)))
