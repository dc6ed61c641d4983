"""Stock PostgreSQL commits through three real safekeepers: D1, deaths, fencing, catching up."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from excimer.base.errors import RefusedError
from excimer.base.lsn import MAX_LSN, Lsn, format_lsn
from excimer.compute.proposer import NewerProposerError, Proposer
from excimer.consensus.proposer import ProposerLimits
from excimer.io.processes import give_to_user, make_owned_dir, run
from excimer.service.native_loop import NativeEventLoop
from excimer.service.tasks import running
from excimer.wire.replication import format_options
from excimer.wire.safekeeping import Term, VoteRequest
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.plain_postgres import PROPOSER_CONFIGURATION, PlainPostgres
from tests.kit.raw_proposer import RawProposer
from tests.kit.safekeepers import (
    TENANT,
    TIMELINE,
    SafekeeperCluster,
    running_safekeepers,
)

pytestmark = pytest.mark.timeout(120)
BLOCKED_S = 0.7
"""A commit that has not come back by then counts as blocked."""
SOON_S = 15.0
T = TypeVar("T")


@pytest.fixture(scope="session")
def initdb_template() -> Iterator[Path]:
    plain = PlainPostgres(build_of(NEWEST_VERSION))
    plain.create()
    (plain.data_dir / "postgresql.conf").write_text("")
    yield plain.data_dir
    plain.remove()


@pytest.fixture
def postgres(initdb_template: Path) -> Iterator[PlainPostgres]:
    plain = PlainPostgres(build_of(NEWEST_VERSION))
    plain.create(PROPOSER_CONFIGURATION, initdb_template)
    yield plain
    plain.remove()


@pytest.fixture
def safekeepers(tmp_path: Path) -> Iterator[SafekeeperCluster]:
    with running_safekeepers(tmp_path) as cluster:
        yield cluster


def run_natively(main: Coroutine[Any, Any, T]) -> T:
    """As a compute's manager runs it."""
    with asyncio.Runner(loop_factory=NativeEventLoop) as runner:
        return runner.run(main)


def new_proposer(
    safekeepers: SafekeeperCluster, token: str | None = None, limits: ProposerLimits | None = None
) -> Proposer:
    return Proposer(
        tenant_id=TENANT,
        timeline_id=TIMELINE,
        safekeepers=safekeepers.addresses,
        token=token or safekeepers.token,
        limits=limits,
    )


@contextlib.asynccontextmanager
async def streaming(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster, limits: ProposerLimits | None = None
) -> AsyncIterator[Proposer]:
    """PostgreSQL runs, its timeline exists, and a proposer carries its WAL."""
    async with postgres.running():
        start_lsn = await postgres.flush_lsn()
        safekeepers.create_timeline(start_lsn, NEWEST_VERSION, await postgres.system_id())
        proposer = new_proposer(safekeepers, limits=limits)
        try:
            election = await proposer.elect()
            assert election.start_lsn == start_lsn
            async with running("proposer", proposer.stream(postgres.address)):
                yield proposer
        finally:
            proposer.close()


async def execute(postgres: PlainPostgres, *statements: str) -> None:
    async with await postgres.connect() as connection:
        for statement in statements:
            await connection.execute(statement.encode())


async def is_blocked(task: "asyncio.Task[None]") -> bool:
    done, _ = await asyncio.wait((task,), timeout=BLOCKED_S)
    return not done


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(int(SOON_S / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not in time: {what}")


def test_one_dead_safekeeper_changes_nothing_and_two_block_commits(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    async def scenario() -> None:
        async with streaming(postgres, safekeepers) as proposer, asyncio.TaskGroup() as group:
            await execute(postgres, "create table t(i int)", "insert into t values (1)")
            committed = await postgres.flush_lsn()
            assert proposer.commit_lsn >= committed
            first, second, _ = safekeepers.members
            first.kill()
            await execute(postgres, "insert into t values (2)")
            second.kill()
            blocked = group.create_task(execute(postgres, "insert into t values (3)"))
            assert await is_blocked(blocked)
            first.start()
            await asyncio.wait_for(blocked, SOON_S)
            second.start()
            end = await postgres.flush_lsn()
            members = safekeepers.members
            await wait_until(lambda: all(each.flush_lsn() >= end for each in members), "all catch up")
            await wait_until(lambda: all(each.commit_lsn() >= end for each in members), "all hear of it")
            assert await postgres.value("select count(*) from t") == "3"

    run_natively(scenario())


def test_a_commit_above_what_may_be_confirmed_waits_and_is_not_refused(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    async def scenario() -> None:
        async with streaming(postgres, safekeepers) as proposer, asyncio.TaskGroup() as group:
            await execute(postgres, "create table t(i int)")
            proposer.confirm_up_to(proposer.commit_lsn)
            held = group.create_task(execute(postgres, "insert into t values (1)"))
            assert await is_blocked(held)
            assert proposer.received_lsn >= proposer.commit_lsn > 0
            proposer.confirm_up_to(MAX_LSN)
            await asyncio.wait_for(held, SOON_S)
            assert await postgres.value("select count(*) from t") == "1"

    run_natively(scenario())


def test_commits_pass_without_the_interpreter(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first: until it, the proposer waits for safekeepers to be repaired."""
    interpreted = []
    plain_way = Proposer.wal_received

    def wal_received(proposer: Proposer, start_lsn: Lsn, data: bytes) -> None:
        interpreted.append(start_lsn)
        plain_way(proposer, start_lsn, data)

    monkeypatch.setattr(Proposer, "wal_received", wal_received)

    async def scenario() -> None:
        async with streaming(postgres, safekeepers):
            await execute(postgres, "create table counted (number int)")
            before = len(interpreted)
            await execute(postgres, *["insert into counted values (1)"] * 200)
            assert len(interpreted) - before < 20

    run_natively(scenario())


def test_received_segments_are_what_postgres_wrote(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    async def scenario() -> tuple[Lsn, Lsn, list[bytes]]:
        async with streaming(postgres, safekeepers):
            start = safekeepers.members[0].flush_lsn()
            await execute(
                postgres,
                "create table t as select g, repeat('x', 500) from generate_series(1, 60000) g",
                "select pg_switch_wal()",
                "insert into t values (0, '')",
            )
            end = await postgres.flush_lsn()
            members = safekeepers.members
            await wait_until(lambda: all(each.commit_lsn() >= end for each in members), "all have it")
            segments = sorted((postgres.data_dir / "pg_wal").glob("0*"))
            return start, end, [segment.name.encode() + segment.read_bytes() for segment in segments]

    start, end, written = run_natively(scenario())
    assert end - start > 2 << 24
    for member in safekeepers.members:
        assert member.stop() == 0
        for segment in written:
            name, wal = segment[:24].decode(), segment[24:]
            stored = (member.timeline_dir / name).read_bytes()
            lsn = int(name[8:16], 16) << 32 | int(name[16:], 16) << 24
            low, high = max(start - lsn, 0), min(max(end - lsn, 0), len(wal))
            assert stored[low:high] == wal[low:high]
            assert not any(stored[:low])
        # The page that the start lies in has no header here; from the next segment on all pages do.
        whole = Lsn((start >> 24) + 1 << 24)
        waldump = subprocess.run(
            [
                postgres.build.program("pg_waldump"),
                *("-p", member.timeline_dir, "-q", "-s", format_lsn(whole), "-e", format_lsn(end)),
            ],
            env=postgres.build.whole_environment(),
            capture_output=True,
            check=False,
        )
        assert waldump.returncode == 0, waldump.stderr


def test_a_second_proposer_fences_the_first_and_cuts_its_divergent_tail(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    async def scenario() -> None:
        async with postgres.running():
            start_lsn = await postgres.flush_lsn()
            safekeepers.create_timeline(start_lsn, NEWEST_VERSION, await postgres.system_id())
            first = new_proposer(safekeepers)
            await first.elect()
            lonely, *others = safekeepers.members
            fenced: asyncio.Task[None] | None = None
            async with asyncio.TaskGroup() as group:
                fenced = group.create_task(expect_fenced(first, postgres))
                await execute(postgres, "create table t(i int)")
                committed = await postgres.flush_lsn()
                for member in others:
                    member.kill()
                # Only one safekeeper gets this: it can never be acknowledged.
                unacknowledged = group.create_task(expect_lost(postgres))
                assert await is_blocked(unacknowledged)
                tail = lonely.flush_lsn()
                assert tail > committed
                lonely.kill()
                for member in others:
                    member.move_proposer_port()  # the first proposer is cut off from them
                    member.start()
                second = new_proposer(safekeepers)
                election = await second.elect()
                second.close()
                assert election.term == 2
                assert committed <= election.start_lsn < tail
                lonely.start()
                others[0].kill()  # so that the next majority needs the lonely one
                third = new_proposer(safekeepers)
                assert (await third.elect()).start_lsn == election.start_lsn
                assert lonely.flush_lsn() == election.start_lsn
                third.close()
                await asyncio.wait_for(fenced, SOON_S)
                assert postgres.process is not None
                await postgres.process.kill()

    async def expect_fenced(proposer: Proposer, plain: PlainPostgres) -> None:
        with pytest.raises(NewerProposerError):
            await proposer.stream(plain.address)

    async def expect_lost(plain: PlainPostgres) -> None:
        with pytest.raises(psycopg.OperationalError):
            await execute(plain, "insert into t values (1)")

    run_natively(scenario())


def test_a_safekeeper_away_for_long_is_repaired_by_another_one(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    """It lacks more than the proposer's window holds, so that a donor must help."""

    async def scenario() -> None:
        async with streaming(postgres, safekeepers):
            lagging = safekeepers.members[0]
            lagging.kill()
            start = await postgres.flush_lsn()
            await execute(
                postgres, "create table t as select g, repeat('x', 900) from generate_series(1, 60000) g"
            )
            end = await postgres.flush_lsn()
            assert end - start > ProposerLimits().window_size_bytes_max + (16 << 20)
            lagging.start()
            await wait_until(lambda: lagging.commit_lsn() >= end, "it catches up")
            assert postgres.process is not None
            started = time.monotonic()
            await postgres.process.stop()  # waits until its last WAL is confirmed
            assert time.monotonic() - started < 4
        contents = [
            [path.read_bytes() for path in sorted(member.timeline_dir.glob("0*"))[:4]]
            for member in safekeepers.members
        ]
        assert contents[0] == contents[1] == contents[2]

    run_natively(scenario())


def test_a_record_longer_than_the_window_outlives_restarts_of_all_safekeepers(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    """Each keeps whole records only, so that nobody but PostgreSQL has its beginning."""
    size_bytes = 24 << 20
    limits = ProposerLimits(window_size_bytes_max=4 << 20)

    async def scenario() -> None:
        async with streaming(postgres, safekeepers, limits) as proposer, asyncio.TaskGroup() as group:
            await execute(postgres, "create table t(i int)")
            first, *others = safekeepers.members
            start = first.flush_lsn()
            message = f"select pg_logical_emit_message(true, 'long', repeat('x', {size_bytes}))"
            writing = group.create_task(execute(postgres, message))
            await wait_until(lambda: first.flush_lsn() > start + (8 << 20), "a part of the record is stored")
            for member in (first, *others):
                member.kill()
            for member in (first, *others):
                member.start()
            await asyncio.wait_for(writing, 2 * SOON_S)
            await execute(postgres, "insert into t values (1)")
            end = await postgres.flush_lsn()
            assert end > start + size_bytes
            await wait_until(lambda: proposer.commit_lsn >= end, "what background processes wrote, too")
            members = safekeepers.members
            await wait_until(lambda: all(each.commit_lsn() >= end for each in members), "all catch up")

    run_natively(scenario())


def test_a_forgotten_candidates_promise_does_not_stop_a_healthy_primary(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    async def scenario() -> None:
        away, *_ = safekeepers.members
        async with postgres.running():
            start_lsn = await postgres.flush_lsn()
            safekeepers.create_timeline(start_lsn, NEWEST_VERSION, await postgres.system_id())
            away.kill()
            proposer = new_proposer(safekeepers)
            try:
                assert (await proposer.elect()).term == 1
                async with running("proposer", proposer.stream(postgres.address)):
                    await execute(postgres, "create table t(i int)")
                    away.start()
                    with RawProposer(away.proposer_address) as candidate:
                        candidate.greet(TENANT, TIMELINE, safekeepers.token)
                        candidate.send(VoteRequest(Term(7), candidate.id))
                        assert candidate.receive() is not None
                    await execute(postgres, "insert into t values (1)")
                    end = await postgres.flush_lsn()
                    await wait_until(lambda: away.commit_lsn() >= end, "it is won back")
                    assert {member.timeline()["term"] for member in safekeepers.members} == {8}
                    await execute(postgres, "insert into t values (2)")
            finally:
                proposer.close()

    run_natively(scenario())


def test_a_stock_standby_follows_from_a_safekeeper(
    postgres: PlainPostgres, safekeepers: SafekeeperCluster
) -> None:
    build = postgres.build
    standby = PlainPostgres(build)
    reader = safekeepers.members[1].replication_address
    options = format_options(TENANT, TIMELINE)
    source = (
        f"host={reader.host} port={reader.port} user=standby password={safekeepers.token} "
        f"options=''{options}''"
    )

    async def scenario() -> None:
        async with streaming(postgres, safekeepers):
            await execute(postgres, "create table t(i int)", "insert into t values (1)")
            make_owned_dir(standby.root)
            copy = ["-D", str(standby.data_dir), "-d", postgres.url, "-X", "none", "-c", "fast"]
            await asyncio.to_thread(
                run,
                [build.program("pg_basebackup"), *copy],
                environment=build.whole_environment(),
                timeout_s=60,
            )
            standby.configure(f"synchronous_standby_names = ''\nprimary_conninfo = '{source}'\n")
            (standby.data_dir / "standby.signal").touch()
            give_to_user(standby.data_dir / "standby.signal")
            async with standby.running():
                await execute(postgres, "insert into t values (2)")
                end = format_lsn(await postgres.flush_lsn())
                for _ in range(100):
                    if await standby.value(f"select pg_last_wal_replay_lsn() >= '{end}'") == "True":
                        break
                    await asyncio.sleep(0.1)
                assert await standby.value("select count(*) from t") == "2"
                assert await standby.value("select status from pg_stat_wal_receiver") == "streaming"

    try:
        run_natively(scenario())
    finally:
        standby.remove()


def test_refusals_are_told_in_one_sentence(safekeepers: SafekeeperCluster) -> None:
    async def elect(token: str | None = None) -> None:
        proposer = new_proposer(safekeepers, token)
        try:
            await proposer.elect()
        finally:
            proposer.close()

    with pytest.raises(RefusedError, match="does not keep timeline"):
        run_natively(elect())
    with pytest.raises(RefusedError, match="token"):
        run_natively(elect("not a token"))
