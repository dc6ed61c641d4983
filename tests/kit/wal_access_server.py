"""A controller as far as a pageserver asks it: where a timeline's WAL is, and a token to read it with."""

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from excimer.base.address import Address
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.wire.auth import KeyPair, Right
from excimer.wire.wal_access import WalAccess, WalMember
from tests.kit.tokens import make_token

LIFE_S = 3600


class WalAccessServer:
    """Gives access to the same sources for every timeline. It can be away, and it counts who asks."""

    def __init__(self, keys: KeyPair, sources: Sequence[str]) -> None:
        self.sources = list(sources)
        self.life_s = LIFE_S
        self.is_away = False
        self.asked: list[tuple[TenantId, TimelineId]] = []
        self._keys = keys
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> bytes:
        """For ``/v1/tenants/TENANT/timelines/TIMELINE/wal_access``."""
        _, _, _, tenant, _, timeline, what = path.split("/")
        assert what == "wal_access"
        ids = TenantId(tenant), TimelineId(timeline)
        self.asked.append(ids)
        members = tuple(
            WalMember(safekeeper_id=NodeId(number), address=source)
            for number, source in enumerate(self.sources, 1)
        )
        token = make_token(
            self._keys,
            Right.READ_WAL,
            tenant_id=ids[0],
            timeline_id=ids[1],
            holder="pageserver:1",
            life_s=self.life_s,
        )
        return msgspec.json.encode(WalAccess(members=members, token=token, valid_for_s=self.life_s))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status = 503 if server.is_away else 200
                body = b'{"message": "away"}' if server.is_away else server.answer(self.path)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        return Handler
