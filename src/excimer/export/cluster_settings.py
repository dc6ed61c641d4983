"""The configuration files of an exported cluster: what initdb would write, and what the history needs.

A prepared transaction needs its slot and commit timestamps must go on where they have been kept, or
PostgreSQL refuses to start; both are known from pg_control. Settings of endpoints are not part of a
branch, and do not travel.
"""

from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.basebackup import origins_setting
from excimer.pgformat.control_file import ControlFile

WAL_LEVEL_LOGICAL = 2
"""pg_control's code for wal_level = logical."""
ORIGINS_DEFAULT = 10
"""PostgreSQL's own bound on replication origins."""

DEFAULTS = {
    "max_connections": "100",
    "shared_buffers": "128MB",
    "dynamic_shared_memory_type": "posix",
    "max_wal_size": "1GB",
    "min_wal_size": "80MB",
    "log_timezone": "'UTC'",
    "timezone": "'UTC'",
    "datestyle": "'iso, mdy'",
    "default_text_search_config": "'pg_catalog.english'",
}

QUIET = """
# Subscriptions of a copy would take their publishers' changes away from the branch that goes on. Take
# this out when only the copy is to have them (and ALTER SUBSCRIPTION ... DISABLE those on the branch).
max_logical_replication_workers = 0
"""

HBA = """\
# Written by excimer export: the same as initdb's own default. "trust" lets every user of this machine
# connect as any user of the database. Before anybody else is on the machine, give the superuser a
# password and put scram-sha-256 in the place of trust.
#
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     trust
host    all             all             127.0.0.1/32            trust
host    all             all             ::1/128                 trust
local   replication     all                                     trust
host    replication     all             127.0.0.1/32            trust
host    replication     all             ::1/128                 trust
"""

IDENT = """\
# MAPNAME       SYSTEM-USERNAME         DATABASE-USERNAME
"""


def postgresql_conf(control: ControlFile, lsn: Lsn, *, pg_version: int, origin_count: int) -> str:
    """The text of postgresql.conf; `origin_count` replication origins have progress."""
    settings = dict(DEFAULTS)
    if control.max_prepared_xacts:
        settings["max_prepared_transactions"] = str(control.max_prepared_xacts)
    if control.track_commit_timestamp:
        settings["track_commit_timestamp"] = "on"
    if control.wal_level == WAL_LEVEL_LOGICAL:
        settings["wal_level"] = "logical"
    if origin_count > ORIGINS_DEFAULT:
        settings[origins_setting(pg_version)] = str(origin_count)
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    return (
        f"# Written by excimer export: a branch at {format_lsn(lsn)} as a plain cluster.\n"
        "# What is not here has PostgreSQL's default.\n"
        f"{lines}"
        f"{QUIET}"
    )
