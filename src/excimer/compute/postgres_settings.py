"""postgresql.conf of a compute: what durability rests upon, what start-up wants, what the user adds.

Local durability is off on purpose: the data directory is a cache (H2), and a commit is durable
once the safekeepers have it (D1). So everything that would weaken the wait for the proposer is
refused, and everything that only costs local time is switched off. What is fixed goes on the
command line too, where no `ALTER SYSTEM` reaches it.

`synchronous_commit` is the session's and the user's own: `off` (and `local`, which means the same
here) gives up the wait for one's own commits, as PostgreSQL documents it.
"""

from excimer.base.errors import RefusedError
from excimer.pgformat.control_file import ControlFile

PROPOSER_NAME = "excimer_proposer"
"""application_name of the proposer's connection: the one synchronous standby."""

FIXED = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_standby_names": PROPOSER_NAME,
    "wal_log_hints": "off",
    "restart_after_crash": "off",
    "wal_init_zero": "off",
    "wal_recycle": "off",
    "max_slot_wal_keep_size": "-1",
    "unix_socket_permissions": "0700",
    "hot_standby": "on",
}
"""A static endpoint has them as well: if somebody promotes it, its commits must never return."""
OWNED = {
    "config_file",
    "data_directory",
    "hba_file",
    "idle_replication_slot_timeout",
    "include",
    "include_dir",
    "include_if_exists",
    "listen_addresses",
    "port",
    "unix_socket_directories",
}
MINIMUMS = {"max_wal_senders": 2, "max_replication_slots": 1}
"""The proposer's slot, its connection, and one more: a lost connection lingers for a moment."""

DEFAULTS = {
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "shared_buffers": "128MB",
    "max_connections": "100",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] ",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "datestyle": "iso, mdy",
    "default_text_search_config": "pg_catalog.english",
}
"""As initdb would write them, except that dynamic shared memory lies in the data directory: with posix, a
killed postgres leaves its segments in /dev/shm, of which a container has only 64 MB."""


class PostgresSettingError(RefusedError):
    """A setting that the user may not change, or that cannot be written to postgresql.conf."""


def render_postgres_settings(
    *,
    pg_version: int,
    host: str,
    port: int,
    socket_dir: str,
    control: ControlFile,
    user_settings: dict[str, str],
    is_static: bool,
) -> str:
    """The text of postgresql.conf. Raises `PostgresSettingError`.

    The settings copies in `control` bound some from below: a prepared transaction in the history
    needs its slot, and commit timestamps must go on where they have been kept.
    """
    settings = dict(DEFAULTS)
    settings["max_prepared_transactions"] = str(control.max_prepared_xacts)
    settings["track_commit_timestamp"] = "on" if control.track_commit_timestamp else "off"
    if pg_version >= 18:
        settings["io_method"] = "sync"  # a query that waits for an I/O worker's fetch cannot be cancelled
    for name, value in user_settings.items():
        lowered = name.lower()
        _check(lowered, value, pg_version)
        settings[lowered] = value
    settings |= FIXED
    if is_static:
        settings |= _at_least(settings, _history_needs(control))
    else:
        settings |= _at_least(settings, {"max_prepared_transactions": control.max_prepared_xacts})
    settings |= {"listen_addresses": host, "port": str(port), "unix_socket_directories": socket_dir}
    return "".join(f"{name} = {_quote(value)}\n" for name, value in settings.items())


def fixed_arguments() -> list[str]:
    """Options of the postgres program that set what is fixed, above postgresql.auto.conf."""
    return [part for name, value in FIXED.items() for part in ("-c", f"{name}={value}")]


def _check(name: str, value: str, pg_version: int) -> None:
    if name in FIXED or name in OWNED:
        raise PostgresSettingError(f"the setting {name} belongs to Excimer and cannot be changed")
    if name in MINIMUMS and _whole(name, value) < MINIMUMS[name]:
        raise PostgresSettingError(f"{name} must be at least {MINIMUMS[name]}: commits travel that way")
    if name == "io_method" and value.strip().lower() == "io_uring":
        raise PostgresSettingError("io_method = io_uring would bypass page hydration: use worker or sync")
    if not name.replace(".", "").replace("_", "").isalnum():
        raise PostgresSettingError(f"{name!r} is not the name of a PostgreSQL setting")
    if name == "wal_level" and value not in ("replica", "logical"):
        raise PostgresSettingError("wal_level must be replica or logical: the safekeepers read the WAL")
    if "\n" in value or "\0" in value:
        raise PostgresSettingError(f"the value of {name} contains a line break")


def _history_needs(control: ControlFile) -> dict[str, int]:
    """A standby must offer at least what the primary had, or PostgreSQL refuses to open it."""
    return {
        "max_connections": control.max_connections,
        "max_worker_processes": control.max_worker_processes,
        "max_wal_senders": control.max_wal_senders,
        "max_prepared_transactions": control.max_prepared_xacts,
        "max_locks_per_transaction": control.max_locks_per_xact,
    }


def _at_least(settings: dict[str, str], minimums: dict[str, int]) -> dict[str, str]:
    return {
        name: str(max(_whole(name, settings.get(name, "0")), minimum)) for name, minimum in minimums.items()
    }


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise PostgresSettingError(f"{name} must be a whole number, not {value!r}") from None


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
