"""Excimer under faults: an installation whose parts reach each other through links that can be broken."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from excimer.cli.installation import Part, load_installation
from excimer.cli.local_processes import launch_parts, wait_for_parts
from excimer.controller.settings import ControllerSettings
from tests.chaos.clients import Connection
from tests.chaos.faults import (
    BriefStalls,
    BrokenLink,
    Fault,
    FullDisk,
    Kill,
    PidFinder,
    Stall,
    children,
    may_mount,
    small_file_system,
)
from tests.chaos.links import Links, LinkState, running_links
from tests.kit.stack import CommandFailedError, Stack, running_stack

ENDPOINT = "main"
DISK_MIB = 3000
SERVICES = (
    *("safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "controller", "compute-node", "broker"),
)


class ExcimerTarget:
    name = "excimer"

    def __init__(self, stack: Stack, links: Links, disks: dict[str, Path]) -> None:
        self._stack = stack
        self._links = links
        self._disks = disks
        self._controller: Part | None = None

    def start(self) -> None:
        self.recover()
        self._stack.create_main()

    def connect(self) -> Connection:
        return self._stack.connect(ENDPOINT)

    def recover(self) -> None:
        """Starts what is dead; what lives is left alone. Raises what says why it does not start."""
        installation = load_installation(self._stack.directory)
        parts = [
            self._linked_controller(part) if part.name == "controller" else part
            for part in installation.service_parts()
        ]
        launched = launch_parts(installation, parts)
        wait_for_parts(installation, parts, launched, lambda name, seconds: None)

    def recover_endpoint(self) -> None:
        with contextlib.suppress(CommandFailedError):  # its manager may be at it already
            self._stack.text("endpoint", "start", ENDPOINT)

    def _linked_controller(self, part: Part) -> Part:
        """The controller gives everybody the links' addresses."""
        if self._controller is None:
            settings = part.settings
            assert isinstance(settings, ControllerSettings)
            add = self._links.add
            self._controller = Part(
                part.name,
                part.module,
                msgspec.structs.replace(
                    settings,
                    safekeepers=tuple(
                        msgspec.structs.replace(
                            each,
                            proposer_address=add(f"proposer of safekeeper-{each.id}", each.proposer_address),
                            replication_address=add(
                                f"readers of safekeeper-{each.id}", each.replication_address
                            ),
                            http_address=add(f"api of safekeeper-{each.id}", each.http_address),
                        )
                        for each in settings.safekeepers
                    ),
                    pageservers=tuple(
                        msgspec.structs.replace(
                            each,
                            page_service_address=add("pages of pageserver", each.page_service_address),
                            http_address=add("api of pageserver", each.http_address),
                        )
                        for each in settings.pageservers
                    ),
                ),
                part.http_address,
                part.lock_dir,
            )
        return self._controller

    def faults(self) -> list[Fault]:
        processes: dict[str, PidFinder] = {
            **{part: self._pid_of(part) for part in SERVICES},
            "manager": self._pid_of(f"endpoint-{ENDPOINT}"),
            "postmaster": self._postmaster,
            "backend": self._backends,
            "walsender": lambda: self._postgres_children(b"walsender"),
            "checkpointer": lambda: self._postgres_children(b"checkpointer"),
            "redo worker": lambda: children(self._pid("pageserver"), b"postgres"),
            "NATS server": lambda: children(self._pid("broker"), b"nats"),
        }
        found: list[Fault] = [Kill(name, find) for name, find in processes.items()]
        found.append(Kill("supervisor", self._pid_of("supervisor")))
        found += [Stall(name, find) for name, find in processes.items()]
        found += [BriefStalls("backends", self._backends)] * 3
        found += [BrokenLink(self._links, link, state) for link in self._links.names for state in _BROKEN]
        found += [FullDisk(name, path) for name, path in self._disks.items()]
        return found

    def is_fit(self) -> str | None:
        """Checks tables and indexes with PostgreSQL's own tool; what it found, if anything."""
        try:
            self._stack.check_program("pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
        except AssertionError as error:
            return str(error)
        return None

    def logs(self) -> str:
        return self._stack.log_tails()

    def _pid(self, part: str) -> int:
        try:
            record = json.loads((self._stack.directory / "run" / f"{part}.pid").read_text())
        except (OSError, json.JSONDecodeError):
            return -1
        return int(record["pid"])

    def _pid_of(self, part: str) -> PidFinder:
        def find() -> list[int]:
            pid = self._pid(part)
            return [pid] if pid > 0 and Path(f"/proc/{pid}/exe").exists() else []

        return find

    def _postmaster(self) -> list[int]:
        return children(self._pid(f"endpoint-{ENDPOINT}"), b"postgres")

    def _postgres_children(self, kind: bytes) -> list[int]:
        return [pid for postmaster in self._postmaster() for pid in children(postmaster, kind)]

    def _backends(self) -> list[int]:
        return [pid for pid in self._postgres_children(b"postgres: postgres") if _is_client(pid)]


_BROKEN = (LinkState.CUT, LinkState.DEAD)


def _is_client(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"127.0.0.1" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def excimer_target(pg_version: int) -> Iterator[ExcimerTarget]:
    """A whole installation with three safekeepers, on small disks where we may mount them."""
    with contextlib.ExitStack() as contexts:
        stack = contexts.enter_context(running_stack(pg_version, starts=False))
        disks = {}
        if may_mount():
            places = {
                "safekeeper-1": "safekeepers/1",
                "safekeeper-2": "safekeepers/2",
                "pageserver": "pageserver",
                "endpoint": f"endpoints/{ENDPOINT}",
            }
            disks = {
                name: contexts.enter_context(small_file_system(stack.directory / place, DISK_MIB))
                for name, place in places.items()
            }
        links = contexts.enter_context(running_links())
        contexts.callback(stack.stop)
        yield ExcimerTarget(stack, links, disks)
