"""A real pageserver process for tests: started, killed, stopped, asked over HTTP and the page service."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, parse_lsn
from excimer.pageserver.settings import PageserverSettings
from excimer.service.settings import save_settings
from excimer.wire.auth import Claims, KeyPair, Scope, encode_token
from tests.kit.page_client import PageClient, connect_pages
from tests.kit.ports import free_port

READY_TIMEOUT_S = 30.0


class PageserverProcess:
    """One pageserver; ports, directories and the object store stay the same over restarts."""

    def __init__(self, directory: Path, keys: KeyPair, **settings: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.keys = keys
        self.data_dir = directory / "data"
        self.object_store = directory / "objects"
        self.log = directory / "log"
        self.http_address = Address("127.0.0.1", free_port())
        self.page_address = Address("127.0.0.1", free_port())
        self.process: subprocess.Popen[bytes] | None = None
        self.settings_path = directory / "pageserver.toml"
        (directory / "public.pem").write_bytes(keys.public_pem)
        (directory / "private.pem").write_bytes(keys.private_pem)
        values: dict[str, Any] = {
            "id": 1,
            "data_dir": self.data_dir,
            "object_store_url": f"file://{self.object_store}",
            "page_service_listen": str(self.page_address),
            "http_listen": str(self.http_address),
            "auth_public_key_path": directory / "public.pem",
            "auth_private_key_path": directory / "private.pem",
            "lsn_wait_timeout_s": 1.0,
            **settings,
        }
        save_settings(self.settings_path, PageserverSettings(**values))

    def spawn(self) -> "subprocess.Popen[bytes]":
        """One more process with these settings, not waited for."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "excimer.pageserver", str(self.settings_path)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        """Returns when it serves."""
        self.process = self.spawn()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{self.http_address}/healthz").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the pageserver is not ready:\n{self.log.read_text()}")

    def rss_bytes(self) -> int:
        """Resident memory."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU time it has used, of all its threads."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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

    def token(self, scope: Scope, tenant_id: TenantId | None = None) -> str:
        return encode_token(self.keys.private_pem, Claims(scope=scope, tenant_id=tenant_id))

    def request(
        self, method: str, path: str, *, token: str | None = None, **arguments: Any
    ) -> httpx.Response:
        """With a token that may manage, unless another is given."""
        headers = {"Authorization": f"Bearer {token or self.token(Scope.PAGESERVER_API)}"}
        url = f"http://{self.http_address}/v1{path}"
        return httpx.request(method, url, headers=headers, timeout=60, **arguments)

    def created(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of a POST that must succeed."""
        answer = self.request("POST", path, json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> dict[str, Any]:
        answer = self.request("GET", f"/tenant/{tenant_id}/timeline/{timeline_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def last_record_lsn(self, tenant_id: TenantId, timeline_id: TimelineId) -> Lsn:
        return parse_lsn(self.timeline(tenant_id, timeline_id)["last_record_lsn"])

    @contextlib.asynccontextmanager
    async def pages(self, tenant_id: TenantId, timeline_id: TimelineId) -> AsyncIterator[PageClient]:
        """A connection of the page service that has said Hello."""
        async with connect_pages(self.page_address) as client:
            await client.hello(tenant_id, timeline_id, self.token(Scope.TENANT, tenant_id))
            yield client
