"""Access to WAL: asked for one timeline, kept over outages and restarts, never beyond its life."""

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.address import Address
from excimer.base.clock import Monotonic, UnixTime
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.pageserver.receiver_plan import Source
from excimer.pageserver.wal_access import ASK_INTERVAL_S, WalAccessBook, WalAccessError
from excimer.pageserver.wal_sources import TimelineSources
from excimer.service.broker_client import LatestStatuses
from excimer.service.health import Health
from excimer.wire.auth import Right, TokenVerifier, generate_key_pair
from excimer.wire.broker import SafekeeperTimelineStatus
from tests.kit.wal_access_server import LIFE_S, WalAccessServer

KEYS = generate_key_pair()
KEY = TenantId("ab" * 16), TimelineId("cd" * 16)
OTHER_KEY = TenantId("ab" * 16), TimelineId("ce" * 16)


class HandClock:
    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def now(self) -> UnixTime:
        return UnixTime(self.time)

    def monotonic(self) -> Monotonic:
        return Monotonic(self.time)


@pytest.fixture
def controller() -> Iterator[WalAccessServer]:
    server = WalAccessServer(KEYS, ["127.0.0.1:1", "127.0.0.1:2", "/run/three:3"])
    yield server
    server.close()


class Book(WalAccessBook):
    def __init__(self, controller: WalAccessServer, directory: Path, clock: HandClock) -> None:
        self.health = Health("pageserver")
        super().__init__(
            directory / "wal_access",
            controller_address=str(controller.address),
            token="pageserver",
            clock=clock,
            health=self.health,
        )


def test_it_is_asked_for_once_and_again_when_half_its_life_is_over(
    controller: WalAccessServer, tmp_path: Path
) -> None:
    clock = HandClock()
    book = Book(controller, tmp_path, clock)

    async def story() -> None:
        first = await book.get(KEY)
        claims = TokenVerifier(KEYS.public_pem).verify(first.access.token, 0)
        assert claims.rights == {Right.READ_WAL}
        assert (claims.tenant_id, claims.timeline_id) == KEY
        assert await book.get(KEY) is first
        await book.get(OTHER_KEY)
        assert controller.asked == [KEY, OTHER_KEY]
        clock.time += LIFE_S / 2 + 1
        assert await book.get(KEY) is not first
        assert controller.asked == [KEY, OTHER_KEY, KEY]

    asyncio.run(story())


def test_an_outage_is_outlived_as_long_as_the_token_lives_also_over_a_restart(
    controller: WalAccessServer, tmp_path: Path
) -> None:
    clock = HandClock()

    async def story() -> None:
        first = await Book(controller, tmp_path, clock).get(KEY)
        [path] = (tmp_path / "wal_access").rglob("*" + KEY[1])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        controller.is_away = True
        book = Book(controller, tmp_path, clock)  # of a pageserver that was started again
        clock.time += LIFE_S - 1
        assert await book.get(KEY) == first
        assert book.health.warnings == {}
        clock.time += 1
        for key in (KEY, OTHER_KEY):
            with pytest.raises(WalAccessError, match="away"):
                await book.get(key)
        assert "away" in str(book.problem(KEY))
        assert "2 timelines" in book.health.warnings["WAL access"]
        assert book.known(KEY) == first, "who the safekeepers are is not forgotten"
        controller.is_away = False
        for key in (KEY, OTHER_KEY):
            await book.get(key)
            assert book.problem(key) is None
        assert book.health.warnings == {}

    asyncio.run(story())


def test_a_safekeeper_that_moved_is_found_before_the_token_is_old(
    controller: WalAccessServer, tmp_path: Path
) -> None:
    clock = HandClock()
    book = Book(controller, tmp_path, clock)

    async def story() -> None:
        await book.get(KEY)
        controller.sources[0] = "127.0.0.1:9"
        for _ in range(3):
            book.doubt(KEY)
            await book.get(KEY)
        assert controller.asked == [KEY], "not more often than now and then"
        clock.time += ASK_INTERVAL_S
        assert (await book.get(KEY)).access.members[0].address == "127.0.0.1:9"
        assert controller.asked == [KEY, KEY]

    asyncio.run(story())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_a_damaged_file_is_asked_for_anew(
    controller: WalAccessServer, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "wal_access" / KEY[0] / KEY[1]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    asyncio.run(Book(controller, tmp_path, HandClock()).get(KEY))
    assert controller.asked == [KEY]


def test_a_timeline_that_is_gone_leaves_nothing(controller: WalAccessServer, tmp_path: Path) -> None:
    book = Book(controller, tmp_path, HandClock())
    asyncio.run(book.get(KEY))
    book.forget(KEY)
    assert book.known(KEY) is None
    assert not [path for path in (tmp_path / "wal_access").rglob("*") if path.is_file()]


def test_the_broker_only_hints(controller: WalAccessServer, tmp_path: Path) -> None:
    """An address on the broker is not looked at, nor a safekeeper that the controller does not name."""
    clock = HandClock()
    statuses = LatestStatuses[SafekeeperTimelineStatus](clock)
    sources = TimelineSources(KEY, Book(controller, tmp_path, clock), statuses, clock, "pageserver-1")
    assert sources.known() == []
    asyncio.run(sources.learn())

    def says(safekeeper: int, commit_lsn: int) -> None:
        status = SafekeeperTimelineStatus(
            safekeeper_id=NodeId(safekeeper),
            tenant_id=KEY[0],
            timeline_id=KEY[1],
            term=1,
            flush_lsn=Lsn(commit_lsn),
            commit_lsn=Lsn(commit_lsn),
            replication_address="evil.example:5432",
            http_address="evil.example:80",
        )
        statuses.put(NodeId(safekeeper), status)

    for safekeeper, commit_lsn in ((1, 100), (2, 1 << 62), (66, 1 << 62)):
        says(safekeeper, commit_lsn)
    assert sources.known() == [
        Source(Address("127.0.0.1", 1), Lsn(100), claimed_lsn=Lsn(100)),
        Source(Address("127.0.0.1", 2), Lsn(100), claimed_lsn=Lsn(1 << 62)),
        Source(Address("/run/three", 3), Lsn(0)),
    ]
