"""In-memory pageserver and safekeepers that speak the documented HTTP interface, and can be told to fail."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI

from excimer.base.errors import ConflictError, NotFoundError, RefusedError, RetryableError
from excimer.base.ids import NodeId
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.controller.model import Pageserver, Safekeeper
from excimer.controller.shell import Controller
from excimer.controller.sqlite_store import SqliteStore
from excimer.controller.tokens import TokenMaker
from excimer.service.health import Health
from excimer.service.http import bearer_auth, create_app, serving_http
from excimer.service.metrics import new_registry
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Right, TokenVerifier, generate_key_pair

KEYS = generate_key_pair()
START_LSN = 0x1500060
SYSTEM_ID = 2**63 + 17


@dataclass
class FakeNode:
    """`failing` answers 503 to everything; `refusing` 400 to creations."""

    failing: bool = False
    refusing: bool = False
    tenants: set[str] = field(default_factory=set)
    generations: dict[str, int] = field(default_factory=dict)
    timelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    importing: set[str] = field(default_factory=set)
    flush_lsn: int = START_LSN
    commit_lsn: int = START_LSN
    writers: int = 0
    newest_lsn: int | None = None
    """What a pageserver answers for any time, because it knows no later commit."""
    sources: Sequence["FakeNode"] = ()
    """Safekeepers whose WAL a pageserver ingests at once, unless it stands still."""
    stands_still: bool = False
    leases: list[tuple[str, str]] = field(default_factory=list)
    """By timeline and holder."""

    def with_wal(self, timeline: dict[str, Any]) -> dict[str, Any]:
        """As a pageserver shows it."""
        lsn: int = parse_lsn(timeline["last_record_lsn"])
        if not self.stands_still and not timeline.get("is_damaged"):
            lsn = max([lsn, *(source.commit_lsn for source in self.sources)])
        return timeline | {"last_record_lsn": format_lsn(lsn)}

    def check(self) -> None:
        if self.failing:
            raise RetryableError("out of order")

    def check_creation(self) -> None:
        self.check()
        if self.refusing:
            raise RefusedError("not to my taste")


def pageserver_app(node: FakeNode, public_pem: bytes = KEYS.public_pem) -> FastAPI:
    app = new_app(public_pem)

    @app.post("/v1/tenant")
    async def create_tenant(body: dict[str, Any]) -> None:
        node.check_creation()
        if body["tenant_id"] in node.tenants:
            raise ConflictError("tenant exists")
        node.tenants.add(body["tenant_id"])
        node.generations[body["tenant_id"]] = body["generation"]

    @app.get("/v1/tenant")
    async def list_tenants() -> list[dict[str, Any]]:
        node.check()
        return [{"tenant_id": tenant, "generation": node.generations[tenant]} for tenant in node.tenants]

    @app.delete("/v1/tenant/{tenant_id}")
    async def delete_tenant(tenant_id: str) -> None:
        node.check()
        if tenant_id not in node.tenants:
            raise NotFoundError("no such tenant")
        node.tenants.remove(tenant_id)

    @app.post("/v1/tenant/{tenant_id}/timeline")
    async def create_timeline(tenant_id: str, body: dict[str, Any]) -> dict[str, Any]:
        node.check_creation()
        if tenant_id not in node.tenants:
            raise NotFoundError("no such tenant")
        if body["new_timeline_id"] in node.timelines:
            raise ConflictError("timeline exists")
        parent = node.timelines.get(body.get("ancestor_timeline_id", ""), {})
        if parent.get("is_damaged"):
            raise RefusedError(parent["problem"])
        lsn = body.get("ancestor_start_lsn", format_lsn(START_LSN))
        if parse_lsn(lsn) < START_LSN:
            raise RefusedError(f"LSN {lsn} is before the history")
        node.timelines[body["new_timeline_id"]] = {
            "timeline_id": body["new_timeline_id"],
            "pg_version": body["pg_version"],
            "system_id": SYSTEM_ID,
            "wal_segment_size": 1 << 24,
            "last_record_lsn": lsn,
            "ancestor_lsn": lsn if "ancestor_timeline_id" in body else None,
            "ancestor_timeline_id": body.get("ancestor_timeline_id"),
            "is_archived": False,
        }
        return node.timelines[body["new_timeline_id"]]

    @app.get("/v1/tenant/{tenant_id}/timeline/{timeline_id}")
    async def get_timeline(tenant_id: str, timeline_id: str) -> dict[str, Any]:
        if timeline_id not in node.timelines:
            raise NotFoundError("no such timeline")
        return node.timelines[timeline_id]

    @app.get("/v1/tenant/{tenant_id}/import")
    async def list_imports(tenant_id: str) -> list[dict[str, Any]]:
        node.check()
        return [{"timeline_id": timeline, "received_bytes": 1} for timeline in sorted(node.importing)]

    @app.delete("/v1/tenant/{tenant_id}/timeline/{timeline_id}")
    async def delete_timeline(tenant_id: str, timeline_id: str) -> None:
        node.check()
        if node.timelines.pop(timeline_id, None) is None:
            raise NotFoundError("no such timeline")

    add_history_routes(app, node)
    add_lease_routes(app, node)
    return app


def add_lease_routes(app: FastAPI, node: FakeNode) -> None:
    @app.delete("/v1/tenant/{tenant_id}/timeline/{timeline_id}/lsn_lease/{holder}")
    async def release_leases(tenant_id: str, timeline_id: str, holder: str) -> dict[str, int]:
        node.check()
        count = node.leases.count((timeline_id, holder))
        node.leases = [lease for lease in node.leases if lease != (timeline_id, holder)]
        return {"released": count}


def add_history_routes(app: FastAPI, node: FakeNode) -> None:
    path = "/v1/tenant/{tenant_id}/timeline"

    @app.get("/v1/tenant/{tenant_id}/timeline/{timeline_id}/get_lsn_by_timestamp")
    async def lsn_by_timestamp(tenant_id: str, timeline_id: str, timestamp: str) -> dict[str, str]:
        if node.newest_lsn is not None:
            return {"lsn": format_lsn(node.newest_lsn), "kind": "newest"}
        return {"lsn": format_lsn(START_LSN + int(timestamp[0:4])), "kind": "between"}

    @app.get(path)
    async def list_timelines(tenant_id: str) -> list[dict[str, Any]]:
        node.check()
        return [node.with_wal(timeline) for timeline in node.timelines.values()]

    @app.put(path + "/{timeline_id}/archival_config")
    async def set_archival_config(tenant_id: str, timeline_id: str, body: dict[str, str]) -> None:
        node.check_creation()
        node.timelines[timeline_id]["is_archived"] = body["state"] == "archived"

    @app.put(path + "/{timeline_id}/detach_ancestor")
    async def detach_ancestor(tenant_id: str, timeline_id: str) -> dict[str, list[str]]:
        node.check_creation()
        detached = node.timelines[timeline_id]
        parent, lsn = detached["ancestor_timeline_id"], detached["ancestor_lsn"]
        detached |= {"ancestor_timeline_id": None, "ancestor_lsn": None}
        moved = [
            each
            for each in node.timelines.values()
            if parent is not None
            and each["ancestor_timeline_id"] == parent
            and parse_lsn(each["ancestor_lsn"]) <= parse_lsn(lsn)
        ]
        for each in moved:
            each["ancestor_timeline_id"] = timeline_id
        return {"reparented_timelines": [each["timeline_id"] for each in moved]}

    @app.get(path + "/{timeline_id}/get_timestamp_of_lsn")
    async def timestamp_of_lsn(tenant_id: str, timeline_id: str, lsn: str) -> dict[str, str]:
        return {"timestamp": f"{parse_lsn(lsn) - START_LSN:04}-01-01T00:00:00Z"}

    @app.get("/v1/tenant/{tenant_id}/sizes")
    async def sizes(tenant_id: str) -> dict[str, Any]:
        node.check()
        kinds = ("logical", "resident", "remote")
        rows = [
            {"timeline_id": each} | {f"{kind}_size_bytes": 8192 for kind in kinds}
            for each, known in node.timelines.items()
            if not known.get("is_damaged")
        ]
        damaged = [
            {"timeline_id": each, "reason": known["problem"]}
            for each, known in node.timelines.items()
            if known.get("is_damaged")
        ]
        return {
            "synthetic_size_bytes": 16384,
            "archived_size_bytes": 0,
            "timelines": rows,
            "damaged": damaged,
        }


def safekeeper_app(node: FakeNode, public_pem: bytes = KEYS.public_pem) -> FastAPI:
    app = new_app(public_pem)
    path = "/v1/tenant/{tenant_id}/timeline/{timeline_id}"

    @app.post(path)
    async def create_timeline(tenant_id: str, timeline_id: str, body: dict[str, Any]) -> None:
        node.check_creation()
        if timeline_id in node.timelines:
            raise ConflictError("timeline exists")
        node.timelines[timeline_id] = body

    @app.get(path)
    async def get_timeline(tenant_id: str, timeline_id: str) -> dict[str, Any]:
        node.check()
        lsns = {"flush_lsn": format_lsn(node.flush_lsn), "commit_lsn": format_lsn(node.commit_lsn)}
        return lsns | {"writers": node.writers}

    @app.delete(path)
    async def delete_timeline(tenant_id: str, timeline_id: str) -> None:
        node.check()
        if node.timelines.pop(timeline_id, None) is None:
            raise NotFoundError("no such timeline")

    return app


def new_app(public_pem: bytes) -> FastAPI:
    verifier = TokenVerifier(public_pem)
    health = Health("fake", ready=True)
    app = create_app("fake", "1", health, new_registry("fake", "1"), verifier=verifier)
    app.router.dependencies.append(Depends(bearer_auth(verifier, SystemClock(), Right.MANAGE)))
    return app


@dataclass
class World:
    controller: Controller
    store: SqliteStore
    pageserver: FakeNode
    safekeepers: list[FakeNode]


@asynccontextmanager
async def fake_world(data_dir: Path) -> AsyncIterator[World]:
    """A controller on a real store with one fake pageserver and three fake safekeepers."""
    pageserver = FakeNode()
    safekeepers = [FakeNode() for _ in range(3)]
    pageserver.sources = safekeepers
    store = SqliteStore(data_dir)
    async with AsyncExitStack() as stack:
        stack.callback(store.close)
        address = await stack.enter_async_context(
            serving_http(pageserver_app(pageserver), "127.0.0.1:0", "fake pageserver")
        )
        places = [
            await stack.enter_async_context(
                serving_http(safekeeper_app(safekeeper), "127.0.0.1:0", "fake safekeeper")
            )
            for safekeeper in safekeepers
        ]
        store.put_nodes(
            [Pageserver(id=NodeId(1), http_address=str(address), page_service_address="127.0.0.1:6400")],
            [
                Safekeeper(
                    id=NodeId(number),
                    http_address=str(place),
                    proposer_address=f"127.0.0.1:55{number}",
                    replication_address=f"127.0.0.1:56{number}",
                )
                for number, place in enumerate(places, 1)
            ],
        )
        controller = Controller(store, TokenMaker(KEYS.private_pem, SystemClock()), SystemClock())
        yield World(controller, store, pageserver, safekeepers)
