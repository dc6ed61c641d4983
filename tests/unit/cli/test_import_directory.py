"""Data directories that cannot be imported, and what the user is told; and what of a directory is sent."""

import json
from pathlib import Path

import msgspec
import pytest

from excimer.base.lsn import Lsn
from excimer.cli.import_directory import DirectorySource
from excimer.cli.import_source import SourceRefusedError
from excimer.pgformat.control_file import ClusterState
from excimer.pgformat.tar_stream import MemberStart, TarParser
from excimer.wire.import_stream import FilesEnd, ImportBegin, ImportEnd, ImportStreamParser, TarBytes
from tests.kit.control_files import CONTROL

LABEL = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nSTART TIMELINE: 1\n"
MANIFEST = {"WAL-Ranges": [{"Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000120"}]}
STOPPED = msgspec.structs.replace(CONTROL, state=ClusterState.SHUTDOWNED, checkpoint_lsn=0x2000028)
RUNNING = msgspec.structs.replace(CONTROL, state=ClusterState.IN_PRODUCTION)


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def backup(directory: Path, **changes: bytes) -> Path:
    files = {
        "PG_VERSION": b"18\n",
        "global/pg_control": RUNNING.pack(),
        "backup_label": LABEL.encode(),
        "backup_manifest": json.dumps(MANIFEST).encode(),
        "pg_wal/archive_status/x": b"",
        "base/5/16384": bytes(8192),
        "base/5/16385": bytes(8192),
        "base/5/16385_vm": bytes(8192),
        "base/5/16385_init": b"",
        "base/5/pg_internal.init": b"cache",
        "base/pgsql_tmp/pgsql_tmp1.0": b"temporary",
        "pg_stat_tmp/global.stat": b"temporary",
        "pg_replslot/slot/state": b"slot",
    }
    return write(directory, files | changes)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "is not a data directory: it has no PG_VERSION"),
        ({"PG_VERSION": b"13\n"}, "of PostgreSQL 13: only 14 to 18"),
        ({"PG_VERSION": b"what\n"}, "of PostgreSQL what"),
        ({"PG_VERSION": b"18\n", "postmaster.pid": b"7\n"}, "a server runs in .*`pg_ctl stop`"),
        ({"PG_VERSION": b"18\n", "pg_tblspc/16400": b""}, "has tablespaces .16400."),
        ({"PG_VERSION": b"18\n"}, "cannot read .*pg_control"),
        ({"PG_VERSION": b"18\n", "global/pg_control": b"x" * 8192}, "pg_control's checksum is wrong"),
        ({"PG_VERSION": b"18\n", "global/pg_control": RUNNING.pack()}, "its state is: in production"),
        (
            {"PG_VERSION": b"18\n", "global/pg_control": RUNNING.pack()},
            "export. needs that too: .*pg exec 18 pg_ctl",
        ),
        ({"PG_VERSION": b"18\n", "global/pg_control": STOPPED.pack()}, "the last checkpoint is missing"),
    ],
)
def test_what_cannot_be_imported(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    with pytest.raises(SourceRefusedError, match=says):
        DirectorySource(write(tmp_path, files), None)


@pytest.mark.parametrize(
    ("label", "manifest", "to_lsn", "says"),
    [
        (LABEL, None, None, "no backup_manifest"),
        (LABEL, {"WAL-Ranges": [{"Timeline": 2, "End-LSN": "0/1"}]}, None, "from one PostgreSQL timeline"),
        (LABEL, {"WAL-Ranges": 5}, None, "backup_manifest cannot be understood"),
        ("START TIME: now\n", MANIFEST, None, "does not say where its WAL starts"),
        (LABEL, MANIFEST, Lsn(0x2000100), "--to 0/2000100 is too early: .* from 0/2000120 on"),
    ],
)
def test_backups_that_lack_something(
    tmp_path: Path, label: str, manifest: object, to_lsn: Lsn | None, says: str
) -> None:
    backup(tmp_path, backup_label=label.encode(), backup_manifest=json.dumps(manifest).encode())
    if manifest is None:
        (tmp_path / "backup_manifest").unlink()
    with pytest.raises(SourceRefusedError, match=says):
        DirectorySource(tmp_path, to_lsn)


def test_what_is_sent_of_a_backup(tmp_path: Path) -> None:
    parser, tar = ImportStreamParser(), TarParser()
    sent = b"".join(DirectorySource(backup(tmp_path), None).frames())
    frames = list(parser.feed(sent))
    assert isinstance(frames[0], ImportBegin)
    assert (frames[0].start_lsn, frames[0].prev_record_lsn) == (0x2000000, 0), "WAL begins with the page"
    assert frames[-2:] == [FilesEnd(readable_lsn=Lsn(0x2000120)), ImportEnd()]
    events = [event for frame in frames if isinstance(frame, TarBytes) for event in tar.feed(frame.data)]
    assert [event.path for event in events if isinstance(event, MemberStart)] == [
        "global/pg_control",
        "base/5/16384",
        "base/5/16385_init",
    ]
