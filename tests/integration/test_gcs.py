"""Google Cloud Storage, spoken with fake-gcs-server behind a gateway (`tests/kit/gcs_server.py`)."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectStoreDeniedError, ObjectStoreError
from excimer.io.object_store_probe import UnusableObjectStoreError, check_object_store
from excimer.io.obstore_object_store import CallLimits, ObstoreObjectStore
from tests.kit.gcs_server import GcsServer, running_gcs_server
from tests.kit.ports import free_port
from tests.kit.storage_oracle import IMPORTED, MAP_KEY
from tests.kit.storage_world import MAIN, START, attach, new_main, put, size_value, storage_context
from tests.kit.store_contract import check_contract, silent_server
from tests.unit.storage.test_timeline import SIZE

URL = "gs://things/of/excimer"
ONCE = CallLimits(request_s=0.3, call_s=0.3, retries_max=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    with running_gcs_server(tmp_path_factory.mktemp("gcs") / "log") as server:
        server.create_bucket("things")
        yield server


def test_it_keeps_the_promises(server: GcsServer, tmp_path: Path) -> None:
    check_contract(lambda url: ObstoreObjectStore(url, server.options()), "gs://things", tmp_path)


def test_the_environment_has_the_credentials(server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    check_object_store(ObstoreObjectStore(URL), URL)


def test_who_may_not_work_there_is_refused(server: GcsServer) -> None:
    stranger = ObstoreObjectStore(URL, server.options(bearer_token="another"))
    with pytest.raises(UnusableObjectStoreError, match=rf"written to {URL}: AuthenticationRequired: [^\n]*$"):
        check_object_store(stranger, URL)
    with pytest.raises(ObjectStoreDeniedError, match=f"everything could not be listed in {URL}: Authen"):
        stranger.list("")
    no_bucket = ObstoreObjectStore("gs://nothing/of", server.options())
    with pytest.raises(UnusableObjectStoreError, match=r"written to gs://nothing/of: [^\n]*not found[^\n]*$"):
        check_object_store(no_bucket, "gs://nothing/of")


def test_a_store_that_is_away_is_an_error_soon(server: GcsServer) -> None:
    nobody_there = server.options(base_url=f"http://127.0.0.1:{free_port()}")
    with silent_server() as endpoint:
        for options in (nobody_there, server.options(base_url=endpoint)):
            with pytest.raises(ObjectStoreError, match=rf"could not be written to {URL}: [^\n]*$"):
                check_object_store(ObstoreObjectStore(URL, options, ONCE), URL)


def test_a_store_that_ignores_the_condition_is_refused(
    server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the emulators do that are made for one writer."""
    monkeypatch.setattr(server.gateway, "ignores_conditions", True)
    with pytest.raises(UnusableObjectStoreError, match=rf"{URL} does not honour create-if-absent"):
        check_object_store(ObstoreObjectStore(URL, server.options()), URL)


def test_a_timeline_outlives_its_owners_disk(server: GcsServer, tmp_path: Path) -> None:
    store = ObstoreObjectStore("gs://things/engine", server.options())

    async def story() -> None:
        async with storage_context(tmp_path / "first", store=store) as context:
            tenant = await attach(context)
            timeline = await tenant.create_timeline(new_main(), IMPORTED)
            put(timeline, [size_value(SIZE, START + 8, 3)])
            await timeline.flush()
            await tenant.close()
        shutil.rmtree(tmp_path / "first")
        async with storage_context(tmp_path / "second", store=store) as context:
            timeline = (await attach(context, generation=2)).timeline(MAIN)
            assert timeline.last_record_lsn == START + 8
            assert timeline.get_value(SIZE, Lsn(START + 8)) == b"\3\0\0\0"
            assert timeline.get_value(MAP_KEY, Lsn(START + 8)) == b"the first map"

    asyncio.run(story())
