"""Freed memory goes back to the system when it is asked to."""

import subprocess
import sys

CODE = """
import os, threading
from excimer.io.processes import release_freed_memory

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work() -> None:
    taken = [b"x" * (16 << 10) for _ in range(4000)]
    kept.append(b"x" * (16 << 10))  # at the end, so that the arena cannot simply shrink
    del taken

kept = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
before = resident()
release_freed_memory()
print(before - resident())
"""


def test_freed_memory_goes_back() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) > 48 << 20
