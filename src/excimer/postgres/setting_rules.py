"""Which PostgreSQL settings an endpoint's user may choose, and why not the others. No I/O.

An endpoint's directory is a cache (H2), its commits wait for the safekeepers (D1), and its address is the
controller's. What would weaken that, or would silently do nothing here, is refused with its reason.

Not here: whether PostgreSQL knows a setting and understands its value (`setting_check`).
"""

import re
from collections.abc import Mapping
from typing import Final

from excimer.base.errors import RefusedError

SETTINGS_MAX: Final = 500
VALUE_SIZE_MAX: Final = 16 * 1024
MINIMUMS: Final = {"max_wal_senders": 2, "max_replication_slots": 1}
"""The proposer's slot, its connection, and one more: a lost connection lingers for a moment."""

TRANSACTION_TIMEOUT_MS_MIN: Final = 10_000
"""A session's beginning is a transaction, which an option of that session cannot exempt; with pages still to
be fetched it takes seconds. With 1 ms stock PostgreSQL lets nobody in."""

_CACHE: Final = "the local directory is a cache, and commits are durable on the safekeepers"
_QUORUM: Final = "commits wait for the safekeepers by it"
_ADDRESS: Final = "where an endpoint listens is kept by the controller"
_FILES: Final = "the files of an endpoint are Excimer's"
_TLS: Final = "how clients are authenticated and encrypted is set up by Excimer"
_SLOW_START: Final = "the manager's connections, on which commits wait, would start as late"
_HISTORY: Final = "an endpoint takes its history from its branch and follows no other server"
_ARCHIVE: Final = (
    "the WAL of an endpoint begins where it was started, so an archive made from it would have gaps; "
    "archive what the safekeepers have: excimer wal receive BRANCH OUT"
)

REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("fsync", "full_page_writes", "wal_log_hints", "wal_init_zero", "wal_recycle"), _CACHE),
    "restart_after_crash": "after a crash the endpoint is started afresh at the end of its WAL",
    "synchronous_standby_names": _QUORUM,
    "max_slot_wal_keep_size": _QUORUM,
    "idle_replication_slot_timeout": _QUORUM,
    **dict.fromkeys(("pre_auth_delay", "post_auth_delay"), _SLOW_START),
    "hot_standby": "a read-only endpoint is read through it",
    **dict.fromkeys(
        (
            "listen_addresses",
            "port",
            "unix_socket_directories",
            "unix_socket_group",
            "unix_socket_permissions",
        ),
        _ADDRESS,
    ),
    **dict.fromkeys(
        ("config_file", "data_directory", "external_pid_file", "include", "include_dir", "include_if_exists"),
        _FILES,
    ),
    **dict.fromkeys(("hba_file", "ident_file"), _TLS),
    **dict.fromkeys(("archive_mode", "archive_command", "archive_library"), _ARCHIVE),
    "logging_collector": (
        "its files would be lost with the local directory; PostgreSQL's log is kept: "
        "excimer endpoint logs NAME --postgres"
    ),
    **dict.fromkeys(
        ("primary_conninfo", "primary_slot_name", "restore_command", "promote_trigger_file"), _HISTORY
    ),
    **dict.fromkeys(
        ("archive_cleanup_command", "recovery_end_command", "recovery_min_apply_delay"), _HISTORY
    ),
}
"""Name -> why. With `REFUSED_PREFIXES` all that is refused whatever its value."""

REFUSED_PREFIXES: Final[Mapping[str, str]] = {
    "ssl": _TLS,
    "krb_": _TLS,
    "recovery_target": _HISTORY,
}

_MS_OF_UNIT: Final = {"": 1, "us": 1e-3, "ms": 1, "s": 1e3, "min": 6e4, "h": 3.6e6, "d": 8.64e7}

_TIME: Final = re.compile(r"([+-]?(?:0x[0-9a-f]+|\d+\.?\d*(?:e[+-]?\d+)?|\.\d+))\s*([a-z]*)")
_NAME: Final = re.compile(r"[a-z_][a-z0-9_$]*(\.[a-z_][a-z0-9_$]*)*\Z")


class PostgresSettingError(RefusedError):
    """A setting that the user may not change, or that PostgreSQL does not understand."""


def refusal_of(name: str) -> str | None:
    """Why nobody may set `name`, as the end of a sentence; None for most settings."""
    if name in REFUSED:
        return REFUSED[name]
    return next((why for prefix, why in REFUSED_PREFIXES.items() if name.startswith(prefix)), None)


def check_rules(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings with their names in lower case, as PostgreSQL compares them.

    Raises `PostgresSettingError` that says which one is refused and why.
    """
    if len(settings) > SETTINGS_MAX:
        raise PostgresSettingError(f"an endpoint has at most {SETTINGS_MAX} settings")
    checked: dict[str, str] = {}
    for given, value in settings.items():
        name = given.lower()
        if name in checked:
            raise PostgresSettingError(f"{name} is set twice")
        _check_rule(name, value)
        checked[name] = value
    return checked


def _check_rule(name: str, value: str) -> None:
    if _NAME.match(name) is None:
        raise PostgresSettingError(f"{name[:80]!r} is not the name of a PostgreSQL setting")
    reason = refusal_of(name)
    if reason is not None:
        raise PostgresSettingError(f"{name} belongs to Excimer and cannot be changed: {reason}")
    if any(character in value for character in "\n\r\0"):
        raise PostgresSettingError(f"the value of {name} contains a line break")
    if len(value.encode()) > VALUE_SIZE_MAX:
        raise PostgresSettingError(f"the value of {name} is longer than {VALUE_SIZE_MAX} bytes")
    if name in MINIMUMS and whole_number(name, value) < MINIMUMS[name]:
        raise PostgresSettingError(f"{name} must be at least {MINIMUMS[name]}: commits travel that way")
    plain = value.strip().lower()
    if name == "transaction_timeout" and 0 < milliseconds(name, value) < TRANSACTION_TIMEOUT_MS_MIN:
        raise PostgresSettingError(
            f"{name} must be 0 or at least {TRANSACTION_TIMEOUT_MS_MIN // 1000}s for an endpoint: it also "
            "ends sessions while they begin; ALTER ROLE, ALTER DATABASE and SET take any value"
        )
    if name == "io_method" and plain == "io_uring":
        raise PostgresSettingError("io_method = io_uring would bypass page hydration: use worker or sync")
    if name == "password_encryption" and plain != "scram-sha-256":
        raise PostgresSettingError("password_encryption must be scram-sha-256: no other password can log in")
    if name == "wal_level" and plain not in ("replica", "logical", "archive", "hot_standby"):
        raise PostgresSettingError("wal_level must be replica or logical: the safekeepers read the WAL")


def whole_number(name: str, text: str) -> int:
    """As PostgreSQL reads an integer setting without a unit. Raises `PostgresSettingError`."""
    try:
        plain = text.strip()
        if re.fullmatch(r"[+-]?0[0-7]+", plain):
            return int(plain, 8)
        return int(plain, 0) if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)", plain) else round(float(plain))
    except (ValueError, OverflowError):
        raise PostgresSettingError(f"{name} must be a whole number, not {text!r}") from None


def milliseconds(name: str, text: str) -> float:
    """As PostgreSQL reads a setting of time whose unit is ms. Raises `PostgresSettingError`."""
    match = _TIME.fullmatch(text.strip().lower())
    if match is None or match[2] not in _MS_OF_UNIT:
        raise PostgresSettingError(f"{name} must be a time such as 30s, not {text!r}")
    is_plain = "." not in match[1] and "e" not in match[1]
    return (whole_number(name, match[1]) if is_plain else float(match[1])) * _MS_OF_UNIT[match[2]]
