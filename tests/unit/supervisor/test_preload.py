"""What forks of the supervisor make lies in pages of their own, not in holes of those that they share; and
they share nothing that none of them uses.
"""

import subprocess
import sys

PAGES = """
import sys

def pages_of(objects):
    return {page for each in objects
            for page in range(id(each) >> 12, (id(each) + sys.getsizeof(each) - 1 >> 12) + 1)}

def make(sizes, count):
    return [b"x" * (size - sys.getsizeof(b"")) for _ in range(count) for size in sizes]
"""

HOLES = """
from excimer._native.heap_holes import {fill}
old = make({sizes}, 2000)
del old[::2], old[::3]
taken = {fill}()
shared = pages_of(make({sizes}, 200)) & pages_of(old)
print(taken, len(shared))
"""

PRELOADED = """
from excimer.supervisor.preload import preload
preload()
for sizes in (48,), (64,), (80,), (160,), (700,), (3000,):
    new = make(sizes, 3000)
    print(sizes, len(pages_of(new)), 3000 * sizes[0] // 4096)
"""

LOADED = """
import sys
from excimer.supervisor.preload import preload
preload()
print(*(name for name, module in sys.modules.items() if module is not None and name.startswith({unused!r})))
"""

COMPLETED = """
import sys
from excimer.supervisor.preload import preload
preload()
from excimer.controller.process import make_app as controller
from excimer.pageserver.shell import make_app as pageserver
from excimer.safekeeper.shell import make_app as safekeeper
from excimer.service.http import complete_routes

calls = 0
def count(_frame, event, _argument):
    global calls
    calls += event == "call"

for app in controller.prepare(), pageserver.prepare(), safekeeper.prepare():
    before = calls
    sys.setprofile(count)
    complete_routes(app)
    sys.setprofile(None)
    print(calls - before, len(list(app.routes)))
"""


def run(code: str) -> str:
    """In a process of its own: what is taken is never given back."""
    command = [sys.executable, "-c", PAGES + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_small_objects_leave_the_pages_of_others_alone() -> None:
    taken, shared = map(int, run(HOLES.format(fill="fill_object_holes", sizes=[48, 80, 208, 480])).split())
    assert (taken > 800_000, shared) == (True, 0)


def test_large_objects_leave_the_pages_of_others_alone() -> None:
    """But for the last page, which the heap's end may divide."""
    taken, shared = map(int, run(HOLES.format(fill="fill_heap_holes", sizes=[600, 1500, 5000])).split())
    assert (taken > 5_000_000, shared <= 1) == (True, True), (taken, shared)


def test_forks_of_the_supervisor_begin_new_pages() -> None:
    for line in run(PRELOADED).splitlines():
        *_, pages, least = line.split()
        assert int(pages) <= int(least) * 1.05 + 4, line


def test_what_no_service_uses_is_not_loaded() -> None:
    """And the applications of all services are put together without it."""
    assert run(LOADED.format(unused=("pydantic.v1",))).split() == []


def test_the_applications_are_complete_before_services_are_forked() -> None:
    """The first time takes 6,000 to 70,000 calls."""
    for line in run(COMPLETED).splitlines():
        assert int(line.split()[0]) < 1000, line
