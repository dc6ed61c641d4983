"""Membership in control groups on the real cgroup v2 of this machine: start, restart, stop, the node's death.

What the kernel does with limits is not checked here: the controllers may be bound to cgroup v1.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.compute_node.cgroups import Cgroups, look_at_machine, prepare_cgroups, remove_cgroups
from excimer.compute_node.resources import Resources
from excimer.compute_node.shell import ComputeNode
from excimer.io.cgroup_files import read_words
from excimer.wire.compute_orders import StopOrder
from tests.unit.compute_node.test_orders import STOP, Home, until


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Cgroups]:
    made = prepare_cgroups(tmp_path / "endpoints", None, look_at_machine())
    if made.directory is None:
        pytest.skip(f"no groups can be made here: {made.lacks['cpu']}")
    yield made
    assert not made.groups(), "nothing leaks"
    made.leave()
    assert not made.directory.exists()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def members(groups: Cgroups, name: str) -> list[int]:
    group = groups.groups().get(name)
    return [] if group is None else sorted(map(int, read_words(group.path / "cgroup.procs")))


def test_a_manager_and_all_that_it_starts_are_in_its_group(groups: Cgroups, home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        started = await node.start(home.order("main", postgres_settings={"child": "sleeper"}))
        assert len(members(groups, "main")) == 2, "it and its child"
        assert started.pid in members(groups, "main")
        await node.start(home.order("main", 2))
        assert home.pid("main") in members(groups, "main"), "a restart's too"
        assert started.pid not in members(groups, "main")
        await node.stop("main", StopOrder(generation=2, is_immediate=False))
        assert not groups.groups()

    home.play(story, resources=Resources(groups))


def test_the_group_goes_with_a_manager_that_ends_by_itself(groups: Cgroups, home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        started = await node.start(home.order("main"))
        os.kill(started.pid, signal.SIGKILL)
        await until(lambda: not groups.groups())
        await node.start(home.order("main", 2))
        assert home.pid("main") in members(groups, "main")

    home.play(story, resources=Resources(groups))


def test_what_is_left_in_it_is_killed(groups: Cgroups, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in a session of its own, that nobody knows any more."""
    monkeypatch.setattr("excimer.compute_node.resources.RELEASE_LIMIT_S", 0.1)

    async def story(node: ComputeNode) -> None:
        started = await node.start(home.order("main", postgres_settings={"child": "stray"}))
        os.kill(started.pid, signal.SIGKILL)
        await until(lambda: not groups.groups())

    home.play(story, resources=Resources(groups))


def test_what_a_whole_installation_leaves_is_removed(groups: Cgroups, home: Home, tmp_path: Path) -> None:
    """Its node was killed, or ended before its endpoints did."""

    async def story(node: ComputeNode) -> None:
        await node.start(home.order("main", postgres_settings={"child": "stray"}))
        await node.start(home.order("other"))

    home.play(story, leaves=True, resources=Resources(groups))
    for name in ("main", "other"):
        os.kill(home.pid(name) or 0, signal.SIGKILL)
    assert remove_cgroups(tmp_path / "endpoints", None, look_at_machine())
    assert groups.directory is not None
    assert not groups.directory.exists()
    assert remove_cgroups(tmp_path / "endpoints", None, look_at_machine()), "it may be repeated"


def test_a_node_that_comes_back_adopts_groups_and_removes_those_of_nobody(
    groups: Cgroups, home: Home
) -> None:
    async def before(node: ComputeNode) -> None:
        await node.start(home.order("main"))
        await node.start(home.order("other"))

    async def after(node: ComputeNode) -> None:
        await until(lambda: groups.groups().keys() == {"main"})
        assert members(groups, "main") == [home.pid("main")]
        await node.stop("main", STOP)
        assert not groups.groups()

    home.play(before, leaves=True, resources=Resources(groups))
    assert members(groups, "main") == [home.pid("main")], "groups outlive their node as managers do"
    os.kill(home.pid("other") or 0, signal.SIGKILL)
    home.play(after, resources=Resources(groups))
