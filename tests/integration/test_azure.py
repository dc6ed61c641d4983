"""Azure Blob Storage, spoken with Microsoft's emulator: the store itself, and an installation on it."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.object_store import ObjectStoreDeniedError, ObjectStoreError
from excimer.io.object_store_probe import UnusableObjectStoreError, check_object_store
from excimer.io.obstore_object_store import CallLimits, ObstoreObjectStore
from tests.kit.azure_server import AzureServer, running_azure_server
from tests.kit.builds import NEWEST_VERSION
from tests.kit.ports import free_port
from tests.kit.stack import Stack, running_stack
from tests.kit.store_contract import check_contract, silent_server

URL = "az://things/of/excimer"
ONCE = CallLimits(request_s=0.3, call_s=0.3, retries_max=0)
OTHER_KEY = base64.b64encode(b"somebody else's").decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with running_azure_server(tmp_path_factory.mktemp("azure") / "log") as server:
        server.create_container("things")
        yield server


def test_it_keeps_the_promises(server: AzureServer, tmp_path: Path) -> None:
    check_contract(lambda url: ObstoreObjectStore(url, server.options()), "az://things", tmp_path)


def test_the_environment_has_the_credentials(server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    check_object_store(ObstoreObjectStore(URL), URL)


@pytest.mark.parametrize(
    ("url", "options", "code"),
    [
        (URL, {"account_key": OTHER_KEY}, "AuthorizationFailure"),
        (URL, {"account_name": "nobody"}, "AuthorizationFailure"),
        ("az://nothing/of", {}, "ContainerNotFound"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_who_may_not_work_there_is_refused(
    server: AzureServer, url: str, options: dict[str, str], code: str
) -> None:
    store = ObstoreObjectStore(url, server.options(**options))
    with pytest.raises(UnusableObjectStoreError, match=rf"{url}: {code}: [^\n]*\.$"):
        check_object_store(store, url)
    with pytest.raises(ObjectStoreDeniedError, match=f"everything could not be listed in {url}: {code}"):
        store.list("")


def test_a_store_that_is_away_is_an_error_soon(server: AzureServer) -> None:
    nobody_there = server.options(endpoint=f"http://127.0.0.1:{free_port()}")
    with silent_server() as endpoint:
        for options in (nobody_there, server.options(endpoint=endpoint)):
            with pytest.raises(ObjectStoreError, match=rf"could not be written to {URL}: [^\n]*$"):
                check_object_store(ObstoreObjectStore(URL, options, ONCE), URL)


def store_options(server: AzureServer, url: str, **others: str) -> list[str]:
    options = server.options(**others).items()
    words = [("--object-store-option", f"{key}={value}") for key, value in options]
    return ["--object-store", url, *(word for pair in words for word in pair)]


@pytest.mark.slow
def test_an_installation_outlives_its_pageservers_disk(server: AzureServer) -> None:
    url = "az://things/installation"
    sums = "select count(*), sum(hashtext(v)) from things"
    with running_stack(NEWEST_VERSION, safekeepers=1, options=store_options(server, url)) as stack:
        stack.create_main()
        stack.query("create table things as select g, md5(g::text) v from generate_series(1, 20000) g")
        stack.query("delete from things where g % 3 = 0")
        expected = stack.query(sums)
        stack.text("stop")
        store = ObstoreObjectStore(url, server.options())
        assert store.list("tenants")
        shutil.rmtree(stack.directory / "pageserver")
        stack.text("start")
        stack.wait_until(lambda: stack.run("endpoint", "start", "main").returncode == 0, "main starts")
        assert stack.query(sums) == expected
        stack.query("insert into things values (0, 'more')")
        assert stack.query("select v from things where g = 0") == [("more",)]
        check_leftovers_go(stack, store)


def check_leftovers_go(stack: Stack, store: ObstoreObjectStore) -> None:
    """A layer of the pageserver's own generation that no manifest names, as a crash leaves them."""
    stack.text("stop")  # which flushes
    layers = [info.name for info in store.list("tenants") if "/layers/" in info.name]
    layer = max(layers, key=lambda name: name.rsplit("-", 2)[1])  # of the newest generation
    leftover = layer[:-8] + "00c0ffee"
    store.copy(layer, leftover)
    stack.text("start")
    stack.wait_until(lambda: store.size_bytes(leftover) is None, "the leftover goes")
    assert store.size_bytes(layer) is not None


def test_init_says_what_is_wrong(server: AzureServer, tmp_path: Path) -> None:
    stack = Stack(tmp_path, NEWEST_VERSION)
    wrong = {
        "ContainerNotFound: The specified container does not exist.": store_options(server, "az://nothing/"),
        "AuthorizationFailure": store_options(server, URL, account_key=OTHER_KEY),
        "cannot be opened": store_options(server, URL, account_key="no key"),
    }
    for complaint, options in wrong.items():
        result = stack.run("init", *options)
        assert result.returncode in (1, 2, 4), result
        assert complaint in result.stderr
        assert len(result.stderr.splitlines()) < 8
        assert not stack.directory.exists()
