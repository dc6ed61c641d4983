"""One real safekeeper process: readers, restarts, kills, bad input on every port, a full disk."""

import asyncio
import math
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.address import Address
from excimer.base.errors import ExcimerError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.service.replication_client import (
    ReplicationClient,
    ReplicationLostError,
    connect_replication,
    stream_wal,
)
from excimer.wire.auth import Right, generate_key_pair
from excimer.wire.pg_client import PostgresError
from excimer.wire.replication import format_options
from excimer.wire.safekeeping import (
    AcceptorGreeting,
    AppendResponse,
    CommitAnnounce,
    ErrorCode,
    ErrorResponse,
    TokenRenewal,
)
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.raw_proposer import RawProposer
from tests.kit.safekeepers import (
    TENANT,
    TIMELINE,
    SafekeeperCluster,
    SafekeeperProcess,
    running_safekeepers,
)
from tests.kit.tokens import make_token
from tests.kit.wal_builder import SYSTEM_ID, WalBuilder

pytestmark = pytest.mark.timeout(120)
SEGMENT_SIZE_BYTES = 1 << 20
START = Lsn(3 * SEGMENT_SIZE_BYTES + 0x2000 + 24)
OTHER_TENANT = TenantId("cc" * 16)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SafekeeperCluster]:
    with running_safekeepers(tmp_path, 1) as cluster:
        cluster.members[0].create_timeline(START, NEWEST_VERSION, SYSTEM_ID, SEGMENT_SIZE_BYTES)
        yield cluster


@pytest.fixture
def member(cluster: SafekeeperCluster) -> SafekeeperProcess:
    return cluster.members[0]


def build_wal(size_bytes: int) -> WalBuilder:
    """Some WAL of 18, of at least this size, that ends with a whole record."""
    builder = WalBuilder(START, NEWEST_VERSION, SEGMENT_SIZE_BYTES)
    number = 0
    while len(builder.stream) < size_bytes:
        number += 1
        builder.add(10, 0x10, bytes([number % 251]) * (1 + number * 7 % 3000))
    return builder


def leading(cluster: SafekeeperCluster, number: int = 1) -> tuple[RawProposer, Lsn]:
    """A proposer that has won; the caller closes it."""
    proposer = RawProposer(cluster.addresses[0], number)
    assert isinstance(proposer.greet(TENANT, TIMELINE, cluster.token), AcceptorGreeting)
    return proposer, proposer.win()


async def connect_reader(
    member: SafekeeperProcess, token: str, tenant_id: str = TENANT, timeline_id: str = TIMELINE
) -> ReplicationClient:
    return await connect_replication(
        member.replication_address,
        user="reader",
        application_name="test",
        password=token,
        options=format_options(tenant_id, timeline_id),
    )


async def read_wal(member: SafekeeperProcess, token: str, start_lsn: Lsn, size_bytes: int) -> bytes:
    client = await connect_reader(member, token)
    try:
        stream = await stream_wal(client, start_lsn)
        received = bytearray()
        while len(received) < size_bytes:
            received += (await asyncio.wait_for(stream.next_chunk(), 10)).data
        return bytes(received)
    finally:
        client.close()


def receivewal(member: SafekeeperProcess, token: str, directory: Path, end_lsn: Lsn, *options: str) -> str:
    """Runs pg_receivewal to `end_lsn` (it stops behind --endpos); its standard error if it failed."""
    build = build_of(NEWEST_VERSION)
    address = member.replication_address
    url = f"host={address.host} port={address.port} user=reader options='{format_options(TENANT, TIMELINE)}'"
    finished = subprocess.run(
        [
            str(build.program("pg_receivewal")),
            *("-D", str(directory), "-d", url, "--endpos", format_lsn(end_lsn - 1), "--no-loop", *options),
        ],
        env=build.whole_environment({"PGPASSWORD": token}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return finished.stderr if finished.returncode else ""


def test_readers_get_the_committed_wal_and_zeros_before_it(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    builder = build_wal(5 * SEGMENT_SIZE_BYTES)
    wal = bytes(builder.stream)
    end_lsn, commit_lsn = Lsn(builder.lsn), builder.ends[-20]
    proposer, start_lsn = leading(cluster)
    with proposer:
        assert proposer.append_all(start_lsn, wal) == end_lsn
        proposer.commit(commit_lsn)
        expected = bytes(START % SEGMENT_SIZE_BYTES) + wal
        segment_lsn = Lsn(START - START % SEGMENT_SIZE_BYTES)
        got = asyncio.run(read_wal(member, cluster.token, segment_lsn, commit_lsn - segment_lsn))
        assert got == expected[: commit_lsn - segment_lsn]  # and not one byte above the commit LSN
        with reachable_directory() as directory:
            assert receivewal(member, cluster.token, directory, commit_lsn) == ""
            files = sorted(directory.iterdir())
            received = b"".join(path.read_bytes() for path in files)
            first = commit_lsn - commit_lsn % SEGMENT_SIZE_BYTES  # it begins with the newest segment
            assert received[: commit_lsn - first] == expected[first - segment_lsn : commit_lsn - segment_lsn]
            assert not any(received[commit_lsn - first :])
        # A reader that waits gets the rest as soon as it is committed.
        asyncio.run(_wait_for_the_rest(cluster, member, proposer, commit_lsn, wal[commit_lsn - START :]))


async def _wait_for_the_rest(
    cluster: SafekeeperCluster, member: SafekeeperProcess, proposer: RawProposer, commit_lsn: Lsn, rest: bytes
) -> None:
    client = await connect_reader(member, cluster.token)
    try:
        stream = await stream_wal(client, commit_lsn)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.next_chunk(), 0.3)
        started = time.monotonic()
        proposer.commit(Lsn(commit_lsn + len(rest)))
        received = b""
        while len(received) < len(rest):
            received += (await asyncio.wait_for(stream.next_chunk(), 30)).data
        assert received == rest
        assert time.monotonic() - started < 0.5
    finally:
        client.close()


def test_wrong_tokens_and_names_are_refused_with_their_sqlstate(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    both = Right.READ_WAL, Right.WRITE_WAL
    foreign = make_token(cluster.keys, *both, tenant_id=OTHER_TENANT, timeline_id=TIMELINE)
    forged = make_token(generate_key_pair(), *both, tenant_id=TENANT, timeline_id=TIMELINE)
    expired = make_token(cluster.keys, *both, tenant_id=TENANT, timeline_id=TIMELINE, exp=1)
    elsewhere = TimelineId("d" * 32)
    elsewhere_token = cluster.token_of(elsewhere, *both)

    async def sqlstate(token: str, tenant_id: str, timeline_id: str) -> str:
        try:
            (await connect_reader(member, token, tenant_id, timeline_id)).close()
        except PostgresError as error:
            return error.sqlstate
        return "connected"

    async def scenario() -> None:
        for token in (foreign, forged, expired, elsewhere_token, "", "x" * 5000):
            assert await sqlstate(token, TENANT, TIMELINE) == "28P01"
        assert await sqlstate(elsewhere_token, TENANT, elsewhere) == "3D000"
        assert await sqlstate(cluster.token, "nonsense", TIMELINE) == "0A000"
        assert await sqlstate(cluster.token, TENANT, TIMELINE) == "connected"

    asyncio.run(scenario())
    with RawProposer(member.proposer_address) as proposer:
        answer = proposer.greet(TENANT, TIMELINE, foreign)
        assert isinstance(answer, ErrorResponse)
        assert (answer.code, proposer.receive()) == (ErrorCode.REFUSED, None)
    with RawProposer(member.proposer_address) as proposer:
        answer = proposer.greet(TENANT, elsewhere, elsewhere_token)
        assert isinstance(answer, ErrorResponse)
        assert (answer.code, "does not keep timeline" in answer.text) == (ErrorCode.NO_TIMELINE, True)
    for right in (Right.READ_WAL, Right.READ_PAGES, Right.MANAGE):
        with RawProposer(member.proposer_address) as proposer:
            answer = proposer.greet(TENANT, TIMELINE, cluster.token_of(TIMELINE, right))
            assert isinstance(answer, ErrorResponse)
            assert (answer.code, "does not have the right write_wal" in answer.text) == (
                ErrorCode.REFUSED,
                True,
            )
    path = f"/v1/tenant/{TENANT}/timeline/{TIMELINE}"
    assert member.request("GET", path).status_code == 401
    assert member.request("GET", path, headers={"Authorization": f"Bearer {forged}"}).status_code == 401
    assert member.request("GET", path, headers={"Authorization": f"Bearer {foreign}"}).status_code == 403
    unknown = member.request("GET", path[:-1] + "0", headers=member.admin_headers)
    assert (unknown.status_code, unknown.json()["error"]) == (404, "not_found")


def test_wal_that_is_not_here_is_refused(cluster: SafekeeperCluster, member: SafekeeperProcess) -> None:
    async def failure(start_lsn: Lsn) -> ExcimerError:
        client = await connect_reader(member, cluster.token)
        try:
            await stream_wal(client, start_lsn)
        except (PostgresError, ReplicationLostError) as error:
            return error
        finally:
            client.close()
        raise AssertionError("it was served")

    before = asyncio.run(failure(Lsn(START - SEGMENT_SIZE_BYTES)))
    assert isinstance(before, PostgresError)
    assert before.sqlstate == "58P01"
    assert isinstance(asyncio.run(failure(Lsn(START + 8))), ReplicationLostError)
    with reachable_directory() as directory:
        told = receivewal(member, cluster.token, directory, START, "--slot", "some")
        assert 'replication slot "some" does not exist' in told


def test_only_a_pageservers_word_that_wal_is_durable_removes_it(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    wal = build_wal(3 * SEGMENT_SIZE_BYTES)
    end_lsn = wal.ends[-1]
    proposer, start_lsn = leading(cluster)
    with proposer:
        proposer.append_all(start_lsn, bytes(wal.stream))
        proposer.send(CommitAnnounce(proposer.term, end_lsn, end_lsn))

        async def confirm(holder: str, lsn: Lsn) -> None:
            token = make_token(
                cluster.keys, Right.READ_WAL, tenant_id=TENANT, timeline_id=TIMELINE, holder=holder
            )
            client = await connect_reader(member, token)
            try:
                await client.confirm_durable(lsn)
            finally:
                client.close()

        for holder in ("endpoint:main", "controller", "xpageserver:1"):
            with pytest.raises(PostgresError, match="only a pageserver"):
                asyncio.run(confirm(holder, end_lsn))
        assert member.timeline()["wal_kept_for"] == "object_storage"
        asyncio.run(confirm("pageserver:1", end_lsn))
        deadline = time.monotonic() + 10
        while member.timeline()["wal_start_lsn"] == format_lsn(START - START % SEGMENT_SIZE_BYTES):
            assert time.monotonic() < deadline, member.timeline()
            time.sleep(0.05)
        assert member.timeline()["wal_size_bytes"] <= 2 * SEGMENT_SIZE_BYTES

        with pytest.raises(PostgresError, match="it was removed below") as caught:
            asyncio.run(read_wal(member, cluster.token, START, 8))
        assert caught.value.sqlstate == "58P01"
        first_lsn = parse_lsn(member.timeline()["wal_start_lsn"])
        rest = asyncio.run(read_wal(member, cluster.token, first_lsn, end_lsn - first_lsn))
        assert rest == bytes(wal.stream)[first_lsn - START : end_lsn - START]


def test_a_pageserver_that_left_where_it_was_behind_keeps_no_wal_by_its_position(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    """What it needs is what is not durable, and it says so; an ordinary reader has only its place."""
    wal = build_wal(3 * SEGMENT_SIZE_BYTES)
    end_lsn = wal.ends[-1]
    pageserver = make_token(
        cluster.keys, Right.READ_WAL, tenant_id=TENANT, timeline_id=TIMELINE, holder="pageserver:1"
    )

    async def confirm() -> None:
        client = await connect_reader(member, pageserver)
        try:
            await client.confirm_durable(end_lsn)
        finally:
            client.close()

    def first_lsn() -> Lsn:
        return parse_lsn(member.timeline()["wal_start_lsn"])

    proposer, start_lsn = leading(cluster)
    with proposer:
        proposer.append_all(start_lsn, bytes(wal.stream))
        proposer.send(CommitAnnounce(proposer.term, end_lsn, end_lsn))
        assert asyncio.run(read_wal(member, pageserver, START, 1000))
        asyncio.run(confirm())
        deadline = time.monotonic() + 10
        while first_lsn() <= START:
            assert time.monotonic() < deadline, member.timeline()
            time.sleep(0.05)
    assert member.timeline()["wal_kept_for"] == "object_storage"


def test_garbage_on_every_port_leaves_the_process_alive(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    chunks = [
        b"",
        b"\x00",
        b"GET / HTTP/1.0\r\n\r\n",
        os.urandom(5000),
        struct.pack("<IB", 0xFFFFFFFF, ord("G")) + os.urandom(100),
        struct.pack("<IB", 20, ord("A")) + os.urandom(19),
        struct.pack(">II", 0x7FFFFFFF, 3 << 16),
        struct.pack(">II", 8, 80877103) + os.urandom(50),
        b"\x00\x00\x00\x13\x00\x03\x00\x00user\x00x\x00\x00" + b"Q\x00\x00\x00\x08abc\x00",
    ]
    for address in (member.proposer_address, member.replication_address, member.http_address):
        for chunk in chunks:
            _say(address, chunk)
    assert member.process is not None
    assert member.process.poll() is None
    proposer, start_lsn = leading(cluster)
    with proposer:
        wal = bytes(build_wal(1000).stream)
        proposer.append_all(start_lsn, wal)
        # Bytes that are no WAL are never stored, let alone acknowledged.
        answer = proposer.append(Lsn(start_lsn + len(wal)), b"no WAL at all" * 1000)
        assert isinstance(answer, ErrorResponse)
        assert answer.code == ErrorCode.CORRUPTION
    assert member.flush_lsn() == start_lsn + len(wal)


def _say(address: Address, data: bytes) -> None:
    with socket.create_connection(address, timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except OSError:
            return  # reset: as good an answer as any


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_keeps_everything(
    cluster: SafekeeperCluster, member: SafekeeperProcess, crash: bool
) -> None:
    builder = build_wal(3 * SEGMENT_SIZE_BYTES)
    wal, commit_lsn = bytes(builder.stream), builder.ends[-5]
    proposer, start_lsn = leading(cluster)
    with proposer:
        # The last record is cut in two: it is acknowledged as bytes, but no record ends there.
        proposer.append_all(start_lsn, wal[:-16])
        proposer.commit(commit_lsn)
        while member.commit_lsn() < commit_lsn:
            time.sleep(0.02)
        if crash:
            time.sleep(1.5)  # commit LSNs are at most a second old on disk
            member.kill()
        else:
            started = time.monotonic()
            assert member.stop() == 0
            assert time.monotonic() - started < 5
    member.start()
    assert member.timeline()["term"] == 1
    assert member.commit_lsn() == commit_lsn
    assert member.flush_lsn() == builder.ends[-2]
    assert (
        asyncio.run(read_wal(member, cluster.token, START, commit_lsn - START)) == wal[: commit_lsn - START]
    )
    proposer, start_lsn = leading(cluster, 2)
    with proposer:
        assert start_lsn == builder.ends[-2]
        assert proposer.term == 2
        proposer.append_all(start_lsn, wal[start_lsn - START :])
    assert member.flush_lsn() == builder.lsn


def test_a_second_instance_and_a_taken_port_are_refused(member: SafekeeperProcess, tmp_path: Path) -> None:
    second = member.spawn()
    assert second.wait(timeout=20) == 1
    assert "is in use by process" in member.log.read_text()
    other_settings = member.settings_path.with_name("other.toml")
    text = member.settings_path.read_text().replace(str(member.data_dir), str(tmp_path / "other"))
    other_settings.write_text(text)
    member.settings_path = other_settings
    third = member.spawn()
    assert third.wait(timeout=20) == 1
    assert "is taken by another program" in member.log.read_text()


def test_timelines_are_created_once_and_deleted(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    member.create_timeline(START, NEWEST_VERSION, SYSTEM_ID, SEGMENT_SIZE_BYTES)  # again: harmless
    path = f"/v1/tenant/{TENANT}/timeline/{TIMELINE}"
    body = {"start_lsn": format_lsn(START + 8), "pg_version": NEWEST_VERSION, "system_id": SYSTEM_ID}
    assert member.request("POST", path, json=body, headers=member.admin_headers).status_code == 409
    for wrong in ({"pg_version": 9}, {"start_lsn": "0/1"}, {"wal_segment_size": 1000}, {"start_lsn": "x"}):
        answer = member.request("POST", path, json=body | wrong, headers=member.admin_headers)
        assert answer.status_code == 400, answer.text
    listed = member.request("GET", f"/v1/tenant/{TENANT}/timeline", headers=member.admin_headers)
    assert [each["timeline_id"] for each in listed.json()] == [TIMELINE]
    proposer, _ = leading(cluster)
    with proposer:
        assert member.request("DELETE", path, headers=member.admin_headers).status_code == 200
        told = proposer.append(START, bytes(build_wal(100).stream))
        assert isinstance(told, ErrorResponse)
        assert told.code == ErrorCode.FENCED
    assert not member.timeline_dir.exists()
    assert member.request("GET", path, headers=member.admin_headers).status_code == 404


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here; tests/faults has the same with a faulty disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_stops_acknowledging_and_recovers(small_disk: Path) -> None:
    with running_safekeepers(small_disk, 1) as cluster:
        member = cluster.members[0]
        member.create_timeline(START, NEWEST_VERSION, SYSTEM_ID, SEGMENT_SIZE_BYTES)
        wal = bytes(build_wal(3 * SEGMENT_SIZE_BYTES).stream)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(4 << 20))
        with filler.open("ab") as file:
            file.write(bytes(1 << 20))
        acknowledged = START
        proposer, start_lsn = leading(cluster)
        with proposer:
            for offset in range(0, len(wal), 4096):
                answer = proposer.append(Lsn(start_lsn + offset), wal[offset : offset + 4096])
                if not isinstance(answer, AppendResponse):
                    break
                acknowledged = answer.flush_lsn
            assert isinstance(answer, ErrorResponse)
            assert answer.code == ErrorCode.RETRYABLE
            assert "no space" in answer.text
        assert START < acknowledged < START + len(wal)
        filler.unlink()
        proposer, start_lsn = leading(cluster, 2)
        with proposer:
            assert acknowledged - 8192 <= start_lsn <= acknowledged
            end_lsn = proposer.append_all(start_lsn, wal[start_lsn - START :])
            proposer.commit(end_lsn)
            got = asyncio.run(read_wal(member, cluster.token, START, len(wal)))
            assert got == wal


def test_a_connection_lives_as_long_as_its_token_which_a_proposer_may_renew(
    cluster: SafekeeperCluster, member: SafekeeperProcess
) -> None:
    expires = math.ceil(time.time()) + 2

    def token(right: Right, exp: int) -> str:
        return make_token(cluster.keys, right, tenant_id=TENANT, timeline_id=TIMELINE, exp=exp)

    async def read_until_the_end() -> ExcimerError:
        client = await connect_reader(member, token(Right.READ_WAL, expires))
        try:
            stream = await stream_wal(client, START)
            with pytest.raises(ExcimerError) as caught:
                await asyncio.wait_for(stream.next_chunk(), 10)
            return caught.value
        finally:
            client.close()

    wal = bytes(build_wal(100_000).stream)
    with RawProposer(member.proposer_address, 1) as idle, RawProposer(member.proposer_address, 2) as renewed:
        for proposer in (idle, renewed):
            greeted = proposer.greet(TENANT, TIMELINE, token(Right.WRITE_WAL, expires))
            assert isinstance(greeted, AcceptorGreeting)
        end_lsn = renewed.append_all(renewed.win(), wal[:8192])
        renewed.send(TokenRenewal(token(Right.WRITE_WAL, expires + 60)))
        end_lsn = renewed.append_all(end_lsn, wal[8192:50_000])
        assert "expired" in str(asyncio.run(read_until_the_end()))
        assert expires <= time.time() < expires + 3
        assert idle.receive() is None
        end_lsn = renewed.append_all(end_lsn, wal[50_000:])
        renewed.send(TokenRenewal(token(Right.READ_WAL, expires + 60)))
        answer = renewed.receive()
        assert isinstance(answer, ErrorResponse)
        assert (answer.code, renewed.receive()) == (ErrorCode.REFUSED, None)
    with RawProposer(member.proposer_address) as late:
        answer = late.greet(TENANT, TIMELINE, token(Right.WRITE_WAL, expires))
        assert isinstance(answer, ErrorResponse)
        assert (answer.code, "expired" in answer.text) == (ErrorCode.RETRYABLE, True)
