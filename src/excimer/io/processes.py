"""Running other programs, PostgreSQL's above all, as a user who may not do harm.

PostgreSQL refuses to run as root, and containers and CI machines run everything as root. So when we
are root, PostgreSQL and redo workers run as `unprivileged_user()`; when we are not, they run as
ourselves and nothing here costs anything. The order of preference as root:

1. the user named in ``EXCIMER_USER``;
2. an existing user ``excimer``, then ``postgres``, that is not root;
3. a new system user ``excimer``, made with useradd;
4. ``nobody``, where there is no useradd (its processes could touch those of other services that use
   nobody, so this is the last choice).

Not here: what such a user can *read* (`excimer.io.cache`), and what is run (`excimer.postgres`).
"""

import ctypes
import functools
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from excimer.base.errors import RefusedError

USER_VARIABLE = "EXCIMER_USER"
OWN_USER = "excimer"
KNOWN_USERS = (OWN_USER, "postgres")
LAST_RESORT = "nobody"

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)

Stream = int | IO[bytes] | None


class NoUnprivilegedUserError(RefusedError):
    """We are root, and there is no user that PostgreSQL could run as."""


class UnreachableError(RefusedError):
    """The unprivileged user cannot reach a path that PostgreSQL must read."""


class ProgramFailedError(RefusedError):
    """A program that we ran to its end failed; the message carries the last lines it wrote."""

    def __init__(self, program: str, code: int, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-12:])
        super().__init__(f"{program} {describe_exit(code)}: {tail or 'it wrote nothing'}")
        self.program = program
        self.code = code
        self.output = output


@dataclass(frozen=True, slots=True)
class User:
    """A user of the operating system; never root."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@functools.cache
def unprivileged_user() -> User | None:
    """Whom PostgreSQL runs as: None when we are not root, and so run it as ourselves.

    May make a system user, once. Raises `NoUnprivilegedUserError`.
    """
    if os.geteuid() != 0:
        return None
    wanted = os.environ.get(USER_VARIABLE)
    if wanted:
        user = _find_user(wanted)
        if user is None:
            raise NoUnprivilegedUserError(f"{USER_VARIABLE}={wanted} is not a user, or is root: name another")
        return user
    for name in KNOWN_USERS:
        user = _find_user(name)
        if user is not None:
            return user
    user = _make_user() or _find_user(LAST_RESORT)
    if user is None:
        raise NoUnprivilegedUserError(
            "PostgreSQL does not run as root, and no other user could be found or made: "
            f"add one (useradd --system {OWN_USER}) or name one in {USER_VARIABLE}"
        )
    return user


def _find_user(name: str) -> User | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    if entry.pw_uid == 0:
        return None
    groups = tuple(group for group in os.getgrouplist(name, entry.pw_gid) if group != 0)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


def _make_user() -> User | None:
    """A new system user. Two processes may try at once: the loser finds what the winner made."""
    program = shutil.which("useradd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        return None
    subprocess.run(
        [program, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", OWN_USER],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return _find_user(OWN_USER)


def program_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What PostgreSQL's programs get to see of our environment: no PG* settings, no secrets.

    HOME is the unprivileged user's, because libpq and psql look for files there.
    """
    kept = (
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "TERM",
        "HOME",
        "ASAN_OPTIONS",
        "UBSAN_OPTIONS",
    )
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment.setdefault("PATH", os.defpath)
    user = unprivileged_user()
    if user is not None:
        environment["HOME"] = user.home
        environment["USER"] = environment["LOGNAME"] = user.name
    return environment | dict(extra or {})


def drop_arguments() -> dict[str, Any]:
    """What makes `subprocess` change to the unprivileged user; nothing when we are not root."""
    user = unprivileged_user()
    if user is None:
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": list(user.groups)}


def spawn(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = subprocess.DEVNULL,
    stderr: Stream = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    new_session: bool = True,
) -> "subprocess.Popen[bytes]":
    """Starts a program as the unprivileged user; pipes are unbuffered.

    `environment` is the program's whole environment; None means `program_environment()`. It starts in
    `directory`, by default ``/``, because ours may be closed to that user. A session of its own keeps
    the terminal's Ctrl-C from it: whoever spawned it stops it. Without one a process group of its own does
    the same, and Linux, which shares out the cores by sessions first, sees the program as a part of us.
    """
    return subprocess.Popen(
        [os.fspath(argument) for argument in arguments],
        env=dict(program_environment() if environment is None else environment),
        cwd=directory or "/",
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        bufsize=0,
        pass_fds=pass_fds,
        start_new_session=new_session,
        process_group=None if new_session else 0,
        **drop_arguments(),
    )


def die_with_parent(number: int) -> None:
    """For `preexec_fn`: the kernel sends the signal `number` to the child when its parent dies.

    Runs in the child, after it has changed its user: changing it clears the setting.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def release_freed_memory() -> None:
    """Gives memory that has been freed back to the system, after work that took much and is rare.

    The C library keeps it otherwise, for good where a thread's arena is in use at its end. Blocks for
    milliseconds; other threads that allocate wait for a part of that. Without glibc nothing happens.
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def hide_memory() -> None:
    """For a process whose memory holds what its own user must not read.

    From now on only root may attach to it or read its memory and environment under /proc, and it leaves no
    core dump. Programs that it starts are not concerned. Where the kernel lacks this, nothing happens.
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def run(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    stdin: bytes = b"",
    timeout_s: float | None = None,
) -> str:
    """Runs a program as the unprivileged user to its end and answers its output. Blocks.

    Raises `ProgramFailedError` with what it wrote to either stream, and when it took over `timeout_s`
    (it is killed then).
    """
    name = os.path.basename(os.fspath(arguments[0]))
    process = spawn(
        arguments,
        environment=environment,
        directory=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            output, errors = process.communicate(stdin, timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.communicate()
            raise ProgramFailedError(name, -9, f"it took more than {timeout_s} s and was killed") from error
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise ProgramFailedError(name, process.returncode, text + errors.decode(errors="replace"))
    return text


def describe_exit(code: int) -> str:
    """How a process ended, from its exit code as `subprocess` has it: negative for a signal.

    The kernel has more signals than Python has names: those of real time are numbers above SIGRTMIN.
    """
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        pass
    if signal.SIGRTMIN < -code < signal.SIGRTMAX:
        return f"died of SIGRTMIN+{-code - signal.SIGRTMIN}"
    return f"died of signal {-code}"


def make_owned_dir(path: Path, mode: int = 0o700) -> Path:
    """Makes a directory that belongs to the unprivileged user (PostgreSQL demands to own its data).

    Missing parents are made too; they belong to us and can be passed through. An existing directory
    of ours is given to that user. Raises `UnreachableError` when that user cannot get to it, or it is a
    link or somebody else's.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o755, exist_ok=True)
        parent.chmod(0o755)
    path.mkdir(mode=mode, exist_ok=True)
    user = unprivileged_user()
    owner = os.geteuid() if user is None else user.uid
    try:
        # Held open, not followed: somebody may replace a name in /tmp by a link to /etc at any moment.
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UnreachableError(f"{path} cannot be used: {error.strerror}; choose another place") from error
    try:
        if os.fstat(directory).st_uid not in (owner, os.geteuid()):
            raise UnreachableError(f"{path} belongs to somebody else: remove it or choose another place")
        if user is not None:
            os.fchown(directory, user.uid, user.gid)
        os.fchmod(directory, mode)
    finally:
        os.close(directory)
    require_reachable(path)
    return path


def give_to_user(path: Path) -> None:
    """Makes the unprivileged user the owner of a file or directory that we have just written."""
    user = unprivileged_user()
    if user is not None:
        os.chown(path, user.uid, user.gid, follow_symlinks=False)


def is_reachable(path: Path, user: User | None = None) -> bool:
    """Whether the unprivileged user can read `path`, and pass or list the directories on the way.

    Decided from mode bits; when we are not root, from what we can open ourselves.
    """
    user = user or unprivileged_user()
    if user is None:
        return os.access(path, os.R_OK)
    return _blocked_at(path.resolve(), user) is None


def is_passable(directory: Path) -> bool:
    """Whether the unprivileged user can get to what lies in `directory`, by its name."""
    user = unprivileged_user()
    if user is None:
        return os.access(directory, os.X_OK)
    resolved = directory.resolve()
    return all(_allows(each, user, 0o1) for each in (*resolved.parents, resolved))


def require_reachable(path: Path) -> None:
    """Raises `UnreachableError` that names the directory at fault."""
    user = unprivileged_user()
    blocked = _blocked_at(path.resolve(), user) if user else None
    if user is not None and blocked is not None:
        raise UnreachableError(
            f"{path} cannot be read by the user {user.name}, as which PostgreSQL runs, because of the "
            f"permissions of {blocked}: choose another place, or chmod o+x {blocked}"
        )


def _blocked_at(path: Path, user: User) -> Path | None:
    """The first path from the root down that `user` may not pass (or, at the end, read)."""
    for parent in reversed(path.parents):
        if not _allows(parent, user, 0o1):
            return parent
    wanted = 0o5 if path.is_dir() else 0o4
    return None if _allows(path, user, wanted) else path


def _allows(path: Path, user: User, wanted: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_uid == user.uid:
        granted = status.st_mode >> 6
    elif status.st_gid == user.gid or status.st_gid in user.groups:
        granted = status.st_mode >> 3
    else:
        granted = status.st_mode
    return granted & wanted == wanted
