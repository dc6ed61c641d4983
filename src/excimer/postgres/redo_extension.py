"""Compiles the redo worker's extension (`csrc/redo`) against a build's server headers, once per build.

A loadable module holds for one major version and its structures, so it cannot be shipped compiled. The
result lies in the cache under the identity of the build and of the sources. The other module of our own
(`endpoint_module`) is made by the same means.
"""

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import excimer
from excimer.io.cache import cache_entry
from excimer.postgres.build import BuildUnusableError, PostgresBuild

LIBRARY_NAME = "excimer_redo.so"
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-g",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # PostgreSQL is written in this dialect of C; other rules of aliasing and overflow would break its macros.
    "-fno-strict-aliasing",
    "-fwrapv",
)
COMPILE_TIMEOUT_S = 300


def redo_extension(build: PostgresBuild) -> Path:
    """Path of the compiled extension, readable by PostgreSQL's user. Blocks some seconds the first time.

    Raises `BuildUnusableError` when headers or a compiler are missing, or with the compiler's own words.
    """
    return cached_module(build, "redo", source_directory(), LIBRARY_NAME)


def cached_module(build: PostgresBuild, kind: str, sources: Path, name: str) -> Path:
    """The module `name`, compiled of `sources` if the cache does not have it. Raises `BuildUnusableError`."""
    build.require_runnable()
    if build.include_server_dir is None:
        raise BuildUnusableError(
            f"PostgreSQL {build.full_version} in {build.bin_dir} has no server headers, which Excimer needs "
            f"for its own modules: install them (Debian: postgresql-server-dev-{build.version}, Fedora: "
            f"postgresql{build.version}-devel), or bring a build that has them: "
            f"excimer pg install {build.version}"
        )
    key = f"{build.version}-{build.identity()}-{_identity_of(sources)}"
    return cache_entry(kind, key, lambda place: compile_redo(build, sources, place, name=name)) / name


@functools.cache
def source_directory(name: str = "redo") -> Path:
    """csrc/NAME, of the wheel or of the checkout."""
    package = Path(excimer.__file__).resolve().parent
    for csrc in (package / "csrc", package.parent.parent / "csrc"):
        if (csrc / name).is_dir():
            return csrc / name
    raise BuildUnusableError(
        f"the sources of our {name} module are not beside {package}: install Excimer again"
    )


def find_compiler() -> str:
    """The C compiler: ``CC``, else cc, gcc or clang. Raises `BuildUnusableError`."""
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildUnusableError(
        f"no C compiler found ({wanted or 'cc, gcc, clang'}), which Excimer needs once per PostgreSQL "
        "version: install one (Debian: apt-get install gcc libc6-dev) or name it in CC"
    )


def compile_redo(
    build: PostgresBuild,
    sources: Path,
    place: Path,
    extra_flags: tuple[str, ...] = (),
    name: str = LIBRARY_NAME,
) -> None:
    """Compiles all of `sources` into `place`. Raises `BuildUnusableError` with the compiler's words."""
    # -isystem: PostgreSQL's headers do not compile without warnings under -Wextra.
    command = [find_compiler(), *FLAGS, *extra_flags, "-isystem", str(build.include_server_dir)]
    command += ["-o", str(place / name), *(str(path) for path in sorted(sources.glob("*.c")))]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildUnusableError(f"the C compiler {command[0]} cannot be run: {error}") from error
    if answer.returncode != 0:
        said = "\n".join(answer.stderr.strip().splitlines()[:12])
        raise BuildUnusableError(f"{name} cannot be compiled for PostgreSQL {build.full_version}: {said}")


def _identity_of(sources: Path) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(sources.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
