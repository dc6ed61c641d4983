"""A real S3 server for tests: ministack's S3, in a process of its own, on a port of the loopback address.

It honours create-if-absent and knows access keys. Its ASGI app is served by uvicorn without its start-up
hooks, which would open more ports than one.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import botocore.session

from tests.kit.ports import free_port

READY_TIMEOUT_S = 30.0
ACCESS_KEY = "test"
"""The one that ministack knows from the start; the same word is its secret."""


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    process: "subprocess.Popen[bytes]"

    def options(self, **others: str) -> dict[str, str]:
        """What `ObstoreObjectStore` needs besides the URL."""
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": ACCESS_KEY,
            **others,
        }

    def environment(self) -> dict[str, str]:
        """The same for a program."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
        }

    def create_bucket(self, name: str) -> None:
        """With another client than the one under test."""
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=ACCESS_KEY,
        )
        client.create_bucket(Bucket=name)


@contextlib.contextmanager
def running_s3_server(log: Path) -> Iterator[S3Server]:
    """Without buckets; its objects are in memory and go with it."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "uvicorn", "ministack.app:app", "--lifespan", "off"),
                *("--host", "127.0.0.1", "--port", str(port), "--no-access-log", "--log-level", "warning"),
            ],
            env={**os.environ, "AUTH": "true", "GATEWAY_PORT": str(port), "LOG_LEVEL": "ERROR"},
            cwd=log.parent,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_up(process, port, log)
        yield S3Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"the S3 server does not start:\n{log.read_text()}")
