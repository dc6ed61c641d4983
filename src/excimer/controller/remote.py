"""The management APIs of pageservers and safekeepers, as the controller calls them.

Each call is safe to repeat: creating what exists and deleting what does not are successes.
Paths and bodies: docs/architecture/interfaces.md.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from excimer.base.errors import ConflictError, NotFoundError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.controller.model import Pageserver, Safekeeper, Timeline
from excimer.controller.tokens import TokenMaker
from excimer.service.http_client import HttpClient, path_of
from excimer.wire.auth import EVERYTHING, Resource

CREATE_TIMEOUT_S: Final = 120.0
"""The first timeline of a PostgreSQL version runs initdb."""

WORK_TIMEOUT_S: Final = 170.0
"""Less than the command line waits; the work goes on all the same."""

CALL_TIMEOUT_S: Final = 10.0
RELEASE_TIMEOUT_S: Final = 3.0
HISTORY_TIMEOUT_S: Final = 30.0

T = TypeVar("T")


class RemoteAnswerError(RetryableError):
    """A service's answer is not what its interface promises."""


class PageserverTimeline(msgspec.Struct, frozen=True, kw_only=True):
    """What of a pageserver's answer about a timeline the controller uses."""

    timeline_id: TimelineId
    pg_version: int
    system_id: int
    wal_segment_size: int
    last_record_lsn: Lsn
    ancestor_lsn: Lsn | None = None
    ancestor_timeline_id: TimelineId | None = None
    is_archived: bool = False
    is_damaged: bool = False
    """Then `last_record_lsn` may be 0, because nobody can read it."""
    problem: str | None = None


class SafekeeperTimeline(NamedTuple):
    """How far a safekeeper has a timeline's WAL."""

    flush_lsn: Lsn
    commit_lsn: Lsn
    writers: int
    """Computes that are connected to write."""


class PageserverApi:
    """One pageserver's API."""

    def __init__(self, pageserver: Pageserver, tokens: TokenMaker) -> None:
        self._name = f"pageserver {pageserver.id}"
        self.address = self._address = pageserver.http_address
        self._tokens = tokens

    def _client(self, resource: Resource, timeout_s: float = CALL_TIMEOUT_S) -> HttpClient:
        return HttpClient(self._name, self._address, self._tokens.managing(resource), timeout_s)

    async def create_tenant(self, tenant_id: TenantId, generation: int) -> None:
        try:
            await self._client(EVERYTHING).post(
                "/v1/tenant", {"tenant_id": tenant_id, "generation": generation}
            )
        except ConflictError:
            return

    async def list_tenants(self) -> set[TenantId]:
        """Those that are attached, or are being attached."""
        answer = await self._client(EVERYTHING).get("/v1/tenant")
        return _parse(self._name, answer, lambda rows: {TenantId(row["tenant_id"]) for row in rows})

    async def delete_tenant(self, tenant_id: TenantId) -> None:
        await _ignoring_absence(
            self._client(Resource(tenant_id), CREATE_TIMEOUT_S).delete(path_of("v1", "tenant", tenant_id))
        )

    async def create_timeline(
        self, timeline: Timeline, start_lsn: Lsn | None, password_verifier: str | None = None
    ) -> PageserverTimeline:
        """`start_lsn` is where a branch starts; None for a fresh cluster, whose superuser has a verifier."""
        body: dict[str, object] = {
            "new_timeline_id": timeline.timeline_id,
            "pg_version": timeline.pg_version,
        }
        if timeline.ancestor_timeline_id is not None:
            body["ancestor_timeline_id"] = timeline.ancestor_timeline_id
        if start_lsn is not None:
            body["ancestor_start_lsn"] = format_lsn(start_lsn)
        if password_verifier is not None:
            body["password_verifier"] = password_verifier
        path = path_of("v1", "tenant", timeline.tenant_id, "timeline")
        client = self._client(Resource(timeline.tenant_id), CREATE_TIMEOUT_S)
        try:
            answer = await client.post(path, body)
        except ConflictError:
            answer = await client.get(f"{path}/{timeline.timeline_id}")
        return _parse(self._name, answer, _pageserver_timeline)

    async def find_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> PageserverTimeline | None:
        """None when the pageserver does not have it (yet)."""
        try:
            answer = await self._client(Resource(tenant_id, timeline_id)).get(
                path_of("v1", "tenant", tenant_id, "timeline", timeline_id)
            )
        except NotFoundError:
            return None
        return _parse(self._name, answer, _pageserver_timeline)

    async def list_imports(self, tenant_id: TenantId) -> set[TimelineId]:
        """The timelines that are being sent to it now."""
        answer = await self._client(Resource(tenant_id)).get(path_of("v1", "tenant", tenant_id, "import"))
        return _parse(self._name, answer, lambda rows: {TimelineId(row["timeline_id"]) for row in rows})

    async def delete_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id)
        await _ignoring_absence(self._client(Resource(tenant_id, timeline_id), CREATE_TIMEOUT_S).delete(path))

    async def lsn_by_timestamp(
        self, tenant_id: TenantId, timeline_id: TimelineId, timestamp: str
    ) -> tuple[Lsn, bool]:
        """The last LSN at or before `timestamp` (RFC 3339), and whether it is the newest that the pageserver
        has. Refused outside the history.
        """
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "get_lsn_by_timestamp")
        answer = await self._client(Resource(tenant_id, timeline_id)).get(path, {"timestamp": timestamp})
        return _parse(self._name, answer, lambda value: (_lsn(value["lsn"]), value["kind"] == "newest"))

    async def tenant_config(
        self, method: str, tenant_id: TenantId, body: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Reads (GET), replaces (PUT) or changes (PATCH) a tenant's settings; as the pageserver answers."""
        answer: dict[str, Any] = await self._client(Resource(tenant_id)).call(
            method, path_of("v1", "tenant", tenant_id, "config"), body
        )
        return answer

    async def work_on_timeline(
        self, tenant_id: TenantId, timeline_id: TimelineId, what: str
    ) -> dict[str, Any]:
        """`do_gc` or `compact`, and what the pageserver answers."""
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, what)
        answer: dict[str, Any] = await self._client(Resource(tenant_id, timeline_id), WORK_TIMEOUT_S).call(
            "PUT", path
        )
        return answer

    async def release_leases(self, tenant_id: TenantId, timeline_id: TimelineId, holder: str) -> int:
        """How many LSNs the holder had leased. NotFoundError where it cannot have any."""
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "lsn_lease", holder)
        answer = await self._client(Resource(tenant_id, timeline_id), RELEASE_TIMEOUT_S).delete(path)
        return _parse(self._name, answer, lambda value: int(value["released"]))

    async def layer_map(self, tenant_id: TenantId, timeline_id: TimelineId) -> Any:
        """As the pageserver answers it."""
        return await self._client(Resource(tenant_id, timeline_id)).get(
            path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "layer_map")
        )

    async def explain_page(self, tenant_id: TenantId, timeline_id: TimelineId, page: dict[str, str]) -> Any:
        """As the pageserver answers it; `page` is its query."""
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "explain_page")
        return await self._client(Resource(tenant_id, timeline_id), CREATE_TIMEOUT_S).get(path, page)

    async def timestamp_of_lsn(self, tenant_id: TenantId, timeline_id: TimelineId, lsn: Lsn) -> str:
        """When the last commit at or below `lsn` happened (RFC 3339). NotFoundError if none is known."""
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "get_timestamp_of_lsn")
        answer = await self._client(Resource(tenant_id, timeline_id)).get(path, {"lsn": format_lsn(lsn)})
        return _parse(self._name, answer, lambda value: str(value["timestamp"]))

    async def list_timelines(self, tenant_id: TenantId) -> dict[TimelineId, PageserverTimeline]:
        """All it has, archived ones included."""
        answer = await self._client(Resource(tenant_id)).get(path_of("v1", "tenant", tenant_id, "timeline"))
        rows = _parse(self._name, answer, lambda rows: [_pageserver_timeline(row) for row in rows])
        return {row.timeline_id: row for row in rows}

    async def set_archived(self, tenant_id: TenantId, timeline_id: TimelineId, *, is_archived: bool) -> None:
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "archival_config")
        state = "archived" if is_archived else "unarchived"
        await self._client(Resource(tenant_id, timeline_id), HISTORY_TIMEOUT_S).call(
            "PUT", path, {"state": state}
        )

    async def detach_ancestor(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        """It goes on when we no longer wait: then ask again."""
        path = path_of("v1", "tenant", tenant_id, "timeline", timeline_id, "detach_ancestor")
        await self._client(Resource(tenant_id, timeline_id), HISTORY_TIMEOUT_S).call("PUT", path)

    async def sizes(self, tenant_id: TenantId) -> dict[str, Any]:
        answer = await self._client(Resource(tenant_id), HISTORY_TIMEOUT_S).get(
            path_of("v1", "tenant", tenant_id, "sizes")
        )
        return _parse(
            self._name,
            answer,
            lambda value: {**value, "timelines": list(value["timelines"]), "damaged": list(value["damaged"])},
        )


class SafekeeperApi:
    """One safekeeper's API."""

    def __init__(self, safekeeper: Safekeeper, tokens: TokenMaker) -> None:
        self._name = f"safekeeper {safekeeper.id}"
        self._address = safekeeper.http_address
        self._tokens = tokens

    def _client(self, tenant_id: TenantId, timeline_id: TimelineId) -> HttpClient:
        token = self._tokens.managing(Resource(tenant_id, timeline_id))
        return HttpClient(self._name, self._address, token, CALL_TIMEOUT_S)

    async def create_timeline(self, timeline: Timeline) -> None:
        """`timeline` must be complete (`start_lsn` known)."""
        body = {
            "start_lsn": format_lsn(timeline.start_lsn or 0),
            "pg_version": timeline.pg_version,
            "system_id": timeline.system_id,
            "wal_segment_size": timeline.wal_segment_size,
        }
        try:
            await self._client(timeline.tenant_id, timeline.timeline_id).post(
                _safekeeper_path(timeline.tenant_id, timeline.timeline_id), body
            )
        except ConflictError:
            return

    async def delete_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        await _ignoring_absence(
            self._client(tenant_id, timeline_id).delete(_safekeeper_path(tenant_id, timeline_id))
        )

    async def read_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> SafekeeperTimeline:
        answer = await self._client(tenant_id, timeline_id).get(_safekeeper_path(tenant_id, timeline_id))
        return _parse(
            self._name,
            answer,
            lambda v: SafekeeperTimeline(_lsn(v["flush_lsn"]), _lsn(v["commit_lsn"]), int(v["writers"])),
        )

    async def count_writers(self, tenant_id: TenantId, timeline_id: TimelineId) -> int:
        """Computes that are connected to write."""
        return (await self.read_timeline(tenant_id, timeline_id)).writers


def _safekeeper_path(tenant_id: TenantId, timeline_id: TimelineId) -> str:
    return path_of("v1", "tenant", tenant_id, "timeline", timeline_id)


async def _ignoring_absence(call: Any) -> None:
    try:
        await call
    except NotFoundError:
        return


def _lsn(value: object) -> Lsn:
    """LSNs travel as text; integers are understood too."""
    return parse_lsn(value) if isinstance(value, str) else msgspec.convert(value, Lsn)


def _pageserver_timeline(value: dict[str, Any]) -> PageserverTimeline:
    lsns = {
        key: _lsn(value[key]) for key in ("last_record_lsn", "ancestor_lsn") if value.get(key) is not None
    }
    return msgspec.convert({**value, "ancestor_lsn": None, **lsns}, PageserverTimeline, strict=False)


def _parse(service: str, answer: Any, parse: Callable[[Any], T]) -> T:
    try:
        return parse(answer)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise RemoteAnswerError(f"{service} gave an answer that is not understood: {error}") from error
