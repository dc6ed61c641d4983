"""A real pageserver process for tests, asked over HTTP and the page service."""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, parse_lsn
from excimer.pageserver.settings import PageserverSettings
from excimer.wire.auth import KeyPair, Right
from tests.kit.page_client import PageClient, connect_pages
from tests.kit.ports import free_port
from tests.kit.service_process import ServiceProcess
from tests.kit.tokens import make_token
from tests.kit.wal_access_server import WalAccessServer


class PageserverProcess(ServiceProcess):
    """`wal_sources` serve the WAL of every timeline: a stand-in for the controller says so."""

    def __init__(
        self, directory: Path, keys: KeyPair, *, wal_sources: Sequence[str] = (), **settings: Any
    ) -> None:
        super().__init__("pageserver", directory, keys.public_pem)
        self.keys = keys
        self.object_store = directory / "objects"
        self.page_address = Address("127.0.0.1", free_port())
        self.controller = WalAccessServer(keys, wal_sources)
        self.controller.is_away = not wal_sources
        token_path = directory / "pageserver.token"
        token_path.write_text(make_token(keys, holder="pageserver:1"))
        values: dict[str, Any] = {
            "id": 1,
            "data_dir": self.data_dir,
            "object_store_url": f"file://{self.object_store}",
            "page_service_listen": str(self.page_address),
            "http_listen": str(self.http_address),
            "auth_public_key_path": self.public_key_path,
            "controller_address": str(self.controller.address),
            "auth_token_path": token_path,
            "lsn_wait_timeout_s": 1.0,
            **settings,
        }
        self.configure(PageserverSettings(**values))

    def end(self) -> None:
        self.controller.close()
        super().end()

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

    def token(
        self, right: Right, tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None
    ) -> str:
        return make_token(self.keys, right, tenant_id=tenant_id, timeline_id=timeline_id)

    def request(
        self, method: str, path: str, *, token: str | None = None, **arguments: Any
    ) -> httpx.Response:
        """With a token that may manage, unless another is given."""
        headers = {"Authorization": f"Bearer {token or self.token(Right.MANAGE)}"}
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
            await client.hello(tenant_id, timeline_id, self.token(Right.READ_PAGES, tenant_id, timeline_id))
            yield client
