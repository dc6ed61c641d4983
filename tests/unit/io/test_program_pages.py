"""Which pages may be given back: those that are as they are in the file."""

import hashlib
import struct
from pathlib import Path

from excimer.io.program_pages import are_of_file, constant_ranges, release_program_pages

MAPS = """\
00400000-00401000 r--p 00000000 08:01 17 /usr/bin/python
00401000-00500000 r-xp 00001000 08:01 17 /usr/bin/python
00500000-00600000 rw-p 00100000 08:01 17 /usr/bin/python
00600000-00601000 r--s 00000000 08:01 18 /var/lib/state of things
7f0000000000-7f0000002000 r--p 00000000 00:00 0
7ffe00000000-7ffe00002000 r-xp 00000000 00:00 0 [vdso]
""".splitlines()
FILE = 1 << 63 | 1 << 61
OWN = 1 << 63
SWAPPED = 1 << 62
ABSENT = 0


def entries(*pages: int) -> bytes:
    return struct.pack(f"{len(pages)}Q", *pages)


def test_only_what_cannot_be_written_to_of_files() -> None:
    assert list(constant_ranges(MAPS)) == [(0x400000, 0x401000), (0x401000, 0x500000)]


def test_a_page_of_its_own_keeps_a_mapping() -> None:
    assert are_of_file(entries(FILE, ABSENT, FILE))
    assert not are_of_file(entries(FILE, OWN, ABSENT))
    assert not are_of_file(entries(FILE, SWAPPED))


def resident_kib() -> int:
    """Of the pages of files in this process."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(value[1]) for value in fields if value[0] == "RssFile:")


def test_code_is_given_back_and_still_runs() -> None:
    """OpenSSL, relocated tables and all, gives the same digests after its pages were taken away."""

    def digests() -> list[str]:
        return [hashlib.new(name, b"excimer").hexdigest() for name in ("md5", "sha1", "sha256", "sha512")]

    before = digests()
    resident_before = resident_kib()
    release_program_pages()
    assert resident_kib() < resident_before / 2
    assert digests() == before
