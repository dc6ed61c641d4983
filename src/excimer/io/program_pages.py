"""Gives back the pages of programs and libraries that only the start needed.

A library that is loaded is read in large parts: relocated, initialised, with its neighbours mapped along.
What of it is used afterwards is less than half, and comes back from the page cache when it is touched.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Final

_PAGE_SIZE: Final = mmap.PAGESIZE
_ENTRY_SIZE: Final = 8
"""/proc/PID/pagemap has 64 bits for each page (Documentation/admin-guide/mm/pagemap.rst of Linux):"""
_PRESENT: Final = 1 << 63
_SWAPPED: Final = 1 << 62
_OF_FILE: Final = 1 << 61

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def release_program_pages() -> None:
    """Takes all pages of code and constants out of this process; other threads may use them meanwhile. Blocks
    for some milliseconds. Without /proc nothing happens.
    """
    try:
        with open("/proc/self/maps") as lines, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for start, end in constant_ranges(lines):
                entries = os.pread(
                    pagemap.fileno(), _pages(end - start) * _ENTRY_SIZE, _pages(start) * _ENTRY_SIZE
                )
                if are_of_file(entries):
                    _libc.madvise(start, end - start, mmap.MADV_DONTNEED)
    except OSError:
        return


def constant_ranges(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Address ranges (start, end) of what cannot be written to of files, from the lines of /proc/PID/maps."""
    for line in maps:
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        if access in ("r-xp", "r--p") and inode != "0":
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16)


def are_of_file(entries: bytes) -> bool:
    """Whether all pages of a mapping, given its entries in /proc/PID/pagemap, are as in the file: relocated
    data that was closed afterwards has pages of its own, which would be lost.
    """
    return not any(
        entry & _SWAPPED or (entry & _PRESENT and not entry & _OF_FILE)
        for entry in memoryview(entries).cast("Q")
    )


def _pages(size: int) -> int:
    return size // _PAGE_SIZE
