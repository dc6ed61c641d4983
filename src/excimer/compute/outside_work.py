"""What a compute may do on the outside by itself: apply subscriptions, run extensions' background workers.

A branch's catalogs are its parent's. If both applied the parent's subscription, its publisher would send
each change to only one of them, and throw it away. So a new branch is quiet: its subscriptions are
disabled before the launcher of logical replication looks at them, and background workers of extensions
(a scheduler of jobs, say) are not started.

Disabled they are once, in the catalog, so that who enables one again on the branch is obeyed. The same
transaction leaves a replication origin, named after the quieting, by which every later start sees that it
was done::

    postgres starts, launcher waits -> is the mark there? --yes----------------------------> gate opens
                                              '--no--> disable and leave the mark, durably --'

A compute that dies before the commit is on a quorum finds no mark at its next start, and the launcher
waiting again: the gate is a file in the data directory, which is thrown away (H2).

Not here: which branches are quiet (`excimer.controller`), what waits (`csrc/endpoint/background_work.c`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from excimer.compute.proposer import PostgresAddress
from excimer.compute.start_session import connect_at_start
from excimer.postgres import PostgresBuild
from excimer.postgres.library_lists import split_libraries
from excimer.postgres.setting_rules import PostgresSettingError

GATE: Final = "excimer_subscriptions_may_start"
"""Same as in csrc/endpoint/background_work.c."""
PRELOAD: Final = "shared_preload_libraries"
PRELOADED: Final = ("pg_stat_statements",)
"""What people expect of a server that somebody runs for them."""

_SAFE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_$/.-")


class OutsideWork(NamedTuple):
    """What a branch's computes do by themselves."""

    quieting_id: str | None
    """Under this id inherited subscriptions are disabled, once; None: the branch goes on with what it has."""
    runs_extension_workers: bool


def mark_name(quieting_id: str) -> str:
    """The replication origin that says: done."""
    return f"excimer_quiet_{quieting_id}"


async def disable_inherited_subscriptions(address: PostgresAddress, quieting_id: str) -> bool:
    """Returns when what is inherited is disabled for good, on a quorum: True if it was done just now.

    Raises PostgresError, `ReplicationLostError`.
    """
    if not quieting_id.isalnum():
        raise PostgresSettingError(f"{quieting_id!r} is not an id")
    mark = mark_name(quieting_id)
    client = await connect_at_start(address)
    try:
        known = await client.query(
            f"SELECT 1 FROM pg_catalog.pg_replication_origin WHERE roname OPERATOR(pg_catalog.=) '{mark}'"
        )
        if known:
            return False
        # One message, so one transaction. DISABLE would have to be said in each subscription's database.
        await client.query(
            "UPDATE pg_catalog.pg_subscription SET subenabled = false WHERE subenabled; "
            f"SELECT pg_catalog.pg_replication_origin_create('{mark}')"
        )
        return True
    finally:
        client.close()


def module_arguments(
    module: Path,
    preloaded: list[str],
    work: OutsideWork,
    *,
    is_standby: bool,
    extension_hint: str,
    admission_file: Path,
    hot_buffers_file: Path,
) -> list[str]:
    """Options of the postgres program that preload `module`, after `preloaded`, and say what it is to hold.

    A static endpoint never applies subscriptions, even if somebody promotes it.
    """
    waits = is_standby or work.quieting_id is not None
    settings = {
        PRELOAD: ", ".join(map(_quote, [*preloaded, str(module)])),
        "excimer.subscriptions_wait": "on" if waits else "off",
        "excimer.extension_workers": "on" if work.runs_extension_workers else "off",
        "excimer.extension_hint": extension_hint,
        "excimer.admission_file": str(admission_file),
        "excimer.hot_buffers_file": str(hot_buffers_file),
    }
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def preloaded_libraries(build: PostgresBuild, settings: Mapping[str, str]) -> list[str]:
    """What the endpoint's own list wants, and pg_stat_statements where the build has it."""
    wanted = split_libraries(PRELOAD, settings.get(PRELOAD, ""))
    offered = [name for name in PRELOADED if name in build.features.extensions and name not in wanted]
    return [*wanted, *offered]


def _quote(name: str) -> str:
    return name if set(name) <= _SAFE else '"' + name.replace('"', '""') + '"'
