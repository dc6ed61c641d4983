"""A pageserver process by itself: a new timeline is initdb's cluster to the byte; bad input; its end."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId, new_tenant_id, new_timeline_id
from excimer.base.keys import (
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    KeyKind,
    Relation,
    parse_key,
    relation_path,
)
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.pageserver.bootstrap import initdb_template
from excimer.pgformat.basebackup import Basebackup, unpack_relation_forks, unpack_slru_segments
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import ControlFile
from excimer.wire.auth import Right, generate_key_pair
from excimer.wire.page_service import BLOCKS_MAX
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.page_client import PageClient, connect_pages
from tests.kit.pageservers import PageserverProcess

CHANCE = random.Random(11)
TENANT, OTHER_TENANT = new_tenant_id(CHANCE), new_tenant_id(CHANCE)
MAIN = new_timeline_id(CHANCE)
RELATION_IN_POSTGRES = (KeyKind.RELATION_BLOCK, 1663, 5, 1259, 0, 0)


class World:
    def __init__(self, server: PageserverProcess) -> None:
        self.server = server
        server.created("/tenant", {"tenant_id": TENANT, "generation": 1})
        body = {"new_timeline_id": MAIN, "pg_version": NEWEST_VERSION}
        self.created = server.created(f"/tenant/{TENANT}/timeline", body)
        self.start_lsn = parse_lsn(self.created["last_record_lsn"])
        self.template = initdb_template(build_of(NEWEST_VERSION))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = PageserverProcess(tmp_path_factory.mktemp("pageserver"), generate_key_pair())
    try:
        server.start()
        yield World(server)
        assert server.stop() == 0, server.log.read_text()
    finally:
        server.end()


async def read_file(client: PageClient, key: tuple[int, ...], blocks: int, lsn: Lsn) -> bytes:
    kind, spc, db, rel, fork, _ = key
    return b"".join(
        [
            await client.get_pages(
                (kind, spc, db, rel, fork, start), min(BLOCKS_MAX, blocks - start), lsn=lsn
            )
            for start in range(0, blocks, BLOCKS_MAX)
        ]
    )


def files_below(directory: Path) -> dict[str, Path]:
    return {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_every_file_of_a_new_timeline_is_initdbs(world: World, version: int) -> None:
    expected = files_below(initdb_template(build_of(version)))
    timeline_id = new_timeline_id(CHANCE)
    body = {"new_timeline_id": timeline_id, "pg_version": version}
    start_lsn = parse_lsn(world.server.created(f"/tenant/{TENANT}/timeline", body)["last_record_lsn"])

    async def story() -> None:
        async with world.server.pages(TENANT, timeline_id) as client:
            started = time.monotonic()
            backup = await client.get_basebackup(start_lsn)
            assert time.monotonic() - started < 5
            seen = set()
            for spc, db, rel, fork, blocks in unpack_relation_forks(backup.relation_forks):
                assert blocks < SEGMENT_BLOCKS
                path = relation_path(Relation(spc, db, rel), fork)
                key = (KeyKind.RELATION_BLOCK, spc, db, rel, fork, 0)
                assert await read_file(client, key, blocks, start_lsn) == expected[path].read_bytes(), path
                seen.add(path)
            for slru, segment, blocks in unpack_slru_segments(backup.slru_segments):
                path = f"{SLRU_DIRECTORIES[slru]}/{segment:04X}"
                key = (KeyKind.SLRU_BLOCK, slru, 0, segment, 0, 0)
                assert await read_file(client, key, blocks, start_lsn) == expected[path].read_bytes(), path
                seen.add(path)
            for path, content in backup.files:
                assert content == expected[path].read_bytes()
                seen.add(path)
            missing = {path for path in expected if path.startswith(("base/", "global/", *SLRU_DIRECTORIES))}
            assert missing - seen <= {"global/pg_control"}

    asyncio.run(story())
    assert world.server.request("DELETE", f"/tenant/{TENANT}/timeline/{timeline_id}").status_code == 204


def test_basebackup_says_what_initdbs_checkpoint_says(world: World) -> None:
    template = ControlFile.unpack((world.template / "global/pg_control").read_bytes(), NEWEST_VERSION)

    async def story() -> Basebackup:
        async with world.server.pages(TENANT, MAIN) as client:
            return await client.get_basebackup(world.start_lsn)

    backup = asyncio.run(story())
    assert (backup.lsn, backup.prev_lsn) == (world.start_lsn, template.checkpoint_lsn)
    control = ControlFile.unpack(backup.control_file, NEWEST_VERSION)
    assert control.system_id == world.created["system_id"] != template.system_id
    checkpoint = CheckPoint.unpack(backup.checkpoint)
    same = set(CheckPoint.__struct_fields__) - {"next_xid"}
    assert all(getattr(checkpoint, name) == getattr(template.checkpoint, name) for name in same)
    assert 0 <= checkpoint.next_xid - template.checkpoint.next_xid < 819
    inline = {bytes(page.key) for page in backup.pages}
    kinds = {(parse_key(key).kind, parse_key(key).spc) for key in inline}
    assert {(KeyKind.SLRU_BLOCK, 0), (KeyKind.RELATION_BLOCK, 1663), (KeyKind.RELATION_BLOCK, 1664)} <= kinds
    assert len(inline) == len(backup.pages)


def test_an_lsn_in_the_future_waits_and_then_says_so(world: World) -> None:
    future = Lsn(world.start_lsn + 0x1000)

    async def story() -> None:
        async with world.server.pages(TENANT, MAIN) as client:
            started = time.monotonic()
            with pytest.raises(RetryableError, match=rf"{format_lsn(future)}.*{format_lsn(world.start_lsn)}"):
                await client.get_pages(RELATION_IN_POSTGRES, 1, lsn=future)
            assert 0.9 < time.monotonic() - started < 5
            with pytest.raises(RetryableError):
                await client.get_pages(RELATION_IN_POSTGRES, 1, since=future)
            with pytest.raises(RetryableError):
                await client.get_basebackup(future)

    asyncio.run(story())


def test_an_lsn_before_the_history_is_refused(world: World) -> None:
    async def story() -> None:
        async with world.server.pages(TENANT, MAIN) as client:
            for lsn in (0, 8, world.start_lsn - 8):
                with pytest.raises(RefusedError, match=r"oldest"):
                    await client.get_pages(RELATION_IN_POSTGRES, 1, lsn=lsn)
            with pytest.raises(RefusedError, match=r"oldest"):
                await client.get_basebackup(world.start_lsn - 8)
            with pytest.raises(RefusedError, match="relation block 1663/5/99999"):
                await client.get_pages((0, 1663, 5, 99999, 0, 0), 1)

    asyncio.run(story())


def test_random_bytes_on_both_ports_harm_nobody(world: World) -> None:
    chance = random.Random(77)

    async def story() -> None:
        for address in [world.server.page_address, world.server.http_address] * 15:
            async with connect_pages(address) as client:
                client.writer.write(chance.randbytes(chance.randrange(1, 5000)))
                client.writer.write_eof()
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    async with asyncio.timeout(3):
                        await client.reader.read()
        async with world.server.pages(TENANT, MAIN) as client:
            assert len(await client.get_pages(RELATION_IN_POSTGRES, 2)) == 2 * 8192

    asyncio.run(story())
    health = httpx.get(f"http://{world.server.http_address}/healthz").json()
    assert (health["problems"], set(health["warnings"])) == ({}, {"WAL access"})  # there is no controller


@pytest.mark.parametrize("path", ["/tenant", f"/tenant/{TENANT}/timeline"])
def test_the_api_wants_the_right_token(world: World, path: str) -> None:
    server = world.server
    assert httpx.get(f"http://{server.http_address}/v1{path}").status_code == 401
    assert server.request("GET", path, token="a.b.c").status_code == 401
    for wrong in (server.token(Right.READ_PAGES, TENANT), server.token(Right.MANAGE, OTHER_TENANT)):
        assert server.request("GET", path, token=wrong).status_code == 403
    manager_of_tenant = server.request("GET", path, token=server.token(Right.MANAGE, TENANT))
    assert manager_of_tenant.status_code == (403 if path == "/tenant" else 200)
    assert server.request("GET", path).status_code == 200


def test_the_api_answers_wrong_requests_clearly(world: World) -> None:
    request = world.server.request
    unknown = TimelineId("0" * 32)
    base = f"/tenant/{TENANT}/timeline"
    assert request("GET", f"/tenant/{OTHER_TENANT}/timeline").status_code == 404
    assert request("GET", f"{base}/{unknown}").status_code == 404
    assert request("DELETE", f"{base}/{unknown}").status_code == 404
    assert request("GET", f"{base}/nonsense").status_code == 400
    assert request("POST", base, json={"new_timeline_id": unknown, "surprise": 1}).status_code == 400
    assert request("POST", base, json={"new_timeline_id": unknown, "pg_version": 9}).status_code == 400
    assert request("POST", base, content=b"{").status_code == 400
    for body in (
        {"new_timeline_id": unknown, "ancestor_start_lsn": "0/16"},
        {"new_timeline_id": unknown, "ancestor_timeline_id": MAIN, "ancestor_start_lsn": "0/8"},
        {"new_timeline_id": unknown, "ancestor_timeline_id": MAIN, "ancestor_start_lsn": "x"},
        {"new_timeline_id": unknown, "ancestor_timeline_id": MAIN, "pg_version": 14},
    ):
        answer = request("POST", base, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["message"]
    assert request("POST", "/tenant", json={"tenant_id": TENANT, "generation": 0}).status_code == 400
    assert [each["timeline_id"] for each in request("GET", base).json()] == [MAIN]


def test_creation_is_idempotent_and_a_contradiction_is_a_conflict(world: World) -> None:
    request, base = world.server.request, f"/tenant/{TENANT}/timeline"
    again = request("POST", base, json={"new_timeline_id": MAIN, "pg_version": NEWEST_VERSION})
    assert again.status_code == 201
    assert again.json()["system_id"] == world.created["system_id"]
    contradiction = {"new_timeline_id": MAIN, "pg_version": 14}
    assert request("POST", base, json=contradiction).status_code == 409
    assert request("POST", "/tenant", json={"tenant_id": TENANT, "generation": 1}).status_code == 201


def test_openapi_and_metrics_are_served(world: World) -> None:
    schema = httpx.get(f"http://{world.server.http_address}/openapi.json").json()
    assert "/v1/tenant/{tenant_id}/timeline/{timeline_id}/get_lsn_by_timestamp" in schema["paths"]
    text = httpx.get(f"http://{world.server.http_address}/metrics").text
    assert "excimer_pages_served_total" in text
    assert f'excimer_timeline_last_record_lsn{{tenant_id="{TENANT}"' in text


def test_a_second_instance_and_a_taken_port_are_refused(world: World, tmp_path: Path) -> None:
    second = world.server.spawn()
    assert second.wait(timeout=30) == 1
    assert "is in use by process" in world.server.log.read_text()
    other = PageserverProcess(tmp_path / "other", generate_key_pair())
    with socket.socket() as taken:
        taken.bind(tuple(other.page_address))
        taken.listen()
        assert other.spawn().wait(timeout=30) == 1
    assert f"port {other.page_address.port} of 127.0.0.1 is taken" in other.log.read_text()


def test_a_tenant_of_another_token_cannot_be_read(world: World) -> None:
    async def story(tenant_of_token: TenantId, tenant: TenantId, timeline: TimelineId) -> None:
        async with connect_pages(world.server.page_address) as client:
            await client.hello(tenant, timeline, world.server.token(Right.READ_PAGES, tenant_of_token))

    for arguments, family, why in (
        ((OTHER_TENANT, TENANT, MAIN), RefusedError, "another tenant"),
        # It may be attached again in a moment: a compute is told to try again.
        ((OTHER_TENANT, OTHER_TENANT, MAIN), RetryableError, "not attached"),
        ((TENANT, TENANT, TimelineId("0" * 32)), RefusedError, "has no timeline"),
    ):
        with pytest.raises(family, match=why):
            asyncio.run(story(*arguments))
