"""libhydrate's file calls, one process at a time: what is fetched, how it is asked for, what stays local."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.ids import TenantId
from excimer.base.keys import SEGMENT_BLOCKS
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.wire.page_service import GetPages
from tests.kit.hydrate_driver import (
    FILES,
    NOT_MODIFIED_SINCE,
    SPARSE,
    TENANT,
    TIMELINE,
    Driver,
    LazyDirectory,
    tag,
    tags,
    tags_of,
    wait_until,
)

PATH = "base/5/1000"
NEW = 0xABCDEF


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[LazyDirectory]:
    directory = LazyDirectory(tmp_path)
    yield directory
    directory.close()


@pytest.fixture
def driver(lazy: LazyDirectory) -> Driver:
    return lazy.driver()


@pytest.mark.parametrize(
    ("path", "block", "expected"),
    [
        ("base/5/1001", 9, (0, 0, 1663, 5, 1001, 9)),
        ("base/5/1000_fsm", 2, (0, 1, 1663, 5, 1000, 2)),
        ("base/5/4000_init", 0, (0, 3, 1663, 5, 4000, 0)),
        ("global/1262", 1, (0, 0, 1664, 0, 1262, 1)),
        (SPARSE, SEGMENT_BLOCKS - 1, (0, 0, 1663, 5, 2000, SEGMENT_BLOCKS - 1)),
        ("base/5/2000.1", 3, (0, 0, 1663, 5, 2000, SEGMENT_BLOCKS + 3)),
        ("pg_xact/0000", 31, (0x20, 0, 0, 0, 0, 31)),
        ("pg_multixact/members/00AB", 5, (0x20, 0, 2, 0, 0xAB, 5)),
    ],
)
def test_request_names_the_block(
    lazy: LazyDirectory, driver: Driver, path: str, block: int, expected: tuple[int, ...]
) -> None:
    assert driver.read(driver.open(path), block) == [tag(path, block)]
    (request,) = lazy.server.requests
    fields = (request.kind, request.fork, request.spc, request.db, request.rel, request.block)
    assert fields == expected
    assert (request.lsn, request.not_modified_since, request.count) == (MAX_LSN, NOT_MODIFIED_SINCE, 1)
    (hello,) = lazy.server.hellos
    assert (hello.tenant_id, hello.timeline_id, hello.token) == (TENANT, TIMELINE, "token")


def test_present_blocks_are_read_locally(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    for _ in range(2):
        assert driver.read(fd, 10, 5) == tags(PATH, 10, 15)
    assert len(lazy.server.requests) == 1
    present = lazy.arena.present_blocks(PATH)
    assert [block for block, is_present in enumerate(present) if is_present] == list(range(10, 15))
    (miss,) = lazy.arena.misses()
    assert miss == (PATH, 10, 5, 5)


def test_placed_pages_are_never_asked_for(lazy: LazyDirectory) -> None:
    page = NEW.to_bytes(8, "little") * 1024
    assert lazy.arena.place_pages([(PATH, 4, page * 2), ("global/1262", 0, page)]) == 3
    driver = lazy.driver()
    assert driver.read(driver.open(PATH), 4, 2) == [NEW, NEW]
    assert driver.read(driver.open("global/1262"), 0) == [NEW]
    assert not lazy.server.requests
    assert driver.read(driver.open(PATH), 3, 4) == [tag(PATH, 3), NEW, NEW, tag(PATH, 6)]


def test_files_are_made_by_whoever_names_them_first(lazy: LazyDirectory, driver: Driver) -> None:
    on_disk = {path for path in FILES if (lazy.data_dir / path).exists()}
    assert on_disk == {"base/5/4000_init", "pg_xact/0000", "pg_multixact/members/00AB"}
    assert driver.call("access base/5/1001") == "ok 0"
    assert driver.call("size base/5/1002") == "ok 600"
    assert driver.call(f"size {lazy.data_dir}/base/5/3000") == "ok 0"
    assert driver.call("access base/5/9999") == "error ENOENT"
    assert driver.call("open base/5/1000 wcx") == "error EEXIST"
    assert (lazy.data_dir / "base/5/1000").stat().st_blocks == 0
    assert not lazy.server.requests


def test_listings_are_complete_once_ready(lazy: LazyDirectory, driver: Driver) -> None:
    assert driver.call("list base/5") == "ok 1"
    lazy.arena.set_ready()
    assert driver.call("list global/") == "ok 1"
    assert driver.call(f"list {lazy.data_dir}/base/5") == f"ok {sum(p.startswith('base/5/') for p in FILES)}"


def test_unmade_files_can_be_deleted(lazy: LazyDirectory, driver: Driver) -> None:
    assert driver.call(f"unlink {PATH}") == "ok 0"
    assert driver.call(f"unlink {PATH}") == "error ENOENT"
    assert driver.call(f"access {PATH}") == "error ENOENT"
    lazy.arena.set_ready()
    driver.call("list base/5")
    assert not (lazy.data_dir / PATH).exists()
    fd = driver.open(PATH, "wcx")
    assert driver.call(f"allocate {fd} 0 3") == "ok 0"
    assert driver.read(fd, 0, 3) == [0, 0, 0]
    assert not lazy.server.requests


def test_reads_end_where_the_file_ends(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    assert driver.read(fd, 598, 10) == tags(PATH, 598, 600)
    assert driver.call(f"pread {fd} 700 1") == "ok 0"
    assert driver.call(f"size {PATH}") == "ok 600"


def test_every_way_to_read(lazy: LazyDirectory, driver: Driver) -> None:
    read_only = driver.open(PATH, "r")
    copy = int(driver.call(f"dup {read_only}").split()[1])
    assert driver.call(f"close {read_only}") == "ok 0"
    assert driver.read(copy, 333) == [tag(PATH, 333)]
    assert tags_of(driver.call(f"preadv {copy} 20 3")) == tags(PATH, 20, 23)
    assert tags_of(driver.call(f"read {copy} 2")) == tags(PATH, 0, 2)
    assert tags_of(driver.call(f"read {copy} 2")) == tags(PATH, 2, 4)
    assert tags_of(driver.call("stream base/5/1002")) == tags("base/5/1002", 0, 600)
    target = driver.open("base/5/7777", "wc")
    assert driver.call(f"copy {copy} {target} 200") == f"ok {128 * 8192}"
    assert driver.read(target, 0, 128) == tags(PATH, 4, 132)


def test_writes_over_absent_blocks_fetch_nothing(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    assert driver.call(f"pwrite {fd} 10 3 {NEW}") == f"ok {3 * 8192}"
    assert not lazy.server.requests
    assert driver.read(fd, 9, 5) == [tag(PATH, 9), NEW, NEW, NEW, tag(PATH, 13)]


def test_a_partly_written_block_is_fetched_first(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    assert driver.call(f"write_bytes {fd} {8192 * 10 + 4096} 8192 {NEW}") == "ok 8192"
    assert driver.read(fd, 9, 4) == [tag(PATH, 9), -1, -1, tag(PATH, 12)]
    data = (lazy.data_dir / PATH).read_bytes()
    assert data[8192 * 10 : 8192 * 10 + 8] == tag(PATH, 10).to_bytes(8, "little")
    assert data[8192 * 12 - 8 : 8192 * 12] == tag(PATH, 11).to_bytes(8, "little")


def test_truncated_and_new_blocks_are_local(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    assert driver.call(f"ftruncate {fd} 100") == "ok 0"
    assert driver.call(f"allocate {fd} 100 20") == "ok 0"
    assert driver.call(f"pwrite {fd} 119 1 {NEW}") == "ok 8192"
    assert driver.read(fd, 98, 22) == [*tags(PATH, 98, 100), *[0] * 19, NEW]
    assert driver.call("truncate base/5/1001 5") == "ok 0"
    assert driver.call("size base/5/1001") == "ok 5"
    again = driver.open("base/5/1002", "wt")
    assert driver.call("size base/5/1002") == "ok 0"
    assert driver.call(f"pwrite {again} 0 1 {NEW}") == "ok 8192"
    assert driver.read(again, 0, 2) == [NEW]


def test_renamed_files_take_their_pages_along(lazy: LazyDirectory, driver: Driver) -> None:
    assert driver.call("rename global/1262 global/7") == "ok 0"
    assert driver.read(driver.open("global/7"), 0, 3) == tags("global/1262", 0, 3)
    assert driver.call("access global/1262") == "error ENOENT"


@contextlib.contextmanager
def manager(directory: LazyDirectory, answer: bytes) -> Iterator[list[str]]:
    """Gives everybody the same answer; the requests."""
    asked: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.data_dir.parent / "settings.sock"))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        asked.append(connection.recv(1000).decode())
                        connection.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.join()
    (directory.data_dir.parent / "settings.sock").unlink()


def test_a_slot_changes_only_when_that_is_kept(lazy: LazyDirectory, driver: Driver) -> None:
    """Made, changed, dropped; of what is not named yet, and of the proposer's own slot, nobody is asked."""
    slots = lazy.data_dir / "pg_replslot"
    for name in ("new.tmp", "excimer_proposer"):
        (slots / name).mkdir(parents=True)
        (slots / name / "state.tmp").touch()
    ours = "pg_replslot/excimer_proposer"
    assert driver.call(f"rename {ours}/state.tmp {ours}/state") == "ok 0"
    assert driver.call("rename pg_replslot/new.tmp/state.tmp pg_replslot/new.tmp/state") == "ok 0"
    made = "pg_replslot/new.tmp pg_replslot/new"
    assert driver.call(f"rename {made}") == "error EIO", "no manager"
    with manager(lazy, b"failed: it is away") as asked:
        assert driver.call(f"rename {made}") == "error EIO"
    assert asked == [f"slots {made}\n"]
    assert (slots / "new.tmp").exists()
    changed, dropped = (
        "pg_replslot/new/state.tmp pg_replslot/new/state",
        "pg_replslot/new pg_replslot/new.tmp",
    )
    with manager(lazy, b"kept") as asked:
        assert driver.call(f"rename {made}") == "ok 0"
        (slots / "new/state.tmp").touch()
        assert driver.call(f"rename {changed}") == "ok 0"
        assert driver.call(f"rename {dropped}") == "ok 0"
    assert asked == [f"slots {made}\n", f"slots {changed}\n", f"slots {dropped}\n"]
    assert (slots / "new.tmp/state").exists()


def test_a_descriptor_closed_behind_our_back(lazy: LazyDirectory, driver: Driver) -> None:
    """glibc closes descriptors inside fclose(); the number may then name any other file."""
    fd = driver.open(PATH)
    assert driver.call(f"close_behind {fd}") == "ok 0"
    assert driver.call("open_behind other") == f"ok {fd}"
    assert driver.call(f"pwrite {fd} 3 2 {NEW}") == f"ok {2 * 8192}"
    assert driver.read(fd, 3, 2) == [NEW, NEW]
    assert not any(lazy.arena.present_blocks(PATH))
    assert lazy.arena.statistics().stale_descriptors == 1


def test_read_ahead_grows_and_is_shared(lazy: LazyDirectory) -> None:
    lazy.arena.change(lazy.arena.settings._replace(read_ahead_blocks=128))
    readers = [lazy.driver(), lazy.driver()]
    descriptors = [reader.open(PATH) for reader in readers]
    for block in range(600):
        reader = block % 2
        assert readers[reader].read(descriptors[reader], block) == [tag(PATH, block)]
    assert [request.count for request in lazy.server.requests] == [4, 8, 16, 32, 64, 128, 128, 128, 92]
    readers[0].read(readers[0].open("base/5/1001"), 300)
    assert lazy.server.requests[-1].count == 1


def test_two_scans_of_one_file_both_read_ahead(lazy: LazyDirectory) -> None:
    lazy.arena.change(lazy.arena.settings._replace(read_ahead_blocks=64))
    driver = lazy.driver()
    fd = driver.open(PATH)
    for block in range(200):
        assert driver.read(fd, block) == [tag(PATH, block)]
        assert driver.read(fd, 300 + block) == [tag(PATH, 300 + block)]
    assert len(lazy.server.requests) < 20


@pytest.mark.parametrize("reverse", [False, True])
def test_hints_travel_with_the_next_miss(lazy: LazyDirectory, driver: Driver, reverse: bool) -> None:
    lazy.server.behaviour.reverse_batches = reverse
    fd = driver.open(PATH)
    hinted = [50, 51, 70, 90, 400]
    for block in hinted:
        assert driver.call(f"advise {fd} {block} 1") == "ok 0"
    assert not lazy.server.requests
    assert driver.read(fd, 70) == [tag(PATH, 70)]
    asked = sorted((request.block, request.count) for request in lazy.server.requests)
    assert asked == [(50, 2), (70, 1), (90, 1), (400, 1)]
    assert [driver.read(fd, block) for block in hinted] == [[tag(PATH, block)] for block in hinted]
    assert len(lazy.server.requests) == 4
    assert lazy.arena.statistics().hints_fetched == 4


def test_requests_fit_what_the_server_allows(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.server.behaviour.blocks_max = 16
    fd = driver.open(PATH)
    assert driver.read(fd, 100, 50) == tags(PATH, 100, 150)
    assert max(request.count for request in lazy.server.requests) == 16


def test_a_replica_moves_its_lsn(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    lazy.arena.set_lsn(Lsn(777), Lsn(555))
    driver.read(fd, 0)
    request: GetPages = lazy.server.requests[-1]
    assert (request.lsn, request.not_modified_since) == (777, 555)
    assert len(lazy.server.hellos) == 1


def test_a_page_newer_than_the_only_writer_is_another_writers(lazy: LazyDirectory, driver: Driver) -> None:
    """A superseded primary must not mix its pages with its successor's (S1). Block b has LSN b << 32."""
    settings = lazy.arena.settings._replace(not_modified_since=Lsn(40 << 32), read_ahead_blocks=8)
    lazy.arena.change(settings)
    fd = driver.open(PATH)
    assert driver.read(fd, 30) == [tag(PATH, 30)]
    assert driver.call(f"pread {fd} 50 1") == "error EIO"
    wait_until(lambda: any("another one has taken over the timeline" in line for line in driver.errors))
    assert not lazy.arena.present_blocks(PATH)[50]
    assert driver.read(fd, 38, 2) == tags(PATH, 38, 40)
    assert driver.call(f"pread {fd} 39 3") == "error EIO"
    slru = driver.open("pg_xact/0000")
    assert driver.read(slru, 31) == [tag("pg_xact/0000", 31)], "pages of an SLRU have no LSN"
    lazy.arena.change(settings._replace(lsn=Lsn(100 << 32)))
    assert driver.read(fd, 50) == [tag(PATH, 50)], "a replica's pages may be newer"


def test_what_travels_with_a_miss_may_be_our_own_work(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.arena.change(lazy.arena.settings._replace(not_modified_since=Lsn(40 << 32), read_ahead_blocks=32))
    fd = driver.open(PATH)
    for block in range(17, 40):
        assert driver.read(fd, block) == [tag(PATH, block)]
    assert any(lazy.arena.present_blocks(PATH)[41:]), "read ahead went past what is newer"


def test_tenant_change_reconnects(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    driver.read(fd, 0)
    lazy.arena.change(lazy.arena.settings._replace(tenant_id=TenantId("c3" * 16)))
    driver.read(fd, 1)
    assert [hello.tenant_id for hello in lazy.server.hellos] == [TENANT, "c3" * 16]
