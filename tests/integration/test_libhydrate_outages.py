"""Reads while the page server refuses, hangs, dies, moves or talks nonsense."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.wire.page_service import ErrorCode
from tests.kit.fake_page_server import FakePageServer
from tests.kit.hydrate_driver import Driver, LazyDirectory, tag, tags, wait_until

PATH = "base/5/1000"
SHORT_S = 1.0


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[LazyDirectory]:
    directory = LazyDirectory(tmp_path)
    yield directory
    directory.close()


@pytest.fixture
def driver(lazy: LazyDirectory) -> Driver:
    return lazy.driver()


def set_deadline(lazy: LazyDirectory, deadline_s: float) -> None:
    lazy.arena.change(lazy.arena.settings._replace(deadline_s=deadline_s))


@pytest.mark.parametrize("code", [ErrorCode.REFUSED, ErrorCode.FENCED, ErrorCode.CORRUPTION])
def test_final_errors_fail_at_once(lazy: LazyDirectory, driver: Driver, code: ErrorCode) -> None:
    lazy.server.behaviour.error = (code, "layer 17 is\nbroken")
    fd = driver.open(PATH)
    assert driver.call(f"pread {fd} 5 1") == "error EIO"
    assert len(lazy.server.requests) == 1
    wait_until(lambda: bool(driver.errors))
    assert (
        f"fetching {PATH} blocks 5..5: page server error {code}: layer 17 is broken; refused"
        in (driver.errors[0])
    )
    lazy.server.behaviour.error = None
    assert driver.read(fd, 5) == [tag(PATH, 5)]
    assert lazy.arena.statistics().errors == 1


def test_retryable_errors_are_retried(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.server.behaviour.error, lazy.server.behaviour.errors_left = (ErrorCode.RETRYABLE, "not yet"), 3
    assert driver.read(driver.open(PATH), 5) == [tag(PATH, 5)]
    assert lazy.arena.statistics().retries == 3


@pytest.mark.parametrize("code", [ErrorCode.CORRUPTION, ErrorCode.RETRYABLE])
def test_a_bad_neighbour_does_not_fail_a_read(lazy: LazyDirectory, driver: Driver, code: ErrorCode) -> None:
    lazy.arena.change(lazy.arena.settings._replace(read_ahead_blocks=32, deadline_s=SHORT_S))
    lazy.server.behaviour.error = (code, "bad layer")
    lazy.server.behaviour.error_blocks = frozenset({3, 77})
    fd = driver.open(PATH)
    assert driver.read(fd, 0) == [tag(PATH, 0)]
    assert driver.call(f"advise {fd} 77 1") == "ok 0"
    assert driver.read(fd, 1, 2) == tags(PATH, 1, 3)
    assert driver.call(f"pread {fd} 3 1") == "error EIO"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 64,
        b"\xff" * 64,
        b"\x05\0\0\0z1234",
        b"\x0d\0\0\0g" + b"\0" * 12,
        b"\x0d\0\0\0e" + b"\1" * 12,
        b"\x01\0\0\0e",
        b"\x01\0\0\0g",
        b"\x09\0\0\0h" + b"\0" * 8,
    ],
    ids=lambda garbage: garbage[:6].hex(),
)
def test_garbage_is_an_error_in_the_end(lazy: LazyDirectory, driver: Driver, garbage: bytes) -> None:
    set_deadline(lazy, 0.3)
    lazy.server.behaviour.garbage = garbage
    fd = driver.open(PATH)
    assert driver.call(f"pread {fd} 5 1") == "error EIO"
    lazy.server.behaviour.garbage = None
    assert driver.read(fd, 5) == [tag(PATH, 5)]


@pytest.mark.parametrize("size", [0, 3, 10, 17, 4000, 8192 + 16])
def test_cut_answers_are_asked_for_again(lazy: LazyDirectory, driver: Driver, size: int) -> None:
    set_deadline(lazy, 0.3)
    lazy.server.behaviour.cut_after_bytes = size
    fd = driver.open(PATH)
    assert driver.call(f"pread {fd} 5 2") == "error EIO"
    assert not any(lazy.arena.present_blocks(PATH))
    lazy.server.behaviour.cut_after_bytes = None
    assert driver.read(fd, 5, 2) == tags(PATH, 5, 7)


def test_a_restart_is_outlasted(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    assert driver.read(fd, 0) == [tag(PATH, 0)]
    port = lazy.server.port
    lazy.server.close()
    driver.begin(f"pread {fd} 5 1")
    time.sleep(1.3)
    lazy.server = FakePageServer(lazy.pages_dir, port)
    assert driver.answer() == f"ok 8192 {tag(PATH, 5)}"
    wait_until(lambda: len(driver.errors) == 2)
    assert "Connection refused; still trying after" in driver.errors[0]
    assert f"fetching {PATH} has succeeded" in driver.errors[1]


def test_the_deadline_ends_a_read(lazy: LazyDirectory, driver: Driver) -> None:
    set_deadline(lazy, SHORT_S)
    lazy.server.behaviour.hang = True
    fd, start = driver.open(PATH), time.monotonic()
    assert driver.call(f"pread {fd} 5 1") == "error EIO"
    assert SHORT_S <= time.monotonic() - start < SHORT_S + 1.0
    wait_until(lambda: any("the deadline has passed" in line for line in driver.errors))


def test_the_deadline_counts_waiting_for_another_reader(lazy: LazyDirectory) -> None:
    """Ten readers of one block are not failed one after the other."""
    set_deadline(lazy, SHORT_S)
    lazy.server.behaviour.hang = True
    drivers = [lazy.driver() for _ in range(4)]
    descriptors = [driver.open(PATH) for driver in drivers]
    start = time.monotonic()
    for driver, fd in zip(drivers, descriptors, strict=True):
        driver.begin(f"pread {fd} 5 1")
    assert [driver.answer() for driver in drivers] == ["error EIO"] * 4
    assert time.monotonic() - start < 2 * SHORT_S


@pytest.mark.parametrize("outage", ["hang", "dead"])
def test_a_cancelled_query_gets_out(lazy: LazyDirectory, outage: str) -> None:
    """Both who fetches and who waits for it; other signals disturb neither."""
    drivers = [lazy.driver(), lazy.driver()]
    descriptors = [driver.open(PATH) for driver in drivers]
    if outage == "hang":
        lazy.server.behaviour.hang = True
    else:
        lazy.server.close()
    for driver, fd in zip(drivers, descriptors, strict=True):
        driver.begin(f"pread {fd} 5 1")
    wait_until(lambda: lazy.arena.statistics().claim_waits == 1)
    for _ in range(100):
        for driver in drivers:
            driver.signal(signal.SIGUSR1)
        time.sleep(0.002)
    start = time.monotonic()
    for driver in drivers:
        driver.signal(signal.SIGINT)
    assert [driver.answer() for driver in drivers] == ["error EIO"] * 2
    assert 0.4 < time.monotonic() - start < 1.5
    wait_until(lambda: all(any("the query was cancelled" in e for e in d.errors) for d in drivers))
    assert lazy.arena.statistics().cancelled == 2


def test_signals_do_not_disturb_a_slow_fetch(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.server.behaviour.delay_s = 0.5
    fd = driver.open(PATH)
    driver.begin(f"pread {fd} 5 100")
    for _ in range(100):
        driver.signal(signal.SIGUSR1)
        time.sleep(0.002)
    assert driver.answer() == f"ok {100 * 8192} " + " ".join(map(str, tags(PATH, 5, 105)))


def test_a_cancelled_query_with_a_healthy_server_reads_on(lazy: LazyDirectory, driver: Driver) -> None:
    """PostgreSQL then reports the cancellation itself, as one."""
    driver.call("cancel_flag 1")
    assert driver.read(driver.open(PATH), 5) == [tag(PATH, 5)]


def test_a_critical_section_is_not_cancelled(lazy: LazyDirectory, driver: Driver) -> None:
    """An error there would be a PANIC."""
    driver.call("critical 1")
    lazy.server.behaviour.hang = True
    fd = driver.open(PATH)
    driver.begin(f"pread {fd} 5 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    driver.signal(signal.SIGINT)
    time.sleep(1.0)
    lazy.server.behaviour.hang = False
    assert driver.answer() == f"ok 8192 {tag(PATH, 5)}"


def test_a_hanging_read_follows_a_move(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.server.behaviour.hang = True
    fd = driver.open(PATH)
    driver.begin(f"pread {fd} 5 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    with FakePageServer(lazy.pages_dir) as other:
        start = time.monotonic()
        lazy.arena.set_pageserver(f"localhost:{other.port}")
        assert driver.answer() == f"ok 8192 {tag(PATH, 5)}"
        assert time.monotonic() - start < 1.0
        assert len(other.requests) == 1


def test_a_wrong_token_is_refused_until_it_is_changed(lazy: LazyDirectory, driver: Driver) -> None:
    lazy.server.behaviour.token = "right"
    fd = driver.open(PATH)
    assert driver.call(f"pread {fd} 5 1") == "error EIO"
    wait_until(lambda: any("wrong token" in line for line in driver.errors))
    lazy.arena.set_token("right")
    assert driver.read(fd, 5) == [tag(PATH, 5)]


def test_a_full_disk_is_said_so(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    limited = lazy.driver(file_size_max=10 * 8192)
    other = limited.open(PATH)
    assert limited.read(other, 5) == [tag(PATH, 5)]
    assert limited.call(f"pread {other} 20 1") == "error EFBIG"
    wait_until(lambda: any("writing the local file: File too large" in line for line in limited.errors))
    assert not lazy.arena.present_blocks(PATH)[20]
    assert driver.read(fd, 20) == [tag(PATH, 20)]
