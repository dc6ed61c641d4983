"""ALTER SYSTEM is answered when the controller has the setting; the controller's list reaches the file."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.compute import endpoint_record, settings_keeper
from excimer.compute.settings_keeper import KeptSettings, SettingsKeeper, digest_of
from excimer.pgformat.auto_conf import parse_auto_conf, render_auto_conf


class Controller:
    """A list that others change too, and that can fail before or after it stored."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.settings = settings
        self.error: Exception | None = None
        self.delay_s = 0.0

    async def read(self) -> KeptSettings:
        if self.error is not None:
            raise self.error
        return KeptSettings(settings=dict(self.settings))

    async def change(self, to_set: Mapping[str, str], to_unset: list[str]) -> KeptSettings:
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        kept = {} if to_unset == ["*"] else {k: v for k, v in self.settings.items() if k not in to_unset}
        self.settings = kept | dict(to_set)
        return await self.read()


class Compute:
    """A keeper with its data directory and the client's side of its socket."""

    def __init__(self, root: Path, controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data_dir = root / "pgdata"
        self.data_dir.mkdir()
        self.socket = root / "settings.sock"
        self.controller = controller
        self.facts: dict[str, str] = {}
        self.keeper = SettingsKeeper(
            controller,
            self.data_dir,
            controller.settings,
            at_start_only=lambda names: {"max_connections", "port"} & set(names),
            report=self.facts.update,
        )
        self.reloads: list[int] = []
        monkeypatch.setattr("os.kill", lambda pid, number: self.reloads.append(number))

    def start(self) -> None:
        (self.data_dir / "postgresql.auto.conf").write_text(render_auto_conf(self.keeper.starting()))
        self.keeper.started(7)

    def file(self) -> dict[str, str]:
        return parse_auto_conf((self.data_dir / "postgresql.auto.conf").read_text())

    async def alter_system(self, wanted: Mapping[str, str], request: bytes = b"keep\n") -> str:
        new = self.data_dir / "postgresql.auto.conf.tmp"
        new.write_text(render_auto_conf(wanted))
        reader, writer = await asyncio.open_unix_connection(str(self.socket))
        writer.write(request)
        answer = (await reader.read()).decode()
        writer.close()
        assert new.exists() == (answer != "kept")
        return answer


def play(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    story: Callable[[Compute], Awaitable[None]],
) -> None:
    async def main() -> None:
        compute = Compute(tmp_path, Controller(settings), monkeypatch)
        async with compute.keeper.serving(compute.socket):
            compute.start()
            await story(compute)
        assert not compute.socket.exists()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_is_altered_is_the_controllers_before_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(compute: Compute) -> None:
        assert await compute.alter_system({"work_mem": "9MB", "my.x": "it's"}) == "kept"
        assert compute.controller.settings == {"work_mem": "9MB", "my.x": "it's"} == compute.file()
        assert await compute.alter_system({"my.x": "it's", "max_connections": "50"}) == "kept"
        assert compute.controller.settings == {"my.x": "it's", "max_connections": "50"}
        assert compute.facts == {"settings": digest_of(compute.file()), "restart_pending": "max_connections"}
        assert await compute.alter_system({}) == "kept"
        assert compute.controller.settings == {} == compute.file()
        assert compute.facts["restart_pending"] == ""
        assert compute.reloads == [], "a reload is the user's to ask for"

    play(tmp_path, monkeypatch, {}, story)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RefusedError("the controller: fsync belongs to Excimer"), "refused: fsync belongs to Excimer"),
        (RetryableError("the controller is\nnot reachable"), "failed: the setting cannot be kept: the contr"),
    ],
)
def test_what_is_not_kept_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    async def story(compute: Compute) -> None:
        compute.controller.error = error
        answer = await compute.alter_system({"work_mem": "9MB"})
        assert answer.startswith(said)
        assert "\n" not in answer
        assert compute.file() == {"work_mem": "1MB"} == compute.keeper.settings

    play(tmp_path, monkeypatch, {"work_mem": "1MB"}, story)


def test_a_controller_that_hangs_is_waited_for_less_long_than_the_library_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_keeper, "CALL_LIMIT_S", 0.05)

    async def story(compute: Compute) -> None:
        compute.controller.delay_s = 60
        assert (await compute.alter_system({"a.b": "1"})).startswith(
            "failed: the controller did not say in time"
        )

    play(tmp_path, monkeypatch, {}, story)


def test_a_file_that_is_not_understood_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(compute: Compute) -> None:
        (compute.data_dir / "postgresql.auto.conf.tmp").write_text("include 'x'\n???\n")
        reader, writer = await asyncio.open_unix_connection(str(compute.socket))
        writer.write(b"keep\n")
        assert (await reader.read()).startswith(b"refused: line 2 of postgresql.auto.conf")
        writer.close()
        assert await compute.alter_system({"a.b": "1"}, request=b"hello\n") == ""
        assert compute.controller.settings == {}

    play(tmp_path, monkeypatch, {}, story)


def test_a_new_list_of_the_controller_is_put_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(compute: Compute) -> None:
        compute.controller.settings = {"work_mem": "2MB"}
        await compute.keeper.refresh()
        assert compute.file() == {"work_mem": "2MB"}
        assert compute.reloads == [signal.SIGHUP]
        compute.keeper.ended()
        compute.controller.settings = {"work_mem": "3MB"}
        await compute.keeper.refresh()
        assert compute.file() == {"work_mem": "2MB"}, "nobody reads it; the next start lays it anew"
        assert compute.keeper.starting() == {"work_mem": "3MB"}

    play(tmp_path, monkeypatch, {"work_mem": "1MB"}, story)


def test_what_was_started_with_and_is_gone_waits_for_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(compute: Compute) -> None:
        compute.controller.settings = {}
        await compute.keeper.refresh()
        assert compute.facts["restart_pending"] == "max_connections"

    play(tmp_path, monkeypatch, {"max_connections": "50", "work_mem": "1MB"}, story)


def test_a_change_while_postgres_starts_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(compute: Compute) -> None:
        compute.keeper.ended()
        laid = compute.keeper.starting()
        compute.controller.settings = {"work_mem": "2MB"}
        await compute.keeper.refresh()
        assert laid == {"work_mem": "1MB"} == compute.file()
        compute.keeper.started(8)
        assert compute.file() == {"work_mem": "2MB"}
        assert compute.reloads == [signal.SIGHUP]

    play(tmp_path, monkeypatch, {"work_mem": "1MB"}, story)


def test_a_refresh_waits_for_a_controller_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_record, "RETRY_S", 0.01)

    async def story(compute: Compute) -> None:
        compute.controller.error = RetryableError("away")
        refresh = asyncio.create_task(compute.keeper.refresh())
        await asyncio.sleep(0.05)
        compute.controller.error, compute.controller.settings = None, {"a.b": "1"}
        await refresh
        assert compute.file() == {"a.b": "1"}

    play(tmp_path, monkeypatch, {}, story)


def test_alter_system_does_not_undo_what_changed_since_it_read_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend has read {a, b}; then the controller's list becomes {a, c}; then the backend sets d."""

    async def story(compute: Compute) -> None:
        compute.controller.settings = {"x.a": "1", "x.c": "3"}
        await compute.keeper.refresh()
        assert await compute.alter_system({"x.a": "1", "x.b": "2", "x.d": "4"}) == "kept"
        assert compute.controller.settings == {"x.a": "1", "x.c": "3", "x.d": "4"} == compute.file()
        # Read {a, c, d}, and another one takes c away before "reset x.a" is written.
        compute.controller.settings = {"x.a": "1", "x.d": "4"}
        await compute.keeper.refresh()
        assert await compute.alter_system({"x.c": "3", "x.d": "4"}) == "kept"
        assert compute.controller.settings == {"x.d": "4"}

    play(tmp_path, monkeypatch, {"x.a": "1", "x.b": "2"}, story)


def test_without_a_controller_alter_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory whose name is longer than a socket's may be: clients find it from beside it."""
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    monkeypatch.chdir(directory)

    async def main() -> None:
        keeper = SettingsKeeper(None, tmp_path, {}, at_start_only=lambda _: [], report=lambda _: None)
        async with keeper.serving(directory / "settings.sock"):
            reader, writer = await asyncio.open_unix_connection("settings.sock")
            writer.write(b"keep\n")
            assert (await reader.read()).startswith(b"refused: ")
            writer.close()
        await keeper.refresh()

    asyncio.run(asyncio.wait_for(main(), 10))
