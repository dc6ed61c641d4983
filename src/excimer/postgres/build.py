"""What Excimer knows of one PostgreSQL installation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from excimer.base.errors import RefusedError
from excimer.io.processes import program_environment

SUPPORTED_VERSIONS = (14, 15, 16, 17, 18)
DEFAULT_VERSION = 18


class PostgresMissingError(RefusedError):
    """No installation of the wanted version is on this machine."""


class BuildUnusableError(RefusedError):
    """An installation is there but lacks something that the caller needs."""


@dataclass(frozen=True, slots=True)
class BuildFeatures:
    """What an installation was built with and what is there, as detected, never guessed."""

    icu: bool
    tls: bool
    lz4: bool
    zstd: bool
    libxml: bool
    llvm: bool
    headers: bool
    """Server headers are there: the redo extension can be compiled."""
    regress: bool
    """pg_regress and isolationtester are there."""
    timezones: bool
    """The time zone database it was built to use is there; without it only UTC and GMT work."""
    extensions: frozenset[str]
    """Names that CREATE EXTENSION accepts, such as amcheck and bloom."""
    broken_extensions: tuple[tuple[str, str], ...]
    """Those that are there and cannot be loaded, and the shared library that this machine lacks."""
    missing_libraries: tuple[str, ...]
    """Shared libraries that its main programs need and this machine lacks: it cannot run."""

    def lacks(self) -> list[str]:
        """What a user may miss, in words for a list; empty for a complete build."""
        named = {
            "ICU": self.icu,
            "TLS": self.tls,
            "LZ4": self.lz4,
            "zstd": self.zstd,
            "XML": self.libxml,
            "JIT": self.llvm,
            "server headers": self.headers,
            "time zones": self.timezones,
            "amcheck": "amcheck" in self.extensions,
            "pgcrypto": "pgcrypto" in self.extensions,
            "pgvector": "vector" in self.extensions,
        }
        broken = dict(self.broken_extensions)
        missing = [name for name, present in named.items() if not present and name not in broken]
        if "uuid-ossp" not in self.extensions and "uuid-ossp" not in broken:
            missing.append("uuid-ossp")
        return missing + [f"{name} (needs {library})" for name, library in broken.items()]


@dataclass(frozen=True, slots=True)
class PostgresBuild:
    """One installation. All paths can be read by the user as whom PostgreSQL runs."""

    version: int
    """Major version."""
    full_version: str
    """As it calls itself: ``15.18 (Debian 15.18-0+deb12u1)``."""
    bin_dir: Path
    lib_dir: Path
    """Loadable modules (pg_config's PKGLIBDIR)."""
    client_lib_dir: Path
    """libpq (pg_config's LIBDIR)."""
    share_dir: Path
    include_server_dir: Path | None
    """Server headers, None when they are not installed."""
    pgxs_dir: Path | None
    origin: str
    """Where it comes from: added, wheel, installed, system, path."""
    features: BuildFeatures
    finds_libraries: bool = False
    """Its programs find their own shared libraries without being told where (LD_LIBRARY_PATH)."""

    @property
    def postgres(self) -> Path:
        return self.bin_dir / "postgres"

    def program(self, name: str) -> Path:
        """Path of one of its programs. Raises `BuildUnusableError` when it does not have it."""
        path = self.bin_dir / name
        if not path.exists():
            raise BuildUnusableError(
                f"PostgreSQL {self.full_version} in {self.bin_dir} has no program {name}"
            )
        return path

    def environment(self) -> dict[str, str]:
        """Variables its programs need, to be laid over another environment; often empty."""
        if self.finds_libraries:
            return {}
        return {"LD_LIBRARY_PATH": str(self.client_lib_dir)}

    def whole_environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A complete environment for its programs, to pass to `spawn`: no PG* settings, no secrets."""
        return program_environment(self.environment() | dict(extra or {}))

    def require_runnable(self) -> None:
        """Raises `BuildUnusableError` that names the shared libraries this machine lacks."""
        missing = self.features.missing_libraries
        if missing:
            raise BuildUnusableError(
                f"PostgreSQL {self.full_version} in {self.bin_dir} needs {', '.join(missing)}, which this "
                "machine lacks: install the packages that hold them, or another build "
                f"(excimer pg install {self.version})"
            )

    def identity(self) -> str:
        """Changes whenever the server program or the headers it is compiled against do."""
        digest = hashlib.sha256(self.full_version.encode())
        paths = [self.postgres]
        if self.include_server_dir is not None:
            paths.append(self.include_server_dir / "pg_config.h")
        for path in paths:
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]
