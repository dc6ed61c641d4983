"""WAL from a real safekeeper: the same bytes over kills and expired tokens, or a word that they are gone."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn, parse_lsn
from excimer.export.ownership import export_owner
from excimer.export.wal_directory import WalDirectory
from excimer.export.wal_receiving import NoSafekeeperError, WalGoneError, WalReceiving
from excimer.service.replication_client import connect_replication
from excimer.wire.auth import Right
from excimer.wire.replication import format_options
from excimer.wire.safekeeping import AcceptorGreeting, CommitAnnounce
from excimer.wire.wal_access import WalAccess, WalMember
from tests.kit.builds import NEWEST_VERSION
from tests.kit.raw_proposer import RawProposer
from tests.kit.safekeepers import TENANT, TIMELINE, SafekeeperCluster, running_safekeepers
from tests.kit.tokens import make_token
from tests.kit.wal_builder import SYSTEM_ID, WalBuilder

pytestmark = pytest.mark.timeout(120)
SEGMENT = 1 << 20
START = Lsn(3 * SEGMENT + 0x2000 + 24)
FIRST_NAME = "000000010000000000000003"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SafekeeperCluster]:
    with running_safekeepers(tmp_path, 1) as cluster:
        cluster.members[0].create_timeline(START, NEWEST_VERSION, SYSTEM_ID, SEGMENT)
        yield cluster


def build_wal(size_bytes: int) -> WalBuilder:
    """Of at least this size, ending with a whole record."""
    builder = WalBuilder(START, NEWEST_VERSION, SEGMENT)
    number = 0
    while len(builder.stream) < size_bytes:
        number += 1
        builder.add(10, 0x10, bytes([number % 251]) * (1 + number * 7 % 3000))
    return builder


def leading(cluster: SafekeeperCluster, number: int = 1) -> tuple[RawProposer, Lsn]:
    proposer = RawProposer(cluster.addresses[0], number)
    assert isinstance(proposer.greet(TENANT, TIMELINE, cluster.token), AcceptorGreeting)
    return proposer, proposer.win()


class Receiver:
    """Asks for tokens that live `life_s`, and remembers how often."""

    def __init__(self, cluster: SafekeeperCluster, path: Path, life_s: int = 3600) -> None:
        self.cluster = cluster
        self.path = path
        self.life_s = life_s
        self.asked = 0
        self.told: list[str] = []

    async def ask(self) -> WalAccess:
        self.asked += 1
        address = self.cluster.members[0].replication_address
        token = make_token(
            self.cluster.keys,
            Right.READ_WAL,
            tenant_id=TENANT,
            timeline_id=TIMELINE,
            holder="cli",
            life_s=self.life_s,
        )
        members = (WalMember(safekeeper_id=self.cluster.members[0].node_id, address=str(address)),)
        return WalAccess(members=members, token=token, valid_for_s=self.life_s)

    def open(self, segment_size: int) -> WalDirectory:
        return WalDirectory(self.path, TENANT, TIMELINE, segment_size, export_owner())

    def receiving(self) -> WalReceiving:
        return WalReceiving(TENANT, TIMELINE, self.ask, self.open, self.told.append)

    def received(self) -> bytes:
        names = sorted(path.name for path in self.path.iterdir() if path.name.startswith("0"))
        return b"".join((self.path / name).read_bytes() for name in names)


async def until(condition: Callable[[], bool], receiver: Receiver) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, receiver.told
        await asyncio.sleep(0.05)


def test_the_same_bytes_come_over_a_kill_and_expired_tokens(
    cluster: SafekeeperCluster, tmp_path: Path
) -> None:
    wal = build_wal(5 * SEGMENT)
    half_lsn, end_lsn = wal.ends[len(wal.ends) // 2], wal.ends[-1]
    expected = bytes(START % SEGMENT) + bytes(wal.stream)
    receiver = Receiver(cluster, tmp_path / "wal", life_s=2)

    def has(lsn: Lsn) -> bool:
        size = lsn - START + START % SEGMENT
        return receiver.path.exists() and receiver.received()[:size] == expected[:size]

    async def scenario() -> None:
        proposer, start_lsn = leading(cluster)
        with proposer:
            proposer.append_all(start_lsn, bytes(wal.stream))
            proposer.commit(wal.ends[0])
            task = asyncio.create_task(receiver.receiving().run(once=False))
            await until(lambda: has(wal.ends[0]), receiver)
            proposer.commit(half_lsn)
            await until(lambda: has(half_lsn), receiver)
            await until(lambda: receiver.asked >= 3, receiver)
        member = cluster.members[0]
        await asyncio.to_thread(member.kill)
        await until(lambda: any("trying again" in told for told in receiver.told), receiver)
        await asyncio.to_thread(member.start)
        proposer, _ = leading(cluster, 2)
        with proposer:
            proposer.commit(end_lsn)
            await until(lambda: has(end_lsn), receiver)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert not any(receiver.received()[len(expected) :])
    assert (receiver.path / FIRST_NAME).stat().st_size == SEGMENT
    assert asyncio.run(receiver.receiving().run(once=True)) >= half_lsn
    assert has(end_lsn)


def test_wal_that_is_gone_everywhere_ends_it_with_what_to_do(
    cluster: SafekeeperCluster, tmp_path: Path
) -> None:
    wal = build_wal(3 * SEGMENT)
    member = cluster.members[0]
    receiver = Receiver(cluster, tmp_path / "wal")
    with receiver.open(SEGMENT) as directory:
        directory.begin(START)
    proposer, start_lsn = leading(cluster)
    with proposer:
        proposer.append_all(start_lsn, bytes(wal.stream))
        proposer.send(CommitAnnounce(proposer.term, wal.ends[-1], wal.ends[-1]))
        asyncio.run(confirm_durable(cluster, wal.ends[-1]))
        deadline = time.monotonic() + 20
        while parse_lsn(member.timeline()["wal_start_lsn"]) <= START:
            assert time.monotonic() < deadline, member.timeline()
            time.sleep(0.05)
        with pytest.raises(WalGoneError, match=r"on is gone .* new directory"):
            asyncio.run(receiver.receiving().run(once=False))
        fresh = Receiver(cluster, tmp_path / "fresh")
        assert asyncio.run(fresh.receiving().run(once=True)) == wal.ends[-1]


def test_once_does_not_wait_for_ever(cluster: SafekeeperCluster, tmp_path: Path) -> None:
    cluster.members[0].kill()
    receiver = Receiver(cluster, tmp_path / "wal")
    with pytest.raises(NoSafekeeperError, match="no safekeeper of the branch answers"):
        asyncio.run(receiver.receiving().run(once=True))
    assert not receiver.path.exists()


async def confirm_durable(cluster: SafekeeperCluster, lsn: Lsn) -> None:
    token = make_token(
        cluster.keys, Right.READ_WAL, tenant_id=TENANT, timeline_id=TIMELINE, holder="pageserver:1"
    )
    client = await connect_replication(
        cluster.members[0].replication_address,
        user="pageserver",
        application_name="test",
        password=token,
        options=format_options(TENANT, TIMELINE),
    )
    try:
        await client.confirm_durable(lsn)
    finally:
        client.close()
