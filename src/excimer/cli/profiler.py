"""A CPU flame graph of a running Python process, by py-spy: sampled from outside, native frames included.

The process goes on; it is stopped for some microseconds a hundred times a second. Linux asks for a
permission: root, or the same user where /proc/sys/kernel/yama/ptrace_scope is 0, or in a container the
capability SYS_PTRACE.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from excimer.base.errors import RefusedError

PROGRAM: Final = "py-spy"
RATE_PER_S: Final = 100
STOP_LIMIT_S: Final = 60.0
"""Reading the symbols of large libraries comes before and after the sampling."""


class ProfileFailedError(RefusedError):
    """No profile could be made."""


class ProfileNotPermittedError(ProfileFailedError):
    """The kernel does not let us look into the process."""


def find_profiler() -> Path:
    """py-spy of our own environment, or else of the PATH. Raises `ProfileFailedError`."""
    found = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    if found is None:
        raise ProfileFailedError("py-spy is not installed: pip install py-spy")
    return Path(found)


def check_writable(out: Path) -> None:
    """Raises `ProfileFailedError` before the sampling rather than after it."""
    folder = out.absolute().parent
    if out.is_dir():
        raise ProfileFailedError(f"{out} is a directory: name a file")
    if not folder.is_dir():
        raise ProfileFailedError(f"{out} cannot be written: there is no directory {folder}")
    if not os.access(out if out.exists() else folder, os.W_OK):
        raise ProfileFailedError(f"{out} cannot be written: permission denied")


def record_profile(profiler: Path, pid: int, seconds: int, out: Path, *, with_idle: bool) -> None:
    """Writes a flame graph as SVG. Blocks for `seconds` and a little. Raises `ProfileFailedError`."""
    idle = ["--idle"] if with_idle else []
    command = [str(profiler), "record", "--pid", str(pid), "--duration", str(seconds), *idle]
    command += ["--rate", str(RATE_PER_S), "--native", "--threads", "--format", "flamegraph"]
    try:
        done = subprocess.run(
            [*command, "--output", str(out)],
            capture_output=True,
            text=True,
            timeout=seconds + STOP_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileFailedError(f"py-spy did not come to an end in {error.timeout:.0f} s") from error
    if done.returncode != 0 or not out.exists():
        raise _error_of(done.stdout + done.stderr, pid)


def _error_of(output: str, pid: int) -> ProfileFailedError:
    lowered = output.lower()
    if "permission denied" in lowered or "operation not permitted" in lowered or "eperm" in lowered:
        return ProfileNotPermittedError(
            f"the kernel does not let us look into process {pid}: run as root or with the capability "
            "SYS_PTRACE (docker run --cap-add SYS_PTRACE), or set /proc/sys/kernel/yama/ptrace_scope to 0"
        )
    if "no stack counts" in lowered or "no samples" in lowered:
        return ProfileFailedError(
            f"process {pid} used no CPU all the while: give it work, or add --idle to see where it waits"
        )
    reasons = [line for line in output.splitlines() if line.strip() and "Sampling process" not in line]
    return ProfileFailedError(f"py-spy failed: {' '.join(reasons[-3:]) or 'it wrote nothing'}")
