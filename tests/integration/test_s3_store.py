"""`ObstoreObjectStore` against a real S3 server, and against one behind a network that breaks things."""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from excimer.io.object_store import (
    ObjectStoreDeniedError,
    ObjectStoreError,
)
from excimer.io.object_store_probe import UnusableObjectStoreError, check_object_store
from excimer.io.obstore_object_store import PART_SIZE_BYTES, CallLimits, ObstoreObjectStore
from tests.kit.faulty_proxy import Fault, FaultyProxy, running_proxy
from tests.kit.ports import free_port
from tests.kit.s3_server import S3Server, running_s3_server
from tests.kit.store_contract import check_contract, silent_server

T = TypeVar("T")

URL = "s3://things/of/excimer"
ONCE = CallLimits(request_s=0.5, retries_max=0)
PATIENT = CallLimits(request_s=0.5, retries_max=5, pause_s_first=0.001, pause_s_max=0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        server.create_bucket("things")
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with running_proxy(server.endpoint) as proxy:
        yield proxy


def behind(proxy: FaultyProxy, server: S3Server, limits: CallLimits) -> ObstoreObjectStore:
    return ObstoreObjectStore(URL, server.options(endpoint=proxy.endpoint), limits)


def test_it_keeps_the_promises(server: S3Server, tmp_path: Path) -> None:
    check_contract(lambda url: ObstoreObjectStore(url, server.options()), "s3://things", tmp_path)


def test_the_environment_has_the_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    check_object_store(ObstoreObjectStore(URL), URL)


def test_what_is_wrong_is_said_quickly(server: S3Server, proxy: FaultyProxy) -> None:
    """A refusal is not asked for twice."""
    through_proxy = server.options(endpoint=proxy.endpoint)
    wrong_key = ObstoreObjectStore(URL, through_proxy | {"access_key_id": "nobody"})
    with pytest.raises(UnusableObjectStoreError, match=f"{URL}.*InvalidAccessKeyId"):
        check_object_store(wrong_key, URL)
    assert len(proxy.requests) == 1
    no_bucket = ObstoreObjectStore("s3://nothing", through_proxy)
    with pytest.raises(UnusableObjectStoreError, match=r"s3://nothing.*NoSuchBucket"):
        check_object_store(no_bucket, "s3://nothing")
    with pytest.raises(ObjectStoreDeniedError, match="NoSuchBucket"):
        no_bucket.list("")
    assert len(proxy.requests) == 3
    closed_port = server.options(endpoint=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ObjectStoreError, match=URL):
        check_object_store(ObstoreObjectStore(URL, closed_port, PATIENT), URL)
    with silent_server() as endpoint:  # it takes the connection and says nothing
        silent = ObstoreObjectStore(
            URL, server.options(endpoint=endpoint), CallLimits(request_s=0.3, call_s=0.3)
        )
        with pytest.raises(ObjectStoreError, match=URL):
            check_object_store(silent, URL)


def test_a_store_that_ignores_the_condition_is_refused(server: S3Server, proxy: FaultyProxy) -> None:
    proxy.drops_conditions = True
    with pytest.raises(UnusableObjectStoreError, match="create-if-absent"):
        check_object_store(behind(proxy, server, PATIENT), URL)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_is_an_error_and_never_other_bytes(
    server: S3Server, proxy: FaultyProxy, fault: Fault, tmp_path: Path
) -> None:
    """Without retries. Of an answer that says it is whole only a range's length tells that it is not."""
    store, unhurt = behind(proxy, server, ONCE), ObstoreObjectStore(URL, server.options())
    (tmp_path / "file").write_bytes(b"0123456789" * 100)
    unhurt.put_file("whole", tmp_path / "file")
    proxy.choose = lambda method, path: fault
    with pytest.raises(ObjectStoreError):
        store.get_range("whole", 100, 900)
    if fault is not Fault.SHORT:
        for read in (lambda: store.get("whole"), lambda: store.list("")):
            with pytest.raises(ObjectStoreError):
                read()
    if fault not in (Fault.SHORT, Fault.TRUNCATED):  # whose answer has no body to be hurt
        with pytest.raises(ObjectStoreError):
            store.put("new", b"content")
    proxy.wait_idle()
    assert unhurt.get("whole") == b"0123456789" * 100
    assert (unhurt.size_bytes("new") is not None) == (fault in (Fault.LOST_ANSWER, Fault.SLOW))
    unhurt.delete_many(["whole", "new"])


def test_calls_get_through_a_bad_network(server: S3Server, proxy: FaultyProxy, tmp_path: Path) -> None:
    """A third of all requests fail; what is answered is right."""
    chance = random.Random(4)
    faults = [fault for fault in Fault if fault not in (Fault.SLOW, Fault.SHORT)]
    proxy.choose = lambda method, path: chance.choice(faults) if chance.random() < 0.33 else None
    store = behind(proxy, server, PATIENT)
    content = chance.randbytes(PART_SIZE_BYTES + 99)
    (tmp_path / "layer").write_bytes(content)
    names = [f"bad/{number}" for number in range(10)]
    for name in names:
        again(partial(store.put_file, name, tmp_path / "layer"))
        start = chance.randrange(len(content) - 1000)
        assert again(partial(store.get_range, name, start, start + 1000)) == content[start : start + 1000]
    assert [info.name for info in again(partial(store.list, "bad"))] == names
    again(partial(store.delete_many, names))
    proxy.choose = lambda method, path: None
    assert store.list("bad") == []
    assert sum(fault is not None for _, _, fault in proxy.requests) > 10


def again(call: Callable[[], T]) -> T:
    """Until it is answered, ten times at most."""
    for _ in range(9):
        with suppress(ObjectStoreError):
            return call()
    return call()
