"""Settings tried out by the PostgreSQL build that is to run with them, before anybody stores them.

``postgres --check`` (``--boot -x0`` in 14) is what initdb itself uses: it reads the settings as the server
does, with ranges, units, enumerations and hooks, makes the shared memory of that size, and ends. It takes
15 ms and needs no cluster, only a directory that looks like the beginning of one.

Not here: what Excimer refuses (`setting_rules`). Not found here: what an extension thinks of its own
settings, and what only the network or the moment decides; the manager reports those at the start.
"""

import difflib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from excimer.io.processes import ProgramFailedError, give_to_user, make_owned_dir, program_environment, run
from excimer.postgres.build import PostgresBuild
from excimer.postgres.library_lists import split_libraries
from excimer.postgres.setting_rules import PostgresSettingError, check_rules, whole_number

CHECK_TIMEOUT_S: Final = 20.0
LIBRARY_SETTINGS: Final = ("shared_preload_libraries", "session_preload_libraries", "local_preload_libraries")
BOOT_DIRECTORIES: Final = ("global", "pg_notify", "pg_serial", "pg_subtrans", "pg_dynshmem", "base")
"""What `--check` looks for in the directory, besides PG_VERSION and postgresql.conf."""

AT_START: Final = ("postmaster", "internal")
"""Contexts of settings that only a new start puts in force."""

CONNECTIONS_DEFAULT: Final = 100
RESERVED_DEFAULTS: Final = {"superuser_reserved_connections": 3, "reserved_connections": 0}

_SAID: Final = re.compile(r"(?:FATAL|PANIC):\s+(.*)")
_MORE: Final = re.compile(r"(?:HINT|DETAIL):\s+(.*)")
_UNKNOWN: Final = re.compile(r'unrecognized configuration parameter "(.*)"')


def check_settings(build: PostgresBuild, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings, names in lower case. Raises `PostgresSettingError` naming the first that is at fault.

    Blocks for some 15 ms.
    """
    checked = check_rules(settings)
    if not checked:
        return checked
    for name in LIBRARY_SETTINGS:
        _check_libraries(build, name, checked.get(name, ""))
    _check_reserved(checked)
    _dry_start(build, checked)
    return checked


def at_start_only(build: PostgresBuild, names: Iterable[str]) -> list[str]:
    """Those that only a new start of PostgreSQL puts in force. An extension's own count as reloadable."""
    contexts = _contexts(build.postgres, build.identity())
    return sorted(name for name in names if contexts.get(name) in AT_START)


def _dry_start(build: PostgresBuild, settings: Mapping[str, str]) -> None:
    root = Path(tempfile.mkdtemp(prefix="excimer-check-"))
    try:
        root.chmod(0o711)
        directory = make_owned_dir(root / "data")
        for name in BOOT_DIRECTORIES:
            make_owned_dir(directory / name)
        for name, content in (("PG_VERSION", f"{build.version}\n"), ("postgresql.conf", "")):
            (directory / name).write_text(content)
            give_to_user(directory / name)
        mode = ["--check"] if build.version >= 15 else ["--boot", "-x0"]
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        run(
            [build.postgres, *mode, "-D", directory, *options],
            environment=program_environment(build.environment() | {"LC_ALL": "C"}),
            timeout_s=CHECK_TIMEOUT_S,
        )
    except ProgramFailedError as error:
        raise PostgresSettingError(_sentence(build, settings, error.output)) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _sentence(build: PostgresBuild, settings: Mapping[str, str], output: str) -> str:
    """What postgres said when it gave up, on one line, naming the setting."""
    lines = output.splitlines()
    said = next(
        ((number, found[1]) for number, line in enumerate(lines) if (found := _SAID.search(line))), None
    )
    if said is None:
        return f"PostgreSQL {build.version} does not start with these settings: {output.strip()[-300:]}"
    number, fault = said
    unknown = _UNKNOWN.match(fault)
    if unknown is not None:
        near = difflib.get_close_matches(unknown[1], _contexts(build.postgres, build.identity()), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"PostgreSQL {build.version} has no setting {unknown[1]}{hint}"
    more = [found[1] for line in lines[number + 1 :] if (found := _MORE.search(line))]
    if "shared memory" in fault:
        sizes = [name for name in settings if name in MEMORY_SETTINGS]
        return f"{', '.join(sizes) or 'the settings'}: PostgreSQL would not start: {fault}"
    return " ".join([f"PostgreSQL {build.version}: {fault}", *(f"({hint})" for hint in more[:1])])


MEMORY_SETTINGS: Final = frozenset(
    {
        "shared_buffers",
        "huge_pages",
        "huge_page_size",
        "max_connections",
        "wal_buffers",
        "max_locks_per_transaction",
    }
    | {
        "max_pred_locks_per_transaction",
        "max_prepared_transactions",
        "max_worker_processes",
        "max_wal_senders",
    }
    | {"min_dynamic_shared_memory", "autovacuum_max_workers", "autovacuum_worker_slots", "shared_memory_type"}
)
"""Those that decide how much shared memory PostgreSQL asks for, or how."""


def _check_libraries(build: PostgresBuild, setting: str, value: str) -> None:
    """A library that is not there stops the server, or every session, from starting."""
    for listed in split_libraries(setting, value):
        name = listed.removeprefix("$libdir/").removesuffix(".so")
        path = Path(name + ".so") if name.startswith("/") else build.lib_dir / f"{name}.so"
        plugin = build.lib_dir / "plugins" / f"{name.removeprefix('plugins/')}.so"
        if not path.exists() and not (setting == "local_preload_libraries" and plugin.exists()):
            raise PostgresSettingError(
                f"{setting}: PostgreSQL {build.full_version} in {build.bin_dir} has no library {name}"
            )


def _check_reserved(settings: Mapping[str, str]) -> None:
    """The postmaster checks this sum only when it starts in earnest."""
    names = [name for name in ("max_connections", *RESERVED_DEFAULTS) if name in settings]
    if not names:
        return
    total = whole_number("max_connections", settings.get("max_connections", str(CONNECTIONS_DEFAULT)))
    reserved = sum(
        whole_number(name, settings.get(name, str(default))) for name, default in RESERVED_DEFAULTS.items()
    )
    if reserved >= total:
        raise PostgresSettingError(
            f"{', '.join(names)}: {reserved} connections are reserved, which must be fewer than "
            f"max_connections = {total}"
        )


@functools.cache
def _contexts(postgres: Path, identity: str) -> dict[str, str]:
    """Context of every setting that the program has built in, by name in lower case."""
    del identity  # only part of the cache's key
    rows = [line.split("\t") for line in run([postgres, "--describe-config"]).splitlines()]
    return {row[0].lower(): row[1] for row in rows if len(row) > 1}
