"""A1: every right is tried at every door: what the table opens is open, and everything else stays shut."""

import asyncio
import functools
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry

from excimer.base.address import Address
from excimer.base.errors import ExcimerError, NotFoundError
from excimer.base.ids import TenantId, TimelineId
from excimer.compute_node.endpoints.api import make_api
from excimer.controller.process import make_app as controller_app
from excimer.pageserver.endpoints.page_connection import PageService, ServedTimeline
from excimer.pageserver.metrics import PageServiceMetrics
from excimer.pageserver.shell import make_app as pageserver_app
from excimer.safekeeper.endpoints.proposer_port import ProposerPort
from excimer.safekeeper.endpoints.replication_port import ReplicationPort
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.shell import make_app as safekeeper_app
from excimer.safekeeper.timeline_door import TimelineDoor
from excimer.service.health import Health
from excimer.service.light_http import serving_light_http
from excimer.service.listen import bind_listen, bound_address
from excimer.service.metrics import new_registry
from excimer.service.replication_client import connect_replication
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.auth import Resource, Right, TokenVerifier
from excimer.wire.replication import format_options
from tests.kit import rights_table as table
from tests.kit import tokens
from tests.kit.page_client import connect_pages
from tests.kit.raw_proposer import RawProposer
from tests.kit.rights_table import DOORS, Door
from tests.kit.storage_fakes import KEYS, fake_world

TENANT, OTHER_TENANT = TenantId("aa" * 16), TenantId("ab" * 16)
TIMELINE, OTHER_TIMELINE = TimelineId("bb" * 16), TimelineId("bc" * 16)
HOLDERS = {
    "endpoint:NAME": "endpoint:main",
    "pageserver:N that has the tenant": "pageserver:1",
    "compute_node:N": "compute_node:1",
}
STRANGER = "somebody"
DOCUMENT = Path(__file__).parents[2] / "docs/architecture/rights.md"
VERIFIER = TokenVerifier(KEYS.public_pem)


class Bearer(NamedTuple):
    """A token, by what it says."""

    holder: str
    right: Right | None
    resource: Resource
    is_expired: bool = False


@functools.cache
def token_of(bearer: Bearer) -> str:
    return tokens.make_token(
        KEYS,
        *(() if bearer.right is None else (bearer.right,)),
        holder=bearer.holder,
        tenant_id=bearer.resource.tenant_id,
        timeline_id=bearer.resource.timeline_id,
        exp=1 if bearer.is_expired else int(time.time()) + 3600,
    )


def all_bearers() -> list[Bearer]:
    """Each right on everything that could be meant, and each holder without any; also expired ones."""
    exact = Resource(TENANT, TIMELINE)
    resources = (
        exact,
        Resource(TENANT),
        Resource(),
        Resource(TENANT, OTHER_TIMELINE),
        Resource(OTHER_TENANT),
        Resource(OTHER_TENANT, TIMELINE),
    )
    made = [
        Bearer(STRANGER, right, resource)
        for right, resource in product(Right, resources)
        if right is not Right.WRITE_WAL or resource.timeline_id is not None
    ]
    holders = (
        *HOLDERS.values(),
        "endpoint:main2",
        "pageserver:2",
        "compute_node:2",
        "controller",
        "cli",
        STRANGER,
    )
    made += [Bearer(holder, None, resource) for holder, resource in product(holders, resources)]
    # A token with a right is not its holder's proof, whoever that is.
    made += [Bearer(holder, right, exact) for holder, right in product(HOLDERS.values(), Right)]
    made += [Bearer(holder, right, exact, True) for holder, right in product((STRANGER, "cli"), Right)]
    made += [Bearer(holder, None, exact, True) for holder in HOLDERS.values()]
    return made


IsOpen = Callable[[Bearer], Awaitable[bool]]
BEARERS = all_bearers()
FEW_BEARERS = [each for each in BEARERS if each.resource in (Resource(TENANT, TIMELINE), Resource())]
"""For the second and later routes of one row, which are behind the same piece of code."""


def may_open(door: Door, bearer: Bearer) -> bool:
    """What the table says."""
    if bearer.is_expired:
        return False
    if door.holder and bearer.right is None and bearer.holder == HOLDERS[door.holder]:
        # An endpoint is the one of its timeline; a pageserver's token names none.
        needs_timeline = door.entrance == table.RENEWAL
        return not needs_timeline or bearer.resource == Resource(TENANT, TIMELINE)
    if door.asks is None or bearer.right is not door.asks:
        return False
    asked = {
        "everything": Resource(),
        "tenant": Resource(TENANT),
        "timeline": Resource(TENANT, TIMELINE),
    }[door.on]
    tenant_id, timeline_id = bearer.resource
    return tenant_id in (None, asked.tenant_id) and timeline_id in (None, asked.timeline_id)


async def check(door: Door, is_open: IsOpen, bearers: Sequence[Bearer] = BEARERS) -> None:
    """With every token, unless some are named."""
    opened = 0
    for bearer in bearers:
        found = await is_open(bearer)
        assert found == may_open(door, bearer), (door, bearer, "is open" if found else "is shut")
        opened += found
    assert opened > 0, f"nothing opens {door}"


# HTTP


class Nobody:
    """Stands behind a door: whatever is asked of it is not there."""

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object, **__: object) -> Any:
            raise NotFoundError(f"{name}: nothing is here")

        return answer


PARAMETERS = {
    "{tenant_id}": TENANT,
    "{timeline_id}": TIMELINE,
    "{tenant}": "no-tenant",
    "{lsn}": "00000000016b3f50",
    "{term}": "7",
    "{sequence}": "1",
    "{branch}": "no-branch",
    "{timeline}": "no-timeline",
    "{node_id}": "1",
}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of all that is not shared by all services."""
    paths: dict[str, dict[str, object]] = app.openapi()["paths"]
    routes = [(method.upper(), path) for path in paths for method in paths[path]]
    found = [route for route in routes if route[1] not in ("/healthz", "/metrics")]
    assert found
    return found


def door_of(service: str, method: str, path: str) -> list[Door]:
    """The rows of a route."""
    own = [door for door in DOORS if door.service == service]
    named = [
        door
        for door in own
        if (match := re.match(r"([A-Z, ]+) (/[^,]*)", door.entrance))
        and method in match[1].split(", ")
        and match[2] == path
    ]
    if named:
        return named
    suffix = " of a timeline" if "{timeline_id}" in path else " of a tenant" if "{tenant_id}" in path else ""
    if service == "controller":
        suffix = ""  # it knows things by names, which no token has
    return [door for door in own if door.entrance == table.OTHER_ROUTES + suffix]


async def check_http(service: str, app: FastAPI) -> set[Door]:
    """All routes with all tokens; the rows that they were."""
    met: set[Door] = set()
    transport = ASGITransport(app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://service") as client:
        for method, path in routes_of(app):
            doors = door_of(service, method, path)
            assert doors, f"{method} {path} of the {service} is not in the table"
            for door in doors:
                bearers = FEW_BEARERS if door in met else BEARERS
                await check(door, partial(_try_http, client, method, path, door), bearers)
                met.add(door)
            assert (await client.request(method, _filled(path, "", "main"))).status_code == 401
    return met


async def _try_http(client: AsyncClient, method: str, path: str, door: Door, bearer: Bearer) -> bool:
    holder = "another" if door.entrance.endswith(table.IN_ANY_NAME) else bearer.holder
    body: dict[str, Any] | None = None
    if path.endswith("/lsn_lease"):
        body = {"lsn": "0/10", "holder": holder}
    elif door.entrance == table.REGISTRATION:
        body = {"http_address": "127.0.0.1:1", "capacity": 1}
    target = _filled(path, holder, "main" if door.holder else "nowhere")
    answer = await client.request(method, target, json=body, headers=tokens.bearer(token_of(bearer)))
    assert answer.status_code < 500 or answer.status_code == 503, (method, path, answer.text)
    if door.asks is None:  # only the answer itself is worth something
        return answer.is_success
    return answer.status_code not in (401, 403)


def _filled(path: str, holder: str, name: str) -> str:
    for parameter, value in (PARAMETERS | {"{name}": name, "{holder}": holder.replace(":", "%3A")}).items():
        path = path.replace(parameter, value)
    assert "{" not in path, path
    return path


def test_http_of_the_pageserver() -> None:
    nobody = cast(Any, Nobody())
    app = pageserver_app(nobody, nobody, VERIFIER, Health("pageserver"), new_registry("pageserver", "1"))
    met = asyncio.run(check_http("pageserver", app))
    assert met == {d for d in DOORS if d.service == "pageserver"} - {_door(table.PAGE_SERVICE)}


def test_http_of_a_safekeeper() -> None:
    nobody = cast(Any, Nobody())
    app = safekeeper_app(
        nobody, nobody, VERIFIER, SystemClock(), Health("safekeeper"), new_registry("safekeeper", "1")
    )
    met = asyncio.run(check_http("safekeeper", app))
    ports = {_door(table.PROPOSER_PORT), _door(table.REPLICATION_PORT)}
    assert met == {d for d in DOORS if d.service == "safekeeper"} - ports


def test_http_of_the_controller(tmp_path: Path) -> None:
    async def story() -> set[Door]:
        async with fake_world(tmp_path) as world:
            await world.controller.create_tenant(TENANT, TIMELINE, "shop", 18, True)
            await world.controller.create_endpoint(
                "main",
                "shop",
                "main",
                mode="primary",
                at=None,
                pg_version=None,
                ports=(5000, 6000),
                postgres_settings={},
            )
            registry = new_registry("controller", "1")
            controller = world.controller
            app = controller_app(
                controller,
                controller.access,
                controller.suspension,
                VERIFIER,
                SystemClock(),
                Health("controller"),
                registry,
            )
            return await check_http("controller", app)

    assert asyncio.run(story()) == {d for d in DOORS if d.service == "controller"}


def test_http_of_a_compute_node() -> None:
    async def story() -> set[Door]:
        api = make_api(cast(Any, Nobody()), VERIFIER, SystemClock())
        door = next(door for door in DOORS if door.service == "compute node")
        health = Health("compute node")
        async with (
            serving_light_http("127.0.0.1:0", health, lambda: b"", routes=api) as address,
            AsyncClient(base_url=f"http://{address}") as client,
        ):
            for number, route in enumerate(api.routes):
                bearers = FEW_BEARERS if number else BEARERS
                await check(door, partial(_try_http, client, route.method, route.path, door), bearers)
                unknown = await client.request(route.method, _filled(route.path, "", "main"))
                assert unknown.status_code == 401
        return {door}

    assert asyncio.run(story()) == {d for d in DOORS if d.service == "compute node"}


# Streams


def _door(entrance: str) -> Door:
    return next(door for door in DOORS if door.entrance == entrance)


class Finder:
    """A registry that is asked only by those that were let in."""

    def __init__(self) -> None:
        self.entered = 0

    def find(self, *_: object) -> Any:
        self.entered += 1
        raise NotFoundError("nothing is here")


@contextmanager
def listening(what: str) -> Iterator[tuple[socket.socket, Address]]:
    with bind_listen("127.0.0.1:0", what) as bound:
        yield bound, bound_address(bound)


def tried(attempt: Callable[[str], Awaitable[None]], finder: Finder) -> IsOpen:
    """An attempt ends with an error either way; a door was open if the timeline was looked for."""

    async def is_open(bearer: Bearer) -> bool:
        before = finder.entered
        with pytest.raises((ExcimerError, EOFError)):
            await attempt(token_of(bearer))
        return finder.entered > before

    return is_open


def test_the_page_service() -> None:
    async def story() -> None:
        finder = Finder()
        with listening("page service") as (bound, address):
            async with TaskScope() as scope:
                service = PageService(
                    find_timeline=cast(Callable[[TenantId, TimelineId], ServedTimeline], finder.find),
                    verifier=VERIFIER,
                    spawn=scope.contain,
                    metrics=PageServiceMetrics(CollectorRegistry()),
                    lsn_wait_timeout_s=1.0,
                )
                serving = scope.start("serve", service.serve(bound))

                async def say_hello(token: str) -> None:
                    async with connect_pages(address) as client:
                        await client.hello(TENANT, TIMELINE, token)

                await check(_door(table.PAGE_SERVICE), tried(say_hello, finder))
                serving.cancel()

    asyncio.run(story())


def test_both_ports_of_a_safekeeper() -> None:
    async def story() -> None:
        finder = Finder()
        door = TimelineDoor(cast(Any, finder), VERIFIER, SystemClock())
        metrics = SafekeeperMetrics(CollectorRegistry())
        with (
            listening("proposers") as (proposers, proposer_address),
            listening("readers") as (readers, reader_address),
        ):
            port = ProposerPort(proposers, door, metrics)
            async with TaskScope() as scope:
                scope.start("proposers", port.serve())
                scope.start("readers", ReplicationPort(readers, door, SystemClock(), metrics).serve())

                def greet(token: str) -> None:
                    with RawProposer(proposer_address) as proposer:
                        proposer.greet(TENANT, TIMELINE, token)
                        assert proposer.receive() is None
                        raise EOFError

                async def greet_in_thread(token: str) -> None:
                    await asyncio.to_thread(greet, token)

                async def log_in(token: str) -> None:
                    client = await connect_replication(
                        reader_address,
                        user="reader",
                        application_name="test",
                        password=token,
                        options=format_options(TENANT, TIMELINE),
                    )
                    client.close()

                await check(_door(table.PROPOSER_PORT), tried(greet_in_thread, finder))
                await check(_door(table.REPLICATION_PORT), tried(log_in, finder))
                await asyncio.to_thread(port.close)

    asyncio.run(story())


# The document


def test_the_document_has_this_table() -> None:
    text = DOCUMENT.read_text()
    for rows in (table.held_rows(), table.door_rows()):
        assert "\n".join(rows) in text, "docs/architecture/rights.md must have:\n" + "\n".join(rows)
