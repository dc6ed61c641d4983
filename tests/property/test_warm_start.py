"""A start uses a kept directory only if it holds exactly the branch's log, whole, and of this endpoint (H3).

The world is a log of bytes (each one's value is the life that wrote it), an endpoint that starts, writes,
stops and dies in it, other computes that write meanwhile, branches that get another state under one name,
reboots that lose what was not synced, and somebody who puts old copies of files in place. What decides is the
real code.
"""

from typing import NamedTuple

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute.warm_start import (
    FoundDirectory,
    Owner,
    QuorumEnd,
    ShutdownRecord,
    Warm,
    decide_start,
)
from excimer.consensus.term_history import TermHistory
from excimer.wire.safekeeping import Term

FIRST_LSN = 10
COUNTS = st.integers(0, 3)


class Directory(NamedTuple):
    """A data directory with its arena: what is in it, and what can be seen of that without reading all."""

    content: tuple[int, ...]
    is_whole: bool
    owner: Owner
    directory_id: str
    arena_id: str
    control_digest: str


class Branch:
    """What a quorum has of one timeline."""

    def __init__(self, timeline: int, log: tuple[int, ...], history: TermHistory) -> None:
        self.timeline_id = TimelineId(f"{timeline:032x}")
        self.log = log
        self.history = history

    def elect(self) -> QuorumEnd:
        end_lsn = Lsn(len(self.log))
        end = QuorumEnd(end_lsn, self.history.writer_of(end_lsn))
        self.history = self.history.extended(Term(self.history.last.term + 1), end_lsn)
        return end

    def write(self, life: int, count: int) -> None:
        self.log += (life,) * count


class WarmStarts(RuleBasedStateMachine):
    """One endpoint and all that can happen around it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        """Of lives, directories, digests and timelines: none is used twice."""
        self.boot = 0
        self.postgres = 0
        first = TermHistory.bootstrap(Lsn(FIRST_LSN))
        self.branch = Branch(self.next(), (0,) * FIRST_LSN, first)
        self.directory: Directory | None = None
        self.record: ShutdownRecord | None = None
        self.life: int | None = None
        """Of the postgres that runs."""
        self.old: list[tuple[Directory, ShutdownRecord | None]] = []

    def next(self) -> int:
        self.count += 1
        return self.count

    @property
    def owner(self) -> Owner:
        return Owner(
            tenant_id=TenantId("ab" * 16),
            timeline_id=self.branch.timeline_id,
            endpoint="main",
            postgres=str(self.postgres),
            module="module",
        )

    def decide(self) -> bool:
        """The start of an attempt, as `EndpointDirectory.decide` carries it out: whether it is warm."""
        directory = self.directory
        found = directory and FoundDirectory(
            directory.directory_id, directory.arena_id, directory.control_digest
        )
        quorum = self.branch.elect()
        decided = decide_start(self.record, found, quorum, owner=self.owner, boot_id=str(self.boot))
        self.record = None
        if isinstance(decided, Warm):
            assert directory is not None
            assert directory.is_whole
            assert directory.content == self.branch.log
            assert directory.owner == self.owner
            return True
        self.directory = None
        return False

    @precondition(lambda self: self.life is None)
    @rule(dies=st.sampled_from(["not", "before postgres", "in postgres"]))
    def start(self, dies: str) -> None:
        is_warm = self.decide()
        if is_warm and dies == "before postgres":
            return  # the directory is whole, but nothing says so any more
        life = self.next()
        name = self.directory.directory_id if self.directory else f"d{self.next()}"
        self.directory = Directory(
            self.branch.log, False, self.owner, name, name, control_digest=f"c{self.next()}"
        )
        if dies == "not":
            self.life = life

    @precondition(lambda self: self.life is not None)
    @rule(count=COUNTS, is_confirmed=st.booleans())
    def write(self, count: int, is_confirmed: bool) -> None:
        assert self.life is not None
        assert self.directory is not None
        if self.directory.content != self.branch.log:
            return  # a proposer whose WAL is not the quorum's is fenced
        self.directory = self.directory._replace(content=self.directory.content + (self.life,) * count)
        if is_confirmed:
            self.branch.write(self.life, count)

    @precondition(lambda self: self.life is not None)
    @rule(dies=st.booleans())
    def stop(self, dies: bool) -> None:
        """With a shutdown checkpoint; its record is written, as `EndpointDirectory.finish` does."""
        life, directory = self.life, self.directory
        assert life is not None
        assert directory is not None
        self.life = None
        is_confirmed = directory.content == self.branch.log
        directory = directory._replace(
            content=(*directory.content, life), is_whole=True, control_digest=f"c{self.next()}"
        )
        self.directory = directory
        if is_confirmed:
            self.branch.write(life, 1)
        if not is_confirmed:
            self.directory = None
        elif not dies:
            writer = self.branch.history.writer_of(Lsn(len(self.branch.log)))
            assert writer is not None
            self.record = ShutdownRecord(
                boot_id=str(self.boot),
                owner=directory.owner,
                directory_id=directory.directory_id,
                control_digest=directory.control_digest,
                end_lsn=Lsn(len(self.branch.log)),
                writer_term=writer.term,
                writer_start_lsn=writer.start_lsn,
                ingested_lsn=Lsn(0),
                superusers=(),
                stopped_at_s=0.0,
                size_bytes=0,
            )

    @precondition(lambda self: self.life is None)
    @rule(count=COUNTS)
    def live(self, count: int) -> None:
        """What happens most: a start, some writes, a clean stop."""
        self.start("not")
        self.write(count, True)
        self.stop(False)

    @precondition(lambda self: self.life is None)
    @rule()
    def the_quorum_loses_its_newest_wal(self) -> None:
        """By somebody who puts back old disks of all safekeepers."""
        if len(self.branch.log) > self.branch.history.entries[0].start_lsn:
            self.branch.log = self.branch.log[:-1]
            self.branch.history = self.branch.history.up_to(Lsn(len(self.branch.log)))

    @precondition(lambda self: self.life is not None)
    @rule()
    def renew(self) -> None:
        """The leader that runs wins its members back in a higher term."""
        end_lsn = Lsn(len(self.branch.log))
        self.branch.history = self.branch.history.extended(Term(self.branch.history.last.term + 1), end_lsn)

    @precondition(lambda self: self.life is not None)
    @rule()
    def crash(self) -> None:
        self.life = None

    @precondition(lambda self: self.life is None)
    @rule(count=COUNTS, cut=COUNTS)
    def another_compute_writes(self, count: int, cut: int) -> None:
        """Some of it may be lost again: it was not committed."""
        self.branch.elect()
        self.branch.write(self.next(), count)
        if cut < count:
            self.branch.log = self.branch.log[: len(self.branch.log) - cut]

    @precondition(lambda self: self.life is None)
    @rule(cut=COUNTS, count=COUNTS)
    def the_branch_gets_another_state(self, cut: int, count: int) -> None:
        """Restored or reset: a new timeline, whose log may well be as long."""
        log = self.branch.log[: max(FIRST_LSN, len(self.branch.log) - cut)]
        first = TermHistory.bootstrap(Lsn(len(log)))
        self.branch = Branch(self.next(), log, first)
        if count:
            self.branch.elect()
            self.branch.write(self.next(), count)

    @precondition(lambda self: self.life is None)
    @rule(tears=st.booleans())
    def reboot(self, tears: bool) -> None:
        self.boot += 1
        if self.directory is not None and tears:
            self.directory = self.directory._replace(content=self.directory.content[:-1], is_whole=False)

    @precondition(lambda self: self.life is None)
    @rule()
    def upgrade(self) -> None:
        self.postgres += 1

    @precondition(lambda self: self.life is None and self.directory is not None)
    @rule()
    def copy(self) -> None:
        assert self.directory is not None
        self.old.append((self.directory, self.record))

    @precondition(lambda self: self.life is None and self.old)
    @rule(what=st.sampled_from(["all", "record", "directory", "arena"]), which=st.integers(0, 99))
    def put_back(self, what: str, which: int) -> None:
        directory, record = self.old[which % len(self.old)]
        if what in ("all", "record"):
            self.record = record
        if what in ("all", "directory"):
            self.directory = directory
        if what == "arena" and self.directory is not None and self.directory.arena_id != directory.arena_id:
            self.directory = self.directory._replace(arena_id=directory.arena_id, is_whole=False)

    @precondition(lambda self: self.life is None and self.directory is not None)
    @rule()
    def something_else_runs_there(self) -> None:
        """A postgres that somebody started by hand changes pg_control before anything else."""
        assert self.directory is not None
        self.directory = self.directory._replace(
            content=(*self.directory.content, -1), is_whole=False, control_digest=f"c{self.next()}"
        )

    @invariant()
    def who_runs_has_no_record(self) -> None:
        assert self.life is None or self.record is None


TestWarmStarts = WarmStarts.TestCase
TestWarmStarts.settings = settings(max_examples=400, stateful_step_count=20, deadline=None)


def test_a_clean_stop_is_followed_by_a_warm_start() -> None:
    """Also after renewals, and after computes that were elected and wrote nothing that lasted."""
    world = WarmStarts()
    world.start("not")
    for _ in range(3):
        world.write(2, True)
        world.renew()
        world.stop(False)
        world.another_compute_writes(0, 0)
        assert world.decide()
        assert world.directory is not None
        world.life = world.next()


def test_a_writer_who_wrote_as_much_is_noticed() -> None:
    world = WarmStarts()
    world.start("not")
    world.stop(False)
    kept = msgspec.structs.replace(world.record) if world.record else None
    end = len(world.branch.log)
    world.branch.log = world.branch.log[:-1]
    world.branch.history = world.branch.history.up_to(Lsn(end - 1))
    world.another_compute_writes(1, 1)
    assert (len(world.branch.log), kept) == (end, world.record)
    assert not world.decide()
