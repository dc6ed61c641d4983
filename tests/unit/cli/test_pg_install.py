"""`excimer pg install VERSION --if-lacking`, on which `make run` must not fail."""

import errno

import pytest

from excimer import postgres
from excimer.cli.command_line import run
from excimer.postgres import BuildUnusableError, PostgresMissingError
from excimer.postgres.debian_packages import PackagesUnavailableError


@pytest.mark.parametrize(
    "lack", [PostgresMissingError("none is here"), BuildUnusableError("it needs libz.so.1")], ids=str
)
@pytest.mark.parametrize(
    "failure",
    [PackagesUnavailableError("no network"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["network", "disk"],
)
def test_what_fails_is_a_warning(
    lack: Exception, failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_build(_: int) -> None:
        raise lack

    def install_build(_: int, **__: object) -> None:
        raise failure

    monkeypatch.setattr(postgres, "find_build", find_build)
    monkeypatch.setattr(postgres, "install_build", install_build)
    assert run(["pg", "install", "18", "--if-lacking"]) == 0
    assert f"excimer pg install 18: {failure}" in " ".join(capsys.readouterr().err.split())
    assert run(["pg", "install", "18"]) != 0
