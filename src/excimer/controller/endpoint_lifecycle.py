"""Endpoints are started and stopped here: the decision, durable, and then the order to a compute node.

::

    start --decide: awake, on which node, generation--> row --order--> node --accepts connections--> answer
                                                         '-- it failed: as it was before <--'

Orders may be repeated, and a late one is told from the newest by its generation (`wire.compute_orders`). Who
starts what another starts shares its start: the node sees to that.

A branch may become another timeline while its endpoint starts: that is looked at again before anybody hears
that it is awake.

Not here: how a suspend by itself is told (`suspension`), where there is room (`placement`).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec

from excimer.base.errors import ConflictError, ExcimerError, RefusedError, RetryableError
from excimer.base.ids import NodeId
from excimer.base.lsn import format_lsn
from excimer.controller.compute_nodes import ComputeNodeApi, ComputeNodes
from excimer.controller.core import find_endpoint
from excimer.controller.model import ComputeSpec, Endpoint
from excimer.controller.placement import NodesFullError, plan_compute_node
from excimer.controller.store import MetadataStore
from excimer.controller.suspension import Suspension
from excimer.service.http_client import UnreachableError
from excimer.service.logs import get_logger
from excimer.wire.compute_orders import Started, StartOrder, StopOrder

ATTEMPTS: Final = 5
"""How often a start begins again because its branch, or the decision, changed under it."""

log = get_logger(__name__)


class StillRunningError(ConflictError):
    """Something must be stopped first."""


class EndpointFailedError(RefusedError):
    """An endpoint does not start; the sentence says why."""


class EndpointUnreadyError(RetryableError):
    """An endpoint does not accept connections yet, or its node is away."""


class Awake(NamedTuple):
    """An endpoint that accepts connections."""

    endpoint: Endpoint
    branch: str
    is_new: bool
    pid: int


class EndpointLifecycle:
    def __init__(
        self,
        store: MetadataStore,
        nodes: ComputeNodes,
        suspension: Suspension,
        read_spec: Callable[[str], Awaitable[ComputeSpec]],
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._suspension = suspension
        self._read_spec = read_spec
        self._starting: Counter[str] = Counter()
        """How many calls wait for the start of each endpoint."""

    async def start(
        self, name: str, *, limit_s: float, is_restart: bool = False, is_immediate: bool = False
    ) -> Awake:
        """Returns when it accepts connections. `is_restart`: whatever runs is stopped first.

        Raises `UnknownNameError`, `StillRunningError` for a second primary, `EndpointFailedError`,
        `EndpointUnreadyError`, `NoComputeNodeError`.
        """
        self._starting[name] += 1
        try:
            return await self._start(name, limit_s, is_restart=is_restart, is_immediate=is_immediate)
        finally:
            self._starting[name] -= 1
            self._starting += Counter()  # without those that are 0

    async def _start(self, name: str, limit_s: float, *, is_restart: bool, is_immediate: bool) -> Awake:
        refused: int | None = None
        for _ in range(ATTEMPTS):
            spec = await self._read_spec(name)
            decided = await self._decide(spec.endpoint, refused, is_restart=is_restart)
            order = make_order(spec, decided.after, limit_s, is_immediate=is_immediate)
            started = await self._order_start(order, decided, replaces=is_restart)
            if started is None:
                is_restart = False  # whoever has decided otherwise has done it
                refused = decided.after.generation
                continue
            if (await self._row(name)).timeline_id == decided.after.timeline_id:
                return Awake(decided.after, spec.branch_name, started.is_new, started.pid)
            log.warning("the branch became another while its endpoint started", endpoint=name)
            is_restart = True
        raise EndpointUnreadyError(f"endpoint {name} is started and stopped again and again: try again")

    async def _decide(self, endpoint: Endpoint, refused: int | None, *, is_restart: bool) -> "_Decided":
        """`refused`: the generation that the node knows to be stopped, whatever the row says."""
        async with self._suspension.changing:
            endpoints = await asyncio.to_thread(self._store.list_endpoints)
            before = find_endpoint(endpoints, endpoint.name)
            await self._refuse_second_primary(before, endpoints)
            node_id = await self._place(before, endpoints)
            is_asleep = before.state != "running" or before.node_id != node_id
            is_new = is_restart or is_asleep or before.generation == refused
            after = msgspec.structs.replace(
                before, state="running", node_id=node_id, generation=before.generation + is_new
            )
            if after != before:
                await asyncio.to_thread(self._store.put_suspension, after)
            return _Decided(before, after)

    async def _row(self, name: str) -> Endpoint:
        return find_endpoint(await asyncio.to_thread(self._store.list_endpoints), name)

    async def _place(self, endpoint: Endpoint, endpoints: list[Endpoint]) -> NodeId:
        """One that is awake stays where it is as long as its node is there."""
        is_awake = endpoint.state == "running" and endpoint.node_id is not None
        if is_awake and endpoint.node_id is not None and self._nodes.is_present(endpoint.node_id):
            return endpoint.node_id
        nodes = await self._nodes.list_nodes()
        silent_s = {node.id: self._nodes.silent_s(node.id) for node in nodes}
        try:
            return plan_compute_node(endpoint, endpoints, nodes, silent_s).id
        except NodesFullError:
            awake = await self._awake()  # who was killed, or stopped with its installation, takes no room
            there = [each for each in endpoints if each.name in awake]
            return plan_compute_node(endpoint, there, nodes, silent_s).id

    async def _awake(self) -> set[str]:
        """Names of endpoints that run where their node answers, and of those that are being started."""
        names = set(self._starting)
        for api in await self._nodes.apis():
            with contextlib.suppress(RetryableError):
                names |= {each.name for each in await api.running()}
        return names

    async def _refuse_second_primary(self, endpoint: Endpoint, endpoints: list[Endpoint]) -> None:
        """Two would fence each other again and again."""
        if endpoint.mode != "primary":
            return
        rivals = {
            other.name: other
            for other in endpoints
            if other.timeline_id == endpoint.timeline_id
            and other.mode == "primary"
            and other.name != endpoint.name
            and other.state == "running"
        }
        for rival in rivals.values():
            if rival.node_id is None or not await self._runs(rival):
                continue
            branch = (await self._read_spec(endpoint.name)).branch_name
            raise StillRunningError(
                f"branch {branch} has a running primary, endpoint {rival.name}: "
                f"stop that first, or branch and start an endpoint there"
            )

    async def _runs(self, endpoint: Endpoint) -> bool:
        assert endpoint.node_id is not None
        api = await self._nodes.api_of(endpoint.node_id)
        return any(each.name == endpoint.name for each in await api.running())

    async def _order_start(self, order: StartOrder, decided: "_Decided", *, replaces: bool) -> Started | None:
        """None: somebody has decided otherwise meanwhile."""
        assert decided.after.node_id is not None
        api = await self._nodes.api_of(decided.after.node_id)
        try:
            return await api.start(order, replaces=replaces)
        except ConflictError:
            return None
        except RefusedError as error:
            await self._undo(decided)
            raise EndpointFailedError(_own_words(api, error)) from error
        except UnreachableError as error:
            await self._undo(decided)
            raise EndpointUnreadyError(str(error)) from error
        except RetryableError as error:
            raise EndpointUnreadyError(_own_words(api, error)) from error

    async def _undo(self, decided: "_Decided") -> None:
        """Unless somebody has decided anew: all is as it was but the generation, which never goes back."""
        async with self._suspension.changing:
            now = await self._suspension.read(decided.after.name)
            if now.generation == decided.after.generation and now.state == "running":
                reverted = msgspec.structs.replace(now, state=decided.before.state)
                await asyncio.to_thread(self._store.put_suspension, reverted)

    async def stop(self, name: str, *, is_immediate: bool, is_suspend: bool = False) -> tuple[Endpoint, bool]:
        """The row, and whether it ran; nothing of it runs when this returns. One that did not run is not
        suspended by that.
        """
        endpoint = await self._suspension.read(name)
        order = StopOrder(generation=endpoint.generation, is_immediate=is_immediate)
        if endpoint.node_id is not None:
            apis = [await self._nodes.api_of(endpoint.node_id)]
        else:  # an earlier version of Excimer has started it, or nobody has
            apis = await self._nodes.apis()
        was_running = False
        for api in apis:
            try:
                was_running = (await api.stop(name, order)).was_running or was_running
            except (RefusedError, RetryableError) as error:
                if isinstance(error, UnreachableError):
                    raise EndpointUnreadyError(str(error)) from error
                raise type(error)(_own_words(api, error)) from error
        if is_suspend and not was_running:
            return await self._suspension.read(name), False
        state, reason = ("suspended", "asked") if is_suspend else ("stopped", "")
        changes: dict[str, Any] = {"state": state, "reason": reason}
        after = await self._suspension.change(name, delay_s=None, last_active_at=None, **changes)
        return after, was_running

    async def remove(self, endpoint: Endpoint) -> None:
        """What nodes have kept of an endpoint that is to be deleted. Raises `StillRunningError`, and
        `EndpointUnreadyError` where it may run.
        """
        for api in await self._nodes.apis():
            try:
                await api.remove(endpoint.name)
            except ConflictError as error:
                raise StillRunningError(
                    f"endpoint {endpoint.name} runs: stop it first, "
                    f"or `excimer endpoint stop {endpoint.name} --destroy`"
                ) from error
            except ExcimerError as error:
                if endpoint.state == "running" and isinstance(error, UnreachableError):
                    raise EndpointUnreadyError(str(error)) from error
                log.warning("files of a deleted endpoint stay", endpoint=endpoint.name, error=error)


class _Decided(NamedTuple):
    before: Endpoint
    after: Endpoint


def make_order(spec: ComputeSpec, endpoint: Endpoint, limit_s: float, *, is_immediate: bool) -> StartOrder:
    return StartOrder(
        endpoint=endpoint.name,
        generation=endpoint.generation,
        tenant_id=endpoint.tenant_id,
        timeline_id=endpoint.timeline_id,
        branch=spec.branch_name,
        mode=endpoint.mode,
        lsn=None if endpoint.lsn is None else format_lsn(endpoint.lsn),
        pg_version=endpoint.pg_version,
        listen_host=endpoint.listen_host,
        postgres_port=endpoint.postgres_port,
        http_port=endpoint.http_port,
        tls_certificate_path=endpoint.tls_certificate_path,
        tls_key_path=endpoint.tls_key_path,
        postgres_settings=endpoint.postgres_settings,
        suspend_delay_s=endpoint.suspend_delay_s,
        cache_size_mib=endpoint.cache_size_mib,
        limits=endpoint.limits,
        pageserver_address=spec.pageserver_address,
        pageserver_http_address=spec.pageserver_http_address,
        lease_holder=spec.lease_holder,
        safekeepers=spec.safekeepers,
        wal_sources=spec.wal_sources,
        branch_start_lsn=format_lsn(spec.branch_start_lsn),
        quieting_id=spec.quieting_id or "",
        extension_workers=spec.extension_workers,
        tokens=spec.tokens,
        limit_s=limit_s,
        is_immediate=is_immediate,
    )


def _own_words(api: ComputeNodeApi, error: Exception) -> str:
    """The sentence is about the endpoint, whichever node says it."""
    return str(error).removeprefix(f"{api.name}: ")
