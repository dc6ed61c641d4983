"""Replication commands as stock clients of 14 to 18 write them, and the messages inside CopyData."""

import pytest

from excimer.base.lsn import Lsn
from excimer.wire.pg_messages import ProtocolViolationError, encode_copy_data
from excimer.wire.replication import (
    NOTHING_NEEDED,
    Command,
    CreateReplicationSlot,
    EmptyCommand,
    HotStandbyFeedback,
    IdentifySystem,
    Keepalive,
    ReadReplicationSlot,
    Show,
    StandbyStatus,
    StartReplication,
    SystemIdentity,
    TimelineHistory,
    UnknownCommandError,
    WalData,
    decode_from_client,
    decode_from_server,
    decode_system_identity,
    decode_whole_wal,
    encode_feedback,
    encode_keepalive,
    encode_status,
    encode_whole_status,
    format_options,
    format_start_replication,
    oldest_needs,
    parse_command,
    parse_options,
    wal_data_head,
)


@pytest.mark.parametrize(
    ("query", "command"),
    [
        ("IDENTIFY_SYSTEM", IdentifySystem()),
        ("identify_system;", IdentifySystem()),
        ("SHOW wal_segment_size", Show("wal_segment_size")),
        ("SHOW data_directory_mode", Show("data_directory_mode")),
        ("TIMELINE_HISTORY 3", TimelineHistory(3)),
        ("START_REPLICATION 0/1000000 TIMELINE 1", StartReplication(Lsn(0x1000000), 1)),
        ("START_REPLICATION PHYSICAL 16/B374D848", StartReplication(Lsn(0x16B374D848))),
        ('START_REPLICATION SLOT "s1" 0/A TIMELINE 2', StartReplication(Lsn(10), 2, "s1")),
        ("START_REPLICATION SLOT s1 PHYSICAL 0/A", StartReplication(Lsn(10), None, "s1")),
        ('CREATE_REPLICATION_SLOT "x" TEMPORARY PHYSICAL RESERVE_WAL', CreateReplicationSlot("x")),
        ('CREATE_REPLICATION_SLOT "x" PHYSICAL (RESERVE_WAL)', CreateReplicationSlot("x")),
        ("READ_REPLICATION_SLOT x", ReadReplicationSlot("x")),
        ("  ", EmptyCommand()),
    ],
)
def test_commands(query: str, command: Command) -> None:
    assert parse_command(query) == command
    if isinstance(command, StartReplication):
        assert parse_command(format_start_replication(command)) == command


@pytest.mark.parametrize("query", ["SELECT 1", "START_REPLICATION SLOT s LOGICAL 0/0", "BASE_BACKUP", "\x00"])
def test_other_queries_are_refused(query: str) -> None:
    with pytest.raises(UnknownCommandError):
        parse_command(query)


def test_messages_round_trip() -> None:
    status = StandbyStatus(Lsn(3), Lsn(2), Lsn(1), -5, True)
    assert decode_from_client(encode_status(status)) == status
    assert decode_from_client(b"h" + bytes(24)) == NOTHING_NEEDED
    needs = HotStandbyFeedback(5 << 32 | 700, 3 << 32 | 3)
    assert decode_from_client(encode_feedback(needs, 12)) == needs
    assert oldest_needs([needs, NOTHING_NEEDED, HotStandbyFeedback(4 << 32 | 900, 0)]) == HotStandbyFeedback(
        4 << 32 | 900, 3 << 32 | 3
    )
    assert oldest_needs([]) == NOTHING_NEEDED
    keepalive = Keepalive(Lsn(9), 7, False)
    assert decode_from_server(encode_keepalive(keepalive)) == keepalive
    assert decode_from_server(wal_data_head(4, 5, 6) + b"abc") == WalData(Lsn(4), Lsn(5), b"abc")


def test_whole_messages_are_what_their_parts_make() -> None:
    payload = wal_data_head(4, 5, 6) + b"abc"
    message = encode_copy_data(payload)
    assert decode_whole_wal(message) == decode_from_server(payload)
    keepalive = encode_copy_data(encode_keepalive(Keepalive(Lsn(9), 7, False)))
    longer_keepalive = encode_copy_data(encode_keepalive(Keepalive(Lsn(9), 7, False)) + bytes(12))
    others = [message[:-1], message + b"d", message + message, message[:20], b"", keepalive, longer_keepalive]
    assert [decode_whole_wal(other) for other in others] == [None] * len(others)
    status = StandbyStatus(Lsn(3), Lsn(2), Lsn(1), -5, False)
    assert encode_whole_status((Lsn(3), Lsn(2), Lsn(1)), -5) == encode_copy_data(encode_status(status))


@pytest.mark.parametrize(
    "payload", [b"", b"w", b"k123", b"z", encode_status(StandbyStatus(Lsn(0), Lsn(0), Lsn(0), 0, False))]
)
def test_malformed_server_messages_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        decode_from_server(payload)


@pytest.mark.parametrize("payload", [b"", b"r", b"r" + bytes(40), b"w"])
def test_malformed_client_messages_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        decode_from_client(payload)


def test_options_name_the_timeline() -> None:
    options = parse_options(format_options("aa", "bb"))
    assert options == {"excimer.tenant_id": "aa", "excimer.timeline_id": "bb"}
    assert parse_options("--excimer.tenant_id=aa -cx=y") == {"excimer.tenant_id": "aa", "x": "y"}


def test_system_identity() -> None:
    row: list[bytes | None] = [b"7000000000000000001", b"1", b"0/1A2B3C8", None]
    assert decode_system_identity(row) == SystemIdentity(7000000000000000001, 1, Lsn(0x1A2B3C8))
    with pytest.raises(ProtocolViolationError):
        decode_system_identity([b"x", b"1", b"0/0", None])
