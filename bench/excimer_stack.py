"""A whole local Excimer, set up and driven by its command line, as the thing to be measured."""

import contextlib
import json
import ssl
import time
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from bench.pgbench import BenchFailedError, Target
from excimer.compute.endpoint_remains import remove_remains
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.stack import Stack, running_stack

ENDPOINT = "main"
SETTLE_LIMIT_S = 300.0


class MeasuredStack:
    """A running installation with one tenant, its branch `main` and the endpoint of that name."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack = stack
        endpoint = stack.endpoint(ENDPOINT)
        self.target = Target(
            name, build_of(stack.pg_version), int(endpoint["postgres_port"]), endpoint["password"]
        )
        self.tenant_id = str(endpoint["tenant_id"])
        self.timeline_id = str(endpoint["timeline_id"])
        settings = tomllib.loads((stack.directory / "run" / "pageserver.toml").read_text())
        token = (stack.directory / "keys" / "admin.token").read_text().strip()
        ca = stack.directory / "tls" / "ca.pem"
        self.pageserver = httpx.Client(
            base_url=f"{'https' if ca.exists() else 'http'}://{settings['http_listen']}/v1",
            headers={"Authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cafile=ca) if ca.exists() else True,
            timeout=120,
        )

    @property
    def timelines_path(self) -> str:
        return f"/tenant/{self.tenant_id}/timeline"

    def timeline(self) -> dict[str, Any]:
        found: dict[str, Any] = self.pageserver.get(f"{self.timelines_path}/{self.timeline_id}").json()
        return found

    def settle(self) -> None:
        """Everything written is in the pageserver's layers, and compaction has nothing left to do."""
        self.target.sql("checkpoint")
        self.pageserver.post(f"{self.timelines_path}/{self.timeline_id}/flush").raise_for_status()
        deadline = time.monotonic() + SETTLE_LIMIT_S
        before, quiet = None, 0
        while quiet < 3:
            time.sleep(1)
            now = self.timeline()["physical_size_bytes"]
            quiet = quiet + 1 if now == before else 0
            before = now
            if time.monotonic() > deadline:
                raise BenchFailedError("the pageserver does not come to rest")

    def configure(self, line: str) -> None:
        """A line of config.toml, for all later starts of endpoints."""
        config = self.stack.directory / "config.toml"
        config.write_text(f"{line}\n{config.read_text()}")

    def stop(self) -> None:
        """The directory that a clean stop keeps is removed: the next start makes a new one."""
        self.stop_keeping()
        remove_remains(self.stack.directory / "endpoints" / ENDPOINT, kept_too=True)

    def stop_keeping(self) -> None:
        self.stack.text("endpoint", "stop", ENDPOINT)

    def start(self) -> None:
        self.stack.text("endpoint", "start", ENDPOINT)

    def restart(self) -> None:
        """The endpoint with a new, empty data directory."""
        self.stop()
        self.start()

    def last_log_entry(self, event: str) -> dict[str, Any]:
        """Of the endpoint's manager."""
        lines = (self.stack.directory / "logs" / f"endpoint-{ENDPOINT}.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        found: dict[str, Any] = [entry for entry in entries if entry["event"] == event][-1]
        return found


@contextlib.contextmanager
def measured_stack(name: str = "excimer", options: Sequence[str] = ()) -> Iterator[MeasuredStack]:
    """Three safekeepers, one pageserver, one compute; all stopped and removed at the end.

    `options` are those of `excimer init`, `name` is how notes call it.
    """
    with running_stack(NEWEST_VERSION, options=options) as stack:
        stack.create_main()
        measured = MeasuredStack(stack, name)
        with measured.pageserver:
            yield measured
