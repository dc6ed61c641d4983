"""Which directory a start may use: the one that this endpoint shut down, in this boot, where the WAL ends."""

import re

import msgspec
import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute.warm_start import (
    Cold,
    FoundDirectory,
    Owner,
    QuorumEnd,
    ShutdownRecord,
    Warm,
    decide_start,
    told,
)
from excimer.wire.safekeeping import Term, TermStart

OWNER = Owner(
    tenant_id=TenantId("ab" * 16),
    timeline_id=TimelineId("cd" * 16),
    endpoint="main",
    postgres="18.6 (1)",
    module="module-1",
)
RECORD = ShutdownRecord(
    boot_id="boot",
    owner=OWNER,
    directory_id="d1",
    control_digest="c1",
    end_lsn=Lsn(0x5000),
    writer_term=Term(3),
    writer_start_lsn=Lsn(0x4000),
    ingested_lsn=Lsn(0x4800),
    superusers=("postgres",),
    stopped_at_s=1.0,
    size_bytes=1,
)
FOUND = FoundDirectory("d1", "d1", "c1")
QUORUM = QuorumEnd(Lsn(0x5000), TermStart(Term(3), Lsn(0x4000)))


def decide(
    record: ShutdownRecord | None = RECORD,
    found: FoundDirectory | None = FOUND,
    quorum: QuorumEnd = QUORUM,
    owner: Owner = OWNER,
    boot_id: str | None = "boot",
    not_kept: str | None = None,
) -> Warm | Cold:
    return decide_start(record, found, quorum, owner=owner, boot_id=boot_id, not_kept=not_kept)


def changed(**changes: object) -> ShutdownRecord:
    return msgspec.structs.replace(RECORD, **changes)


def foreign(**changes: str) -> Owner:
    return msgspec.structs.replace(OWNER, **changes)


def test_what_was_shut_down_here_is_used() -> None:
    assert decide() == Warm(RECORD)
    assert told(decide()) == {"start": "warm", "start_reason": ""}


def test_no_directory_needs_no_reason() -> None:
    assert decide(found=None) == decide(record=None, found=None) == Cold(None)
    assert decide(found=None, not_kept="no room") == Cold("no room")
    assert told(Cold(None)) == told(None) == {"start": "cold", "start_reason": ""}


@pytest.mark.parametrize(
    ("decided", "reason"),
    [
        (decide(record=None), "it was not shut down cleanly"),
        (decide(record=changed(version=2)), "another version of Excimer"),
        (decide(owner=foreign(tenant_id="00" * 16)), "another endpoint's"),
        (decide(owner=foreign(endpoint="other")), "another endpoint's"),
        (decide(owner=foreign(timeline_id="00" * 16)), "another timeline"),
        (decide(owner=foreign(postgres="18.7 (2)")), "18.6 .* 18.7"),
        (decide(owner=foreign(module="module-2")), "endpoint module"),
        (decide(boot_id="another"), "started anew"),
        (decide(boot_id=None), "started anew"),
        (decide(found=FOUND._replace(directory_id=None)), "not the directory"),
        (decide(found=FOUND._replace(directory_id="d2")), "not the directory"),
        (decide(found=FOUND._replace(arena_id=None)), "arena cannot be read"),
        (decide(found=FOUND._replace(arena_id="d2")), "arena belongs to another"),
        (decide(found=FOUND._replace(control_digest="c2")), "changed"),
        (decide(found=FOUND._replace(control_digest=None)), "changed"),
        (decide(quorum=QUORUM._replace(lsn=Lsn(0x5078))), "ends at 0/5078, .* at 0/5000"),
        (decide(quorum=QUORUM._replace(lsn=Lsn(0x4F00))), "ends at 0/4F00, .* at 0/5000"),
        (decide(quorum=QUORUM._replace(writer=TermStart(Term(4), Lsn(0x4000)))), "another compute"),
        (decide(quorum=QUORUM._replace(writer=TermStart(Term(3), Lsn(0x4800)))), "another compute"),
        (decide(quorum=QUORUM._replace(writer=None)), "another compute"),
    ],
)
def test_any_other_is_thrown_away_with_the_reason(decided: Warm | Cold, reason: str) -> None:
    assert isinstance(decided, Cold)
    assert decided.reason is not None
    assert re.search(reason, decided.reason)
    assert told(decided) == {"start": "cold", "start_reason": decided.reason}


def test_a_record_is_read_back_as_it_was_written() -> None:
    assert msgspec.json.decode(msgspec.json.encode(RECORD), type=ShutdownRecord) == RECORD
