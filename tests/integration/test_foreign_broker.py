"""A light installation, one safekeeper, on a NATS server that somebody else runs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.broker.nats_config import find_nats_server
from tests.kit.builds import NEWEST_VERSION
from tests.kit.ports import free_port
from tests.kit.stack import Stack, running_stack


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    configuration = tmp_path / "nats.conf"
    configuration.write_text(
        f"listen: 127.0.0.1:{port}\nauthorization {{ user: someone, password: 'p%40ss' }}\n"
    )
    server = subprocess.Popen([find_nats_server(), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    yield f"nats://someone:p%2540ss@127.0.0.1:{port}"
    server.terminate()
    server.wait()


def test_a_foreign_broker_serves(nats_url: str) -> None:
    with running_stack(NEWEST_VERSION, safekeepers=1, broker_url=nats_url) as stack:
        assert "broker" not in {row["part"] for row in stack.json("status")["parts"]}
        stack.create_main()
        stack.query("create table t as select generate_series(1, 1000) as a")
        stack.text("endpoint", "stop", "main")
        stack.text("endpoint", "start", "main")
        assert stack.query("select count(*) from t") == [(1000,)], "the pageserver heard of the WAL"


@pytest.mark.parametrize("url", ["http://127.0.0.1:4222", "nats://", "127.0.0.1:4222"])
def test_what_is_no_broker_url_is_refused(url: str, tmp_path: Path) -> None:
    result = Stack(tmp_path, NEWEST_VERSION).run("init", "--broker-url", url)
    assert result.returncode == 1
    assert "is not the URL of a NATS server" in result.stderr
