"""What somebody who has broken redo can reach: nothing but the worker's own scratch directory.

A worker with an intruder in it (`tests/kit/redo_intruder`), which makes any system call after the sandbox is
up, tries; and redo still works. Every attempt would succeed for its user outside of the sandbox, which is
checked where it can be: a file that cannot be read anyway would say nothing.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest

from excimer.io.confinement import Confinement, landlock_version
from excimer.io.processes import give_to_user, make_owned_dir, spawn
from excimer.storage.engine.redo_pool import RedoPool, UnconfinedRedoError
from excimer.wire.redo import Sandbox, encode_redo_request
from tests.integration.test_redo_pool import TENANT, insert_record, insert_request, plain_page, plain_request
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.redo_intruder import AT_FDCWD, CALLS, Intruder, compile_intruder, intruder

WAYS_IN = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_PATH, os.O_WRONLY | os.O_TRUNC)
SHUT = {"EACCES", "EPERM", "ENOENT"}

Attempt = tuple[str, *tuple[int | bytes | Path, ...]]
"""A system call and its arguments."""

LAYERS: list[tuple[str, ...]] = [(), ("landlock",)]
"""Left out: nothing, or Landlock, so that the root directory of its own is what holds."""


class World(NamedTuple):
    root: Path
    library: Path
    secret: Path
    """Belongs to the user of redo workers, as another tenant's files do."""

    def enter(self, without: tuple[str, ...] = ()) -> AbstractContextManager[Intruder]:
        return intruder(build_of(NEWEST_VERSION), self.library, self.root / "scratch", without)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with reachable_directory() as root:
        make_owned_dir(root / "scratch")
        secret = make_owned_dir(root / "other-tenant") / "private.pem"
        secret.write_bytes(b"secret")
        give_to_user(secret)
        compiled = root / "compiled"
        compiled.mkdir(mode=0o755)
        yield World(root, compile_intruder(build_of(NEWEST_VERSION), compiled), secret)
        assert secret.read_bytes() == b"secret"


@pytest.fixture(scope="module", params=LAYERS, ids=["landlock", "own root"])
def inside(world: World, request: pytest.FixtureRequest) -> Iterator[Intruder]:
    with world.enter(request.param) as found:
        wanted = Confinement.OWN_ROOT if request.param else Confinement.LANDLOCK
        if found.worker.confinement is not wanted:
            pytest.skip(f"this kernel does not confine by {wanted.value}")
        yield found


def test_redo_works_with_the_sandbox_up(inside: Intruder) -> None:
    far = encode_redo_request((1663, 5, 1), 0, 5_000_000, plain_page(3), [])
    outcome = inside.worker.exchange([plain_request(1), insert_request(7, insert_record(7)), far], 20)
    assert outcome.failure is None
    assert outcome.pages[0] == plain_page(1)
    assert outcome.pages[1].endswith(b"excimer!")
    assert outcome.pages[2] == plain_page(3)


def test_the_scratch_directory_is_open(inside: Intruder) -> None:
    """Else the tests below would show nothing but that no file can be opened at all."""
    new = Path("base/1/attempt")
    assert isinstance(inside.open(new, os.O_RDWR | os.O_CREAT), int)
    assert isinstance(inside.open(new, os.O_RDWR | os.O_TRUNC), int)
    assert isinstance(inside.open(Path("base/1/../1/attempt")), int)
    assert inside.call("unlinkat", AT_FDCWD, new, 0)[0] == 0


def test_no_file_of_others_can_be_opened(inside: Intruder, world: World) -> None:
    paths = [
        world.secret,
        world.secret.parent,
        world.root,
        world.library,
        Path("/etc/passwd"),
        Path("/"),
        Path("/tmp"),
        Path("/dev/null"),
        Path("/dev/shm"),
        Path("/proc/self/environ"),
        Path("/proc/self/mem"),
        Path("/proc/self/root/etc/passwd"),
        Path(f"/proc/{os.getpid()}/environ"),
        Path(f"/proc/{os.getpid()}/cmdline"),
        Path(f"/proc/{inside.worker.process_id}/maps"),
        Path("..") / ".." / "other-tenant" / "private.pem",
        Path("base/../../../other-tenant/private.pem"),
        Path("/etc/../etc/passwd"),
    ]
    for path in paths:
        for flags in WAYS_IN:
            # A descriptor that only names a file (O_PATH) gives nothing away; nothing can be done with it.
            if flags & os.O_PATH and inside.worker.confinement is Confinement.LANDLOCK:
                continue
            if path == Path("/") and inside.worker.confinement is Confinement.OWN_ROOT:
                continue  # the scratch directory itself
            assert inside.open(path, flags) in SHUT | {"EISDIR", "ENOTDIR"}, (path, flags)
    for path in (world.secret.parent, world.root, Path("/tmp"), Path("/etc")):
        assert inside.open(path / "attempt", os.O_WRONLY | os.O_CREAT) in SHUT
        assert inside.open(path, os.O_RDWR | os.O_TMPFILE) in SHUT
        assert inside.call("unlinkat", AT_FDCWD, path / "private.pem", 0)[0] in SHUT
    assert world.secret.read_bytes() == b"secret"


def test_a_named_but_unopened_file_is_of_no_use(inside: Intruder, world: World) -> None:
    """O_PATH is the one way that Landlock does not shut; nothing can be read or reached through it."""
    for path in (world.secret, world.secret.parent):
        descriptor, _ = inside.call("openat", AT_FDCWD, path, os.O_PATH, 0)
        if not isinstance(descriptor, int):
            assert inside.worker.confinement is Confinement.OWN_ROOT
            continue
        assert inside.call("read", descriptor, bytes(16), 16)[0] == "EBADF"
        assert inside.call("mmap", 0, 4096, 1, 1, descriptor, 0)[0] == "EBADF"
        assert inside.call("openat", descriptor, Path("private.pem"), os.O_RDONLY, 0)[0] in {
            "EACCES",
            "ENOTDIR",
        }
        assert inside.open(Path(f"/proc/self/fd/{descriptor}")) == "EACCES"
        assert inside.call("unlinkat", descriptor, Path("private.pem"), 0)[0] in {"EACCES", "ENOTDIR"}
        inside.call("close", descriptor)


def test_links_lead_nowhere(inside: Intruder, world: World) -> None:
    """Not those that it would make, and not those that somebody else has put into its directory."""
    scratch = inside.worker.directory
    for name, target in [("planted", world.secret), ("planted-dir", world.secret.parent), ("up", Path("/"))]:
        (scratch / name).symlink_to(target)
    assert inside.open(Path("planted")) in SHUT
    assert inside.open(Path("planted-dir/private.pem")) in SHUT
    assert inside.open(Path("up/etc/passwd")) in SHUT
    made: list[Attempt] = [
        ("symlinkat", world.secret, AT_FDCWD, Path("made")),
        ("linkat", AT_FDCWD, world.secret, AT_FDCWD, Path("made"), 0),
        ("linkat", AT_FDCWD, Path("PG_VERSION"), AT_FDCWD, world.secret.parent / "made", 0),
        ("renameat2", AT_FDCWD, Path("PG_VERSION"), AT_FDCWD, world.secret, 0),
        ("renameat2", AT_FDCWD, world.secret, AT_FDCWD, Path("made"), 0),
        ("renameat2", AT_FDCWD, world.secret, AT_FDCWD, Path("PG_VERSION"), 2),
    ]
    for name, *arguments in made:
        assert inside.call(name, *arguments)[0] == "EPERM", name
    assert not (scratch / "made").exists()
    assert world.secret.read_bytes() == b"secret"


def test_nothing_of_others_can_be_changed_by_path(inside: Intruder, world: World) -> None:
    attempts: list[Attempt] = [
        ("truncate", world.secret, 0),
        ("fchmodat", AT_FDCWD, world.secret, 0o777),
        ("setxattr", world.secret, Path("user.a"), b"x", 1, 0),
        ("chdir", Path("/")),
        ("chroot", Path("/")),
        ("mount", Path("/"), Path("/tmp"), Path("none"), 4096, 0),
        ("open_by_handle_at", AT_FDCWD, bytes(64), os.O_RDONLY),
        ("name_to_handle_at", AT_FDCWD, world.secret, bytes(64), bytes(8), 0),
        ("openat2", AT_FDCWD, world.secret, bytes(24), 24),
        ("open_tree", AT_FDCWD, world.secret, 0),
        ("io_uring_setup", 4, bytes(120)),
        ("io_setup", 4, bytes(8)),
    ]
    for name, *arguments in attempts:
        assert inside.call(name, *arguments)[0] == "EPERM", name
    assert world.secret.stat().st_mode & 0o777 != 0o777


def test_no_connection_and_no_other_process(inside: Intruder) -> None:
    parent, own = os.getpid(), inside.worker.process_id
    attempts: list[Attempt] = [
        ("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
        ("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0),
        ("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, bytes(8)),
        ("ptrace", 16, parent, 0, 0),
        ("process_vm_readv", parent, bytes(16), 1, bytes(16), 1, 0),
        ("process_vm_writev", parent, bytes(16), 1, bytes(16), 1, 0),
        ("kill", parent, 0),
        ("tkill", parent, 0),
        ("tgkill", parent, parent, 0),
        ("pidfd_send_signal", 0, 0, 0, 0),
        ("pidfd_getfd", 0, 0, 0),
        ("prlimit64", own, 7, bytes(16), 0),
        ("clone", signal.SIGCHLD, 0, 0, 0, 0),
        ("clone3", bytes(88), 88),
        ("execve", Path("/bin/true"), 0, 0),
        ("execveat", AT_FDCWD, Path("/bin/true"), 0, 0, 0),
        ("unshare", 0x10000000),
        ("setns", 0, 0),
        ("shmget", 1, 4096, 0o1600),
        ("memfd_create", Path("x"), 0),
        ("bpf", 0, bytes(128), 128),
        ("userfaultfd", 0),
        ("prctl", 4, 1, 0, 0, 0),
        ("ioctl", 0, 0x5412, bytes(1)),  # TIOCSTI: types into a terminal
    ]
    for name, *arguments in attempts:
        assert inside.call(name, *arguments)[0] == "EPERM", name
    for name in ("fork", "vfork"):
        if name in CALLS:
            assert inside.call(name)[0] == "EPERM"


def test_signals_cannot_be_sent_through_descriptors(inside: Intruder) -> None:
    """F_SETOWN and F_SETSIG make the kernel send any signal to any process of the same user."""
    sleeper = spawn(["/bin/sleep", "60"])
    try:
        for command in (8, 10, 15):  # F_SETOWN, F_SETSIG, F_SETOWN_EX
            assert inside.call("fcntl", 2, command, sleeper.pid)[0] == "EPERM"
        assert inside.call("fcntl", 2, 1026, 1)[0] == "EPERM"  # F_NOTIFY
        assert isinstance(inside.call("fcntl", 2, 3)[0], int)  # F_GETFL
        time.sleep(0.05)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_worker_has_no_descriptors_but_its_own(inside: Intruder) -> None:
    """None that we had open, inheritable or not, and its environment says nothing."""
    process = inside.worker.process_id
    scratch = str(inside.worker.directory)
    for name in os.listdir(f"/proc/{process}/fd"):
        target = os.readlink(f"/proc/{process}/fd/{name}")
        own_pipe = target.startswith("pipe:") or target in ("anon_inode:[signalfd]", "anon_inode:[eventpoll]")
        assert own_pipe or target == "/dev/null" or target.startswith(scratch), target
    pipes = [os.readlink(f"/proc/{process}/fd/{name}") for name in os.listdir(f"/proc/{process}/fd")]
    assert len([pipe for pipe in pipes if pipe.startswith("pipe:")]) == 2


def test_a_descriptor_that_we_leave_inheritable_does_not_reach_a_worker(world: World) -> None:
    ours = os.open(world.secret, os.O_RDONLY)
    try:
        os.set_inheritable(ours, True)
        with world.enter() as found:
            names = os.listdir(f"/proc/{found.worker.process_id}/fd")
            targets = {os.readlink(f"/proc/{found.worker.process_id}/fd/{name}") for name in names}
            assert str(world.secret) not in targets
    finally:
        os.close(ours)


def test_without_confinement_an_intruder_reads_what_its_user_may_read(world: World) -> None:
    """The attempts above fail because of the confinement: without it they succeed, and it is said."""
    with world.enter(("landlock", "root")) as found:
        assert found.worker.confinement is Confinement.NONE
        assert found.worker.sandbox == Sandbox(0, has_own_root=False, is_filtered=True)
        assert isinstance(found.open(world.secret), int)
        assert isinstance(found.open(Path("/etc/passwd")), int)
        assert found.call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)[0] == "EPERM"


def test_landlock_is_used_where_the_kernel_has_it(world: World) -> None:
    with world.enter() as found:
        assert found.worker.sandbox.landlock_version == landlock_version()
        assert found.worker.sandbox.is_filtered


@pytest.mark.parametrize("without", [("landlock",), ("landlock", "root")])
def test_an_operator_can_refuse_unconfined_workers(world: World, without: tuple[str, ...]) -> None:
    async def scenario() -> None:
        build = build_of(NEWEST_VERSION)
        pool = RedoPool(build, world.root / "pool", 1, must_confine=True, without=without)
        try:
            if "root" in without:
                with pytest.raises(UnconfinedRedoError, match="Landlock"):
                    await pool.redo([plain_request(1)], TENANT)
                assert not pool.supervisor.has_workers
            else:
                assert await pool.redo([plain_request(1)], TENANT) == [plain_page(1)]
        finally:
            await pool.close()

    asyncio.run(scenario())
