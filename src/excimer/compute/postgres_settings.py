"""postgresql.conf of a compute: what durability rests upon, what start-up wants, what the user adds.

Local durability is off on purpose: the data directory is a cache (H2), and a commit is durable
once the safekeepers have it (D1). So everything that would weaken the wait for the proposer is
refused, and everything that only costs local time is switched off.
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
    "unix_socket_permissions": "0700",
    "hot_standby": "on",
}
OWNED = {"data_directory", "hba_file", "port", "listen_addresses", "unix_socket_directories", "config_file"}

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
        settings["synchronous_standby_names"] = ""
        settings |= _standby_minimums(settings, control)
    settings |= {"listen_addresses": host, "port": str(port), "unix_socket_directories": socket_dir}
    return "".join(f"{name} = {_quote(value)}\n" for name, value in settings.items())


def _check(name: str, value: str, pg_version: int) -> None:
    if name in FIXED or name in OWNED:
        raise PostgresSettingError(f"the setting {name} belongs to Excimer and cannot be changed")
    if name == "io_method" and value == "io_uring":
        raise PostgresSettingError("io_method = io_uring would bypass page hydration: use worker or sync")
    if not name.replace(".", "").replace("_", "").isalnum():
        raise PostgresSettingError(f"{name!r} is not the name of a PostgreSQL setting")
    if name == "wal_level" and value not in ("replica", "logical"):
        raise PostgresSettingError("wal_level must be replica or logical: the safekeepers read the WAL")
    if "\n" in value or "\0" in value:
        raise PostgresSettingError(f"the value of {name} contains a line break")


def _standby_minimums(settings: dict[str, str], control: ControlFile) -> dict[str, str]:
    """A standby must offer at least what the primary had, or PostgreSQL refuses to open it."""
    minimums = {
        "max_connections": control.max_connections,
        "max_worker_processes": control.max_worker_processes,
        "max_wal_senders": control.max_wal_senders,
        "max_prepared_transactions": control.max_prepared_xacts,
        "max_locks_per_transaction": control.max_locks_per_xact,
    }
    return {name: str(max(int(settings.get(name, "0")), minimum)) for name, minimum in minimums.items()}


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
