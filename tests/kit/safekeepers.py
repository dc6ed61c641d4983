"""Real safekeeper processes for tests, looked at from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from excimer.base.address import Address
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.safekeeper.settings import SafekeeperSettings
from excimer.wire.auth import KeyPair, Right, generate_key_pair
from tests.kit.ports import free_port
from tests.kit.service_process import ServiceProcess
from tests.kit.tokens import bearer, make_token

TENANT = TenantId("aa" * 16)
TIMELINE = TimelineId("bb" * 16)
NO_BROKER = "nats://excimer:none@127.0.0.1:9"


class SafekeeperProcess(ServiceProcess):
    def __init__(self, node_id: int, directory: Path, keys: KeyPair) -> None:
        super().__init__("safekeeper", directory, keys.public_pem)
        self.node_id = NodeId(node_id)
        self.proposer_address = Address("127.0.0.1", free_port())
        self.replication_address = Address("127.0.0.1", free_port())
        self._admin = bearer(make_token(keys, Right.MANAGE))
        self._settings = SafekeeperSettings(
            id=self.node_id,
            data_dir=self.data_dir,
            proposer_listen=str(self.proposer_address),
            replication_listen=str(self.replication_address),
            http_listen=str(self.http_address),
            broker_url=NO_BROKER,
            auth_public_key_path=self.public_key_path,
        )
        self.configure(self._settings)

    def move_proposer_port(self) -> None:
        """From its next start on, proposers that know the old address cannot reach it."""
        self.proposer_address = Address("127.0.0.1", free_port())
        self.configure(msgspec.structs.replace(self._settings, proposer_listen=str(self.proposer_address)))

    def create_timeline(
        self, start_lsn: Lsn, pg_version: int, system_id: int, wal_segment_size: int = 16 << 20
    ) -> None:
        body = {
            "start_lsn": format_lsn(start_lsn),
            "pg_version": pg_version,
            "system_id": system_id,
            "wal_segment_size": wal_segment_size,
        }
        answer = httpx.post(self._url(), json=body, headers=self._admin)
        assert answer.status_code == 201, answer.text

    def timeline(self) -> dict[str, Any]:
        answer = httpx.get(self._url(), headers=self._admin)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def flush_lsn(self) -> Lsn:
        return parse_lsn(self.timeline()["flush_lsn"])

    def commit_lsn(self) -> Lsn:
        return parse_lsn(self.timeline()["commit_lsn"])

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"http://{self.http_address}{path}", **arguments)

    @property
    def admin_headers(self) -> dict[str, str]:
        return self._admin

    @property
    def timeline_dir(self) -> Path:
        return self.data_dir / TENANT / TIMELINE

    def _url(self) -> str:
        return f"http://{self.http_address}/v1/tenant/{TENANT}/timeline/{TIMELINE}"


class SafekeeperCluster:
    """Several safekeepers with one key pair; all processes end with the context."""

    def __init__(self, directory: Path, count: int) -> None:
        self.keys = generate_key_pair()
        self.token = self.token_of(TIMELINE, Right.READ_WAL, Right.WRITE_WAL)
        self.members = [
            SafekeeperProcess(number, directory / f"safekeeper-{number}", self.keys)
            for number in range(1, count + 1)
        ]

    def token_of(self, timeline_id: TimelineId, *rights: Right) -> str:
        return make_token(self.keys, *rights, tenant_id=TENANT, timeline_id=timeline_id)

    @property
    def addresses(self) -> list[Address]:
        return [member.proposer_address for member in self.members]

    def create_timeline(self, start_lsn: Lsn, pg_version: int, system_id: int) -> None:
        for member in self.members:
            member.create_timeline(start_lsn, pg_version, system_id)


@contextmanager
def running_safekeepers(directory: Path, count: int = 3) -> Iterator[SafekeeperCluster]:
    cluster = SafekeeperCluster(directory, count)
    try:
        for member in cluster.members:
            member.start(wait=False)
        for member in cluster.members:
            member.wait_ready()
        yield cluster
    finally:
        for member in cluster.members:
            member.end()
