"""Real safekeeper processes for tests: started, killed, stopped, looked at from outside."""

import os
import signal
import subprocess
import sys
import time
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
from excimer.service.settings import save_settings
from excimer.wire.auth import Claims, KeyPair, Scope, encode_token, generate_key_pair
from tests.kit.ports import free_port

TENANT = TenantId("aa" * 16)
TIMELINE = TimelineId("bb" * 16)
NO_BROKER = "nats://excimer:none@127.0.0.1:9"
READY_TIMEOUT_S = 60.0


class SafekeeperProcess:
    """One safekeeper; its ports and directory stay the same over restarts."""

    def __init__(self, node_id: int, directory: Path, keys: KeyPair) -> None:
        self.node_id = NodeId(node_id)
        self.directory = directory
        self.data_dir = directory / "data"
        self.log = directory / "log"
        self.proposer_address = Address("127.0.0.1", free_port())
        self.replication_address = Address("127.0.0.1", free_port())
        self.http_address = Address("127.0.0.1", free_port())
        self.process: subprocess.Popen[bytes] | None = None
        self._admin = {"Authorization": f"Bearer {encode_token(keys.private_pem, Claims(scope=Scope.ADMIN))}"}
        directory.mkdir(parents=True)
        key_path = directory / "public.pem"
        key_path.write_bytes(keys.public_pem)
        self.settings_path = directory / "safekeeper.toml"
        settings = SafekeeperSettings(
            id=self.node_id,
            data_dir=self.data_dir,
            proposer_listen=str(self.proposer_address),
            replication_listen=str(self.replication_address),
            http_listen=str(self.http_address),
            broker_url=NO_BROKER,
            auth_public_key_path=key_path,
        )
        self._settings = settings
        save_settings(self.settings_path, settings)

    def move_proposer_port(self) -> None:
        """From its next start on, proposers that know the old address cannot reach it."""
        self.proposer_address = Address("127.0.0.1", free_port())
        settings = msgspec.structs.replace(self._settings, proposer_listen=str(self.proposer_address))
        save_settings(self.settings_path, settings)

    def spawn(self) -> "subprocess.Popen[bytes]":
        """One more process with these settings, not waited for."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "excimer.safekeeper", str(self.settings_path)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=log,
                stderr=log,
            )

    def start(self, *, wait: bool = True) -> None:
        self.process = self.spawn()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"http://{self.http_address}/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"safekeeper is not ready:\n{self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=10)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

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
        self.token = encode_token(self.keys.private_pem, Claims(scope=Scope.TENANT, tenant_id=TENANT))
        self.members = [
            SafekeeperProcess(number, directory / f"safekeeper-{number}", self.keys)
            for number in range(1, count + 1)
        ]

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
