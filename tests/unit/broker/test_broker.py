"""The real NATS server under our process's shell, and the client: delivery, authentication, restarts."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from excimer.base.address import parse_address
from excimer.base.clock import Monotonic, UnixTime
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.broker.nats_config import parse_log_line
from excimer.broker.settings import BrokerSettings
from excimer.broker.shell import NatsServer, serve_broker
from excimer.service.broker_client import FRESH_S, BrokerClient, LatestStatuses
from excimer.service.http_client import HttpClient
from excimer.service.instance_lock import AlreadyRunningError
from excimer.service.listen import ListenError, bind_listen
from excimer.service.settings import save_settings
from excimer.service.tasks import SystemClock, running
from excimer.wire.broker import (
    BrokerMessageError,
    PageserverTimelineStatus,
    SafekeeperTimelineStatus,
    alive_subject,
    decode_status,
    encode_status,
    parse_alive_subject,
    subject_of,
)
from tests.kit.ports import free_port
from tests.kit.tls import new_tls, using_tls

TENANT, TIMELINE = TenantId("a" * 32), TimelineId("b" * 32)
LIMIT_S = 30.0
"""Of what happens at once where nothing else is going on."""
SAFEKEEPER = SafekeeperTimelineStatus(
    safekeeper_id=NodeId(1),
    tenant_id=TENANT,
    timeline_id=TIMELINE,
    term=3,
    flush_lsn=Lsn(2**63 + 1),
    commit_lsn=Lsn(2**63),
    replication_address="127.0.0.1:1",
    http_address="127.0.0.1:2",
)
PAGESERVER = PageserverTimelineStatus(
    pageserver_id=NodeId(7),
    tenant_id=TENANT,
    timeline_id=TIMELINE,
    last_record_lsn=Lsn(30),
    disk_consistent_lsn=Lsn(20),
    remote_consistent_lsn=Lsn(10),
)


def new_settings(tmp_path: Path) -> BrokerSettings:
    return BrokerSettings(
        data_dir=tmp_path,
        listen=f"127.0.0.1:{free_port()}",
        http_listen=f"127.0.0.1:{free_port()}",
        user="excimer",
        password='quo"te$\\',
    )


def url(settings: BrokerSettings, password: str = "quo%22te$%5C") -> str:
    return f"nats://excimer:{password}@{settings.listen}"


@asynccontextmanager
async def broker(settings: BrokerSettings) -> AsyncIterator[HttpClient]:
    async with running("broker", serve_broker(settings)):
        client = HttpClient("broker", settings.http_listen)
        await wait_well(client)
        yield client


async def wait_well(client: HttpClient) -> None:
    async with asyncio.timeout(10):
        while True:
            status = 0
            try:
                status, _ = await client._exchange("GET", "/healthz", None)
            except OSError:
                await asyncio.sleep(0.02)
            if status == 200:
                return
            await asyncio.sleep(0.02)


def test_statuses_arrive_and_connections_survive_a_restart(tmp_path: Path) -> None:
    settings = new_settings(tmp_path)

    async def heard(sender: BrokerClient, receiver: BrokerClient) -> None:
        async with asyncio.timeout(10):
            while not receiver.safekeepers.of_timeline(TENANT, TIMELINE, fresh_s=0.5):
                await sender.publish(SAFEKEEPER)
                await receiver.safekeepers.wait_for_news(TENANT, TIMELINE, 0.1)

    async def main() -> None:
        clock = SystemClock()
        async with (
            BrokerClient(url(settings), "sender", clock) as sender,
            BrokerClient(url(settings), "receiver", clock) as receiver,
        ):
            await sender.publish(SAFEKEEPER)
            await receiver.listen_safekeepers(TENANT, TIMELINE)
            await receiver.listen_pageservers()
            async with broker(settings) as http:
                assert await sender.wait_until_connected(LIMIT_S)
                assert await receiver.wait_until_connected(LIMIT_S)
                await heard(sender, receiver)
                await sender.publish(PAGESERVER)
                assert await receiver.pageservers.wait_for_news(TENANT, TIMELINE, LIMIT_S)
                assert receiver.safekeepers.of_timeline(TENANT, TIMELINE) == [SAFEKEEPER]
                assert receiver.pageservers.of_timeline(TENANT, TIMELINE) == [PAGESERVER]
                assert receiver.safekeepers.of_timeline(TENANT, TimelineId("c" * 32)) == []
                os.kill(int((tmp_path / "nats.pid").read_text()), signal.SIGKILL)
                await asyncio.sleep(0.6)
                await wait_well(http)
                await heard(sender, receiver)
                _, metrics = await http._exchange("GET", "/metrics", None)
                assert b"excimer_broker_restarts_total 1" in metrics

    asyncio.run(main())


def shown(settings: BrokerSettings) -> bytes:
    """The certificate of the NATS server; it says hello in clear, and then wants TLS."""
    assert settings.tls is not None
    context = ssl.create_default_context(cafile=settings.tls.ca)
    address = parse_address(settings.listen)
    with socket.create_connection(address, timeout=LIMIT_S) as opened:
        opened.recv(4096)
        with context.wrap_socket(opened, server_hostname=address.host) as secure:
            return secure.getpeercert(binary_form=True) or b""


async def wait_shown(settings: BrokerSettings) -> None:
    """Until the NATS server shows the certificate that is in the file now."""
    assert settings.tls is not None
    expected = ssl.PEM_cert_to_DER_cert(settings.tls.certificate.read_text())
    found = b""
    try:
        async with asyncio.timeout(LIMIT_S):
            while found != expected:
                with contextlib.suppress(ssl.SSLCertVerificationError):  # of the CA before
                    found = await asyncio.to_thread(shown, settings)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"the NATS server does not show the new {settings.tls.certificate}")


def test_renewed_certificates_are_taken_up_while_clients_are_connected(tmp_path: Path) -> None:
    """By the server; then of another CA, with which clients come again that lose their connection."""
    tls = new_tls(tmp_path / "tls")
    settings = msgspec.structs.replace(new_settings(tmp_path / "data"), tls=tls)

    async def heard_by(client: BrokerClient, sender: BrokerClient) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not client.pageservers.of_timeline(TENANT, TIMELINE, fresh_s=0.5):
                await sender.publish(PAGESERVER)
                await client.pageservers.wait_for_news(TENANT, TIMELINE, 0.1)

    async def main() -> None:
        clock, place = SystemClock(), url(settings).replace("nats:", "tls:")
        connections = asyncio.Queue[None]()
        async with (
            broker(settings) as http,
            BrokerClient(place, "first", clock) as first,
        ):
            await first.answer_asking(lambda: connections.put_nowait(None))
            await first.listen_pageservers()
            async with asyncio.timeout(LIMIT_S):
                await connections.get()
            await wait_shown(settings)
            tls.certificate.unlink()
            new_tls(tmp_path / "tls")
            await wait_shown(settings)
            async with BrokerClient(place, "second", clock) as second:
                await second.listen_pageservers()
                assert await second.wait_until_connected(LIMIT_S)
                await heard_by(second, sender=first)
                await heard_by(first, sender=second)
            assert connections.empty(), "the first has kept its connection"
            tls.ca.unlink()
            new_tls(tmp_path / "tls")
            await wait_shown(settings)
            os.kill(int((settings.data_dir / "nats.pid").read_text()), signal.SIGKILL)
            async with asyncio.timeout(LIMIT_S):
                await connections.get()
            await wait_well(http)

    with using_tls(tls):
        asyncio.run(main())


def test_who_comes_late_asks_and_who_lost_the_connection_tells_again(tmp_path: Path) -> None:
    settings = new_settings(tmp_path)

    async def main() -> None:
        clock = SystemClock()
        asked = asyncio.Queue[None]()
        async with (
            asyncio.timeout(20),
            broker(settings) as http,
            BrokerClient(url(settings), "safekeeper", clock) as safekeeper,
        ):
            await safekeeper.answer_asking(lambda: asked.put_nowait(None))
            await asked.get()  # its own first connection
            async with BrokerClient(url(settings), "late", clock) as late:
                await late.listen_safekeepers()
                await asked.get()
                await safekeeper.publish(SAFEKEEPER)
                assert await late.safekeepers.wait_for_news(TENANT, TIMELINE, None)
                os.kill(int((tmp_path / "nats.pid").read_text()), signal.SIGKILL)
                await asked.get()
                await wait_well(http)

    asyncio.run(main())


class HandClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.time_s)

    def now(self) -> UnixTime:
        return UnixTime(self.time_s)


def test_a_status_holds_as_long_as_its_node_lives() -> None:
    async def main() -> None:
        clock = HandClock()
        statuses = LatestStatuses[SafekeeperTimelineStatus](clock)
        statuses.put(NodeId(1), SAFEKEEPER)
        for _ in range(10):
            clock.time_s += FRESH_S - 1
            statuses.alive(NodeId(1))
        assert statuses.of_timeline(TENANT, TIMELINE) == [SAFEKEEPER]
        clock.time_s += FRESH_S + 1
        assert statuses.of_timeline(TENANT, TIMELINE) == []
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            waiting = group.create_task(statuses.wait_for_news(TENANT, TIMELINE, None))
            await asyncio.sleep(0)
            statuses.alive(NodeId(2))
            await asyncio.sleep(0)
            assert not waiting.done(), "another node's life is no news of this timeline"
            statuses.alive(NodeId(1))
        assert waiting.result()
        assert statuses.of_timeline(TENANT, TIMELINE) == [SAFEKEEPER]

    asyncio.run(main())


def test_signs_of_life_name_a_safekeeper() -> None:
    assert parse_alive_subject(alive_subject(NodeId(12))) == 12
    for subject in ("excimer.alive.safekeeper.x", "excimer.alive.safekeeper.", "excimer.alive.3", ""):
        with pytest.raises(BrokerMessageError):
            parse_alive_subject(subject)


def test_a_wrong_password_gets_nothing(tmp_path: Path) -> None:
    settings = new_settings(tmp_path)

    async def main() -> None:
        async with (
            broker(settings),
            BrokerClient(url(settings, "wrong"), "intruder", SystemClock()) as client,
        ):
            assert not await client.wait_until_connected(0.5)

    asyncio.run(main())
    assert (tmp_path / "nats.conf").stat().st_mode & 0o777 == 0o600


def test_port_taken_and_second_instance(tmp_path: Path) -> None:
    settings = new_settings(tmp_path)
    taken = bind_listen(settings.listen, "test")
    with pytest.raises(ListenError, match="broker listen: port"):
        asyncio.run(serve_broker(settings))
    taken.close()

    async def main() -> None:
        async with broker(settings):
            with pytest.raises(AlreadyRunningError):
                await serve_broker(settings)

    asyncio.run(main())


def test_the_server_of_a_killed_broker_is_ended(tmp_path: Path) -> None:
    settings = new_settings(tmp_path)

    async def main() -> None:
        async with running("broker", serve_broker(settings)):
            await wait_well(HttpClient("broker", settings.http_listen))
            pid = int((tmp_path / "nats.pid").read_text())
            NatsServer(settings).stop_orphan()
            assert not os.path.exists(f"/proc/{pid}/exe")  # noqa: ASYNC240

    asyncio.run(main())


def test_the_server_does_not_outlive_a_killed_broker(tmp_path: Path) -> None:
    settings = new_settings(tmp_path / "data")
    save_settings(tmp_path / "broker.toml", settings)
    command = [sys.executable, "-m", "excimer.broker", str(tmp_path / "broker.toml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        asyncio.run(wait_well(HttpClient("broker", settings.http_listen)))
        server = Path("/proc") / (tmp_path / "data" / "nats.pid").read_text().strip() / "exe"
        assert server.exists()
        process.kill()
    deadline = time.monotonic() + LIMIT_S
    while server.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("status", [SAFEKEEPER, PAGESERVER])
def test_messages_round_trip(status: SafekeeperTimelineStatus | PageserverTimelineStatus) -> None:
    assert decode_status(subject_of(status), encode_status(status)) == status


def test_bad_messages_are_refused() -> None:
    good = encode_status(SAFEKEEPER)
    other = msgspec.structs.replace(SAFEKEEPER, timeline_id=TimelineId("c" * 32))
    for subject, payload in (
        ("other.subject", good),
        (subject_of(SAFEKEEPER), b"\xff\x00"),
        (subject_of(SAFEKEEPER), b"{}"),
        (subject_of(SAFEKEEPER), encode_status(other)),
        (subject_of(PAGESERVER), good),
    ):
        with pytest.raises(BrokerMessageError):
            decode_status(subject, payload)


def test_nats_log_lines() -> None:
    line = "[12] 2026/01/31 12:00:00.000000 [ERR] Error trying to connect"
    assert parse_log_line(line) == ("error", "Error trying to connect")
    assert parse_log_line("nats-server: config error") == ("warning", "nats-server: config error")
