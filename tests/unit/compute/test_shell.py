"""The manager when something breaks that nobody expected: it ends and says what, and does not hang."""

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.base.lsn import Lsn
from excimer.compute import attempt
from excimer.compute.attempt import Attempt
from excimer.compute.cache_bound import CacheBound
from excimer.compute.core import EXIT_REFUSED, AttemptEnd, Exit, StartFailed
from excimer.compute.endpoint_directory import EndpointDirectory
from excimer.compute.outside_work import OutsideWork
from excimer.compute.places import locate_places
from excimer.compute.postgres_process import PostgresStartError
from excimer.compute.settings import ComputeSettings
from excimer.compute.settings_keeper import SettingsKeeper
from excimer.compute.shell import Manager
from excimer.compute.spec import ComputeSpec
from excimer.compute.token_renewal import TokenRenewal
from excimer.service.health import Health
from excimer.wire.endpoint_tokens import EndpointTokens

LIMIT_S = 30.0
TENANT, TIMELINE = "11" * 16, "22" * 16
TOKENS = EndpointTokens(read_pages="p", write_wal="w", renewal="r", valid_for_s=600.0)


class UnforeseenError(Exception):
    """No error that any part of the manager knows."""


def make_manager(directory: Path) -> Manager:
    """Of an endpoint whose attempts a test replaces: nothing that it names is ever looked at."""
    settings = ComputeSettings(
        endpoint_name="e",
        endpoint_dir=directory,
        tenant_id=TENANT,
        timeline_id=TIMELINE,
        pg_version=18,
        postgres_listen="127.0.0.1:1",
        http_listen="127.0.0.1:1",
        pageserver_address="127.0.0.1:1",
        controller_address="127.0.0.1:1",
    )
    places = locate_places(directory)
    places.settings_socket.parent.mkdir(parents=True, exist_ok=True)
    spec = ComputeSpec(
        endpoint_name="e",
        tenant_id=parse_tenant_id(TENANT),
        timeline_id=parse_timeline_id(TIMELINE),
        mode="primary",
        static_lsn=None,
        build=cast(Any, SimpleNamespace(version=18)),
        module=directory,
        host="127.0.0.1",
        port=1,
        trusts_local=False,
        certificate=None,
        pageserver_address="127.0.0.1:1",
        pageserver_http_address="",
        lease_holder="",
        safekeepers=[],
        wal_sources=[],
        branch_start_lsn=Lsn(0),
        outside_work=OutsideWork(None, True),
        places=places,
        cache=CacheBound(0),
        prefetch_bytes_max=0,
        lag_bytes_max=0,
    )
    return Manager(spec, settings, TOKENS, Health("compute"))


@contextlib.asynccontextmanager
async def no_settings_door(_: Path) -> Any:
    yield


def run_to_its_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Exit:
    async def run() -> Exit:
        manager = make_manager(directory)
        running = asyncio.ensure_future(manager.run())
        await asyncio.wait([running], timeout=LIMIT_S)
        assert running.done(), "it hangs"  # `wait_for` would cancel it, and that might free it
        return await running

    monkeypatch.setattr(SettingsKeeper, "serving", lambda *_: no_settings_door(directory))
    return asyncio.run(run())


async def never_renew(_: TokenRenewal) -> None:
    await asyncio.Event().wait()


def test_an_attempt_that_breaks_unforeseen_ends_the_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_off(_: Attempt) -> AttemptEnd:
        await asyncio.sleep(0)
        raise UnforeseenError("a part of another build")

    monkeypatch.setattr(Attempt, "run", break_off)
    monkeypatch.setattr(TokenRenewal, "run", never_renew)
    with pytest.raises(UnforeseenError, match="another build"):
        run_to_its_end(tmp_path, monkeypatch)


def test_so_does_whatever_else_breaks_while_an_attempt_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_: Attempt) -> AttemptEnd:
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    async def break_off(_: TokenRenewal) -> None:
        await asyncio.sleep(0.05)
        raise UnforeseenError("a token")

    monkeypatch.setattr(Attempt, "run", serve)
    monkeypatch.setattr(TokenRenewal, "run", break_off)
    with pytest.raises(UnforeseenError, match="a token"):
        run_to_its_end(tmp_path, monkeypatch)


@pytest.mark.parametrize("refused", ["the removal", "the kill"])
def test_a_directory_that_cannot_be_cleaned_up_ends_no_manager(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt begins with the same; only what the attempt itself came to counts."""

    async def run(_: Attempt, __: object) -> AttemptEnd:
        return StartFailed("no PostgreSQL", may_retry=False)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("read-only file system")

    async def cannot_kill(_: Path) -> None:
        raise PostgresStartError("processes cannot be killed")

    monkeypatch.setattr(Attempt, "_run", run)
    monkeypatch.setattr(TokenRenewal, "run", never_renew)
    if refused == "the removal":
        monkeypatch.setattr(EndpointDirectory, "finish", refuse)
    else:
        monkeypatch.setattr(attempt, "kill_left_behind", cannot_kill)
        monkeypatch.setattr(EndpointDirectory, "finish", lambda *_, **__: pytest.fail("somebody may write"))
    assert run_to_its_end(tmp_path, monkeypatch) == Exit(EXIT_REFUSED, "no PostgreSQL")
