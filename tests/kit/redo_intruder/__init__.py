"""A redo worker that does whatever an intruder in it would: any system call (`intruder.c`)."""

import errno
import os
import platform
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excimer.postgres import PostgresBuild
from excimer.postgres.redo_extension import LIBRARY_NAME, compile_redo, source_directory
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_worker import RedoWorker
from excimer.wire.redo import REQUEST_HEAD

_INTRUDER = 0xE7C1AE27
_ARGUMENT_COUNT = 6
AT_FDCWD = -100

CALLS = {
    "x86_64": {
        "read": 0, "close": 3, "mmap": 9, "ioctl": 16, "access": 21, "shmget": 29, "socket": 41,
        "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "fcntl": 72,
        "truncate": 76, "getdents64": 217, "chdir": 80, "rename": 82, "mkdir": 83, "link": 86, "unlink": 87,
        "symlink": 88, "readlink": 89, "chmod": 90, "chown": 92, "ptrace": 101, "mknod": 133, "prctl": 157,
        "chroot": 161, "mount": 165, "setxattr": 188, "tkill": 200, "io_setup": 206, "tgkill": 234,
        "openat": 257, "unlinkat": 263, "renameat2": 316, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
        "unshare": 272, "prlimit64": 302, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321, "execveat": 322,
        "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428,
        "clone3": 435, "openat2": 437, "pidfd_getfd": 438,
    },
    "aarch64": {
        "read": 63, "close": 57, "mmap": 222, "ioctl": 29, "shmget": 194, "socket": 198, "socketpair": 199,
        "clone": 220, "execve": 221, "kill": 129, "fcntl": 25, "truncate": 45, "getdents64": 61, "chdir": 49,
        "ptrace": 117, "prctl": 167, "chroot": 51, "mount": 40, "setxattr": 5, "tkill": 130, "io_setup": 0,
        "tgkill": 131, "openat": 56, "unlinkat": 35, "renameat2": 276, "linkat": 37, "symlinkat": 36,
        "fchmodat": 53, "unshare": 97, "prlimit64": 261, "name_to_handle_at": 264, "open_by_handle_at": 265,
        "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
        "execveat": 281, "userfaultfd": 282, "pidfd_send_signal": 424, "io_uring_setup": 425,
        "open_tree": 428, "clone3": 435, "openat2": 437, "pidfd_getfd": 438,
    },
}[platform.machine()]  # fmt: skip
"""Numbers of system calls here."""


class Intruder:
    def __init__(self, worker: RedoWorker) -> None:
        self.worker = worker

    def call(self, name: str, *arguments: int | bytes | Path) -> tuple[int | str, bytes]:
        """The result or the name of the error, and what is then in the bytes that were given.

        Bytes and paths are passed by address; paths end with a zero.
        """
        data, numbers, offsets = b"", [], 0
        for index, argument in enumerate(arguments):
            if isinstance(argument, int):
                numbers.append(argument)
                continue
            offsets |= 1 << index
            numbers.append(len(data))
            data += os.fsencode(argument) + b"\0" if isinstance(argument, Path) else argument
        numbers += [0] * (_ARGUMENT_COUNT - len(numbers))
        data += bytes(-len(data) & 7)
        body = struct.pack("<IIq6q", _INTRUDER, offsets, CALLS[name], *numbers) + data
        answer = self.worker.ask(REQUEST_HEAD.pack(len(body), ord("M")) + body)
        (result,) = struct.unpack_from("<q", answer)
        return result if result >= 0 else errno.errorcode[-result], answer[8:]

    def open(self, path: Path, flags: int = os.O_RDONLY) -> int | str:
        """A descriptor, which is closed again, or the name of the error."""
        result, _ = self.call("openat", AT_FDCWD, path, flags, 0o600)
        if isinstance(result, int):
            self.call("close", result)
        return result


def compile_intruder(build: PostgresBuild, directory: Path) -> Path:
    """The worker's library with an intruder in it, compiled into `directory`. Blocks a few seconds."""
    sources = directory / "sources"
    shutil.copytree(source_directory(), sources)
    shutil.copy(Path(__file__).with_name("intruder.c"), sources)
    target = directory / "library"
    target.mkdir(mode=0o755)
    compile_redo(build, sources, target, ("-Wl,--wrap=replay_mask",))
    return target / LIBRARY_NAME


@contextmanager
def intruder(
    build: PostgresBuild, library: Path, scratch: Path, without: tuple[str, ...] = ()
) -> Iterator[Intruder]:
    """In a worker that has started as any other does."""
    worker = RedoWorker(build, library, redo_control_file(build), scratch, without=without)
    try:
        yield Intruder(worker)
    finally:
        worker.close()
