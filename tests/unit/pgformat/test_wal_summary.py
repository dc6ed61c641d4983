"""The summary of no WAL that a start directory has: PostgreSQL's own tool reads it, and it covers nothing."""

from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.io.processes import ProgramFailedError, run
from excimer.pgformat.wal_summary import start_summary
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory


def test_it_is_named_by_where_it_begins_and_ends_which_is_the_same() -> None:
    path, _ = start_summary(Lsn(0x12_3456_7890))
    assert path == "pg_wal/summaries/0000000100000012345678900000001234567890.summary"


def test_postgresql_reads_it_and_finds_no_block() -> None:
    build = build_of(NEWEST_VERSION)
    path, content = start_summary(Lsn(0x15000028))
    with reachable_directory() as directory:
        file = directory / Path(path).name
        file.write_bytes(content)
        read = [build.program("pg_walsummary"), file]
        assert run(read, environment=build.whole_environment()) == ""
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ProgramFailedError, match="checksum"):
            run(read, environment=build.whole_environment())
