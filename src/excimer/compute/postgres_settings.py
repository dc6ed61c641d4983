"""postgresql.conf of a compute: what durability rests upon, and what start-up wants.

Local durability is off on purpose: the data directory is a cache (H2), and a commit is durable
once the safekeepers have it (D1). So everything that would weaken the wait for the proposer is
refused (`excimer.postgres.setting_rules`), and everything that only costs local time is switched off.
What is fixed goes on the command line, where no `ALTER SYSTEM` reaches it, and nowhere else: a base backup
has the file in it, and plain PostgreSQL starts on that with its own durability and waits for no proposer.

`synchronous_commit` is the session's and the user's own: `off` (and `local`, which means the same
here) gives up the wait for one's own commits, as PostgreSQL documents it.
"""

from collections.abc import Mapping

from excimer.compute.server_certificate import CertificateFiles
from excimer.pgformat.auto_conf import render_settings
from excimer.pgformat.control_file import ControlFile
from excimer.postgres.setting_rules import whole_number

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
DEFAULTS = {
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    "wal_writer_delay": "20ms",
    "max_connections": "100",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] ",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "datestyle": "iso, mdy",
    "default_text_search_config": "pg_catalog.english",
}
"""As initdb would write them, except that local WAL is kept small, because the quorum has it, and is passed
on soon even if nobody commits, and that dynamic shared memory lies in the data directory: with posix, a
killed postgres leaves its segments in /dev/shm, of which a container has only 64 MB."""


REPLICA_DEFAULTS = {
    "hot_standby_feedback": "on",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "200ms",
}
"""What a replica needs is heard of by its primary soon, as is how far it is by whoever asks."""


def render_postgres_settings(
    *,
    pg_version: int,
    control: ControlFile,
    origins: Mapping[str, int],
    is_standby: bool,
    is_replica: bool = False,
    shared_buffers_mib: int | None = None,
) -> str:
    """The text of postgresql.conf, upon which the endpoint's own list lies in postgresql.auto.conf.

    `origins` names the setting that bounds how many replication origins have progress, and how many do.
    `shared_buffers_mib` None: the usual.
    """
    settings = DEFAULTS | (REPLICA_DEFAULTS if is_replica else {})
    if shared_buffers_mib is not None:
        settings["shared_buffers"] = f"{shared_buffers_mib}MB"
    settings["max_prepared_transactions"] = str(control.max_prepared_xacts)
    settings["track_commit_timestamp"] = "on" if control.track_commit_timestamp else "off"
    if pg_version >= 18:
        settings["io_method"] = "sync"  # a query that waits for an I/O worker's fetch cannot be cancelled
        settings["max_active_replication_origins"] = "10"  # PostgreSQL's own default
    settings |= _at_least(settings, _history_needs(control, origins, is_standby=is_standby))
    return render_settings(settings)


def fixed_arguments(
    control: ControlFile,
    user_settings: Mapping[str, str],
    *,
    origins: Mapping[str, int],
    is_standby: bool,
) -> list[str]:
    """Options of the postgres program that set what is fixed, above postgresql.auto.conf.

    So too where the endpoint's own list offers less than the history in `control` needs: a prepared
    transaction needs its slot. Raises `PostgresSettingError`.
    """
    names = _history_needs(control, origins, is_standby=True)
    given = {name: user_settings[name] for name in names if name in user_settings}
    needed = _at_least(given, _history_needs(control, origins, is_standby=is_standby))
    raised = {name: value for name, value in needed.items() if name in given and value != given[name]}
    return _arguments(FIXED | raised)


def access_arguments(
    *, host: str, port: int, socket_dir: str, data_dir: str, certificate: CertificateFiles | None
) -> list[str]:
    """Options that say where clients connect and by which rules, above postgresql.auto.conf as well.

    `certificate`: PostgreSQL's own copies; None: clients are not offered TLS.
    """
    access = {
        "listen_addresses": host,
        "port": str(port),
        "unix_socket_directories": socket_dir,
        "hba_file": f"{data_dir}/pg_hba.conf",
        "ident_file": f"{data_dir}/pg_ident.conf",
        "ssl": "off" if certificate is None else "on",
    }
    if certificate is not None:
        files = {"ssl_cert_file": str(certificate.certificate), "ssl_key_file": str(certificate.key)}
        access |= files | {"ssl_ca_file": ""}
    return _arguments(access)


def _arguments(settings: Mapping[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def _history_needs(control: ControlFile, origins: Mapping[str, int], *, is_standby: bool) -> dict[str, int]:
    """A standby must offer at least what the primary had, or PostgreSQL refuses to open it.

    With less room than there are replication origins it refuses to start at all.
    """
    needs = {"max_prepared_transactions": control.max_prepared_xacts, **origins}
    if is_standby:
        needs |= {
            "max_connections": control.max_connections,
            "max_worker_processes": control.max_worker_processes,
            "max_wal_senders": control.max_wal_senders,
            "max_locks_per_transaction": control.max_locks_per_xact,
        }
    return needs


def _at_least(settings: Mapping[str, str], minimums: Mapping[str, int]) -> dict[str, str]:
    """The values of `minimums`' names, where `settings` has less than that; else as they are."""
    raised = {}
    for name, minimum in minimums.items():
        value = settings.get(name, "0")
        raised[name] = value if whole_number(name, value) >= minimum else str(minimum)
    return raised
