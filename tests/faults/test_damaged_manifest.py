"""A manifest that cannot be read: its timeline and what needs it are refused by name, all others are served.

::

    main --- a (damaged) --- b, c (archived)
      +----- d
      +----- e (archived)
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from excimer.base.errors import ConflictError, CorruptionError
from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectInfo, ObjectStoreError
from excimer.storage.engine.ancestor_detachment import AncestorDetachment
from excimer.storage.engine.errors import (
    BranchesUnknownError,
    TimelineArchivedError,
    TimelineDamagedError,
    TimelineExistsError,
    TimelineHasBranchesError,
    TimelineMissingError,
)
from excimer.storage.engine.garbage_collector import GcStandsStillError
from excimer.storage.engine.manifest_store import OvertakenError, timeline_prefix
from excimer.storage.format.manifest import pack_manifest, unpack_manifest
from tests.kit.directories import new_memory_directory
from tests.kit.engine_world import EngineWorld
from tests.kit.io_faults import CrashError
from tests.kit.storage_world import MAIN, START, TENANT

REGIONS = ("words", "version", "checksum", "beginning", "layers", "end", "empty", "cut", "half a line")


class Tree(EngineWorld):
    """See the module. Archived timelines have no oracle beside `archived`."""

    a: TimelineId
    b: TimelineId
    d: TimelineId
    archived: dict[str, TimelineId]

    def grow(self) -> None:
        self.create()
        self.archived = {}
        self._write(MAIN)
        self.a = self._branch(MAIN)
        self._write(MAIN)
        self.b, archived = self._branch(self.a), self._branch(self.a)
        self._archive("c", archived)
        self.d, archived = self._branch(MAIN), self._branch(MAIN)
        self._archive("e", archived)
        for each in (self.a, self.b, self.d, MAIN):
            self._write(each)

    def _write(self, timeline_id: TimelineId) -> None:
        for _ in range(2):
            self.put(timeline_id, 25)
            self.flush(timeline_id)

    def _branch(self, ancestor_id: TimelineId) -> TimelineId:
        self.branch(ancestor_id, self.oracles[ancestor_id].last_lsn)
        return list(self.oracles)[-1]

    def _archive(self, name: str, timeline_id: TimelineId) -> None:
        self.runner.run(self.tenant.archive_timeline(timeline_id))
        self.runner.run(self.tenant.offload_timeline(timeline_id))
        self.archived[name] = timeline_id
        del self.oracles[timeline_id], self.durable[timeline_id]

    def attach_again(self) -> None:
        """Another process of the same generation; nothing is flushed before."""
        self.process = self._new_process(self.process.directory, self.process.generation)
        self._attach()
        for timeline_id in self.served:
            oracle = self.oracles.get(timeline_id)
            if oracle is not None:
                timeline = self.timeline(timeline_id)
                self.put_after(timeline, oracle, timeline.last_record_lsn)

    @property
    def served(self) -> list[TimelineId]:
        return [each for each in self.oracles if each in self.tenant.timelines]

    def layers_of(self, timeline_id: TimelineId) -> set[str]:
        prefix = f"{timeline_prefix(TENANT, timeline_id)}/layers/"
        return {name for name in self.objects.objects if name.startswith(prefix)}


@contextmanager
def grown_tree() -> Iterator[Tree]:
    tree = Tree(new_memory_directory("excimer-damaged-manifest-"), seed=5)
    try:
        tree.grow()
        yield tree
    finally:
        tree.close()


def harmed(data: bytes, region: str, chance: random.Random) -> bytes:
    first_line = data.index(b"\n") + 1
    if region in ("empty", "cut", "half a line"):
        return data[: {"empty": 0, "cut": len(data) // 2, "half a line": first_line - 4}[region]]
    start, end = {
        "words": (0, 14),
        "version": (14, 15),
        "checksum": (16, first_line),
        "beginning": (first_line, first_line + 200),
        "layers": (data.index(b'"layers"'), data.index(b'"archived"')),
        "end": (len(data) - 40, len(data)),
    }[region]
    at = chance.randrange(start, end)
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :]


def damage_a(tree: Tree) -> tuple[str, bytes]:
    """The name of the object and what it was."""
    name = tree.newest_manifest(tree.a)
    intact = tree.objects.objects[name]
    tree.objects.objects[name] = harmed(intact, "layers", tree.chance)
    tree.attach_again()
    return name, intact


@pytest.mark.parametrize("region", REGIONS)
def test_whatever_is_wrong_with_it_only_those_that_need_it_are_refused(region: str) -> None:
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        intact = tree.objects.objects[name]
        for seed in range(3):
            tree.objects.objects[name] = harmed(intact, region, random.Random(f"{region} {seed}"))
            tree.attach_again()
            assert set(tree.tenant.damaged) == {tree.a, tree.b, tree.archived["c"]}
            for each in tree.tenant.damaged:
                with pytest.raises(TimelineDamagedError, match=name) as caught:
                    tree.timeline(each)
                assert isinstance(caught.value, CorruptionError)
            assert tree.served == [MAIN, tree.d]
            assert set(tree.tenant.archived) == {tree.archived["e"]}
            tree.check_all(moments=1)
        tree.objects.objects[name] = intact
        tree.attach_again()
        assert not tree.tenant.damaged
        tree.check_all(moments=1)


def test_a_damaged_root_takes_all_along_and_the_tenant_is_attached_all_the_same() -> None:
    with grown_tree() as tree:
        name = tree.newest_manifest(MAIN)
        intact = tree.objects.objects[name]
        tree.objects.objects[name] = b""
        tree.attach_again()
        assert not tree.tenant.timelines
        assert not tree.tenant.archived
        assert set(tree.tenant.damaged) == {*tree.oracles, *tree.archived.values()}
        tree.objects.objects[name] = intact
        tree.attach_again()
        tree.check_all(moments=1)


def test_a_manifest_that_another_program_wrote_is_left_alone() -> None:
    """Of a format that is newer: an older pageserver must not make anything of it."""
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        tree.objects.objects[name] = tree.objects.objects[name].replace(
            b"excimer index 1", b"excimer index 2"
        )
        tree.attach_again()
        with pytest.raises(TimelineDamagedError, match="version 2"):
            tree.timeline(tree.a)


def test_a_manifest_of_another_timeline_is_not_taken() -> None:
    """Somebody put a copy back in the wrong place."""
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        tree.objects.objects[name] = tree.objects.objects[tree.newest_manifest(tree.d)]
        tree.attach_again()
        with pytest.raises(TimelineDamagedError, match="another timeline's"):
            tree.timeline(tree.a)
        tree.check_all(moments=0)


def test_work_goes_on_beside_it_and_nothing_of_it_is_lost() -> None:
    with grown_tree() as tree:
        before = {each: tree.layers_of(each) for each in (tree.a, tree.b)}
        name, intact = damage_a(tree)
        for _ in range(3):
            for each in (MAIN, tree.d):
                tree.put(each, 30)
                tree.flush(each)
                tree.compact(each)
        tree.branch(MAIN, tree.oracles[MAIN].last_lsn)
        tree.branch(tree.d, tree.oracles[tree.d].last_lsn)
        tree.put(list(tree.oracles)[-1], 20)
        tree.check_all(moments=2)
        assert before == {each: tree.layers_of(each) for each in (tree.a, tree.b)}
        tree.objects.objects[name] = intact
        tree.attach_again()
        assert tree.served == list(tree.oracles)
        tree.check_all(moments=2)


def test_what_needs_all_branches_waits() -> None:
    with grown_tree() as tree:
        damage_a(tree)
        main, tenant = tree.timeline(MAIN), tree.tenant
        oldest_lsn, layers = main.manifest.oldest_lsn, tree.layers_of(MAIN)
        tree.pass_lease_length()
        for waiting in (
            main.collect_garbage(main.last_record_lsn),
            tree.timeline(tree.d).collect_garbage(main.last_record_lsn),
        ):
            with pytest.raises(GcStandsStillError, match=tree.a) as caught:
                tree.runner.run(waiting)
            assert isinstance(caught.value, ConflictError)
        assert (main.manifest.oldest_lsn, tree.layers_of(MAIN)) == (oldest_lsn, layers)
        assert main.retention.cutoff_lsn == oldest_lsn, "a cutoff was announced"
        for refused in (
            tenant.detach_ancestor(tree.d),
            tenant.archive_timeline(tree.d),
            tenant.delete_timeline(tree.d),
            tenant.delete_timeline(tree.archived["e"]),
        ):
            with pytest.raises(BranchesUnknownError, match=f"{tree.a} is damaged"):
                tree.runner.run(refused)
        tree.runner.run(tenant.unarchive_timeline(tree.archived["e"]))
        with pytest.raises(TimelineDamagedError):
            tree.runner.run(tenant.branch_timeline(TimelineId("f" * 32), tree.a))
        with pytest.raises(TimelineDamagedError):
            tree.runner.run(tenant.branch_timeline(tree.a, MAIN))
        with pytest.raises(TimelineMissingError):
            tree.runner.run(tenant.delete_timeline(TimelineId("f" * 32)))
        tree.check_all(moments=1)


def test_its_user_gives_up_on_it_and_collection_goes_on() -> None:
    with grown_tree() as tree:
        damage_a(tree)
        tenant = tree.tenant
        with pytest.raises(TimelineHasBranchesError):
            tree.runner.run(tenant.delete_timeline(tree.a))
        for each in (tree.b, tree.archived["c"]):
            tree.runner.run(tenant.delete_timeline(each))
            with pytest.raises(TimelineMissingError):
                tree.timeline(each)
            tree.pass_lease_length()
            with pytest.raises(GcStandsStillError):
                tree.runner.run(tree.timeline(MAIN).collect_garbage(Lsn(START)))
        tree.runner.run(tenant.delete_timeline(tree.a))
        assert not tenant.damaged
        assert not tree.layers_of(tree.a) | tree.layers_of(tree.b)
        for each in (tree.a, tree.b):
            del tree.oracles[each]
        before = tree.layers_of(MAIN)
        for each in (MAIN, tree.d) * 3:
            tree.put(each, 40)
            tree.flush(each)
            tree.compact(each)
            tree.collect(each, 0)
        assert tree.timeline(MAIN).manifest.oldest_lsn > START
        assert before - tree.layers_of(MAIN), "nothing was collected"
        tree.runner.run(tenant.detach_ancestor(tree.d))
        tree.check_all(moments=1)
        tree.attach_again()
        with pytest.raises(TimelineExistsError, match="deleted"):
            tree.runner.run(tree.tenant.branch_timeline(tree.a, MAIN))
        tree.check_all(moments=1)


def test_a_crash_anywhere_in_its_deletion() -> None:
    """Afterwards it is damaged still, or gone, and can be deleted."""
    operation = 0
    while True:
        operation += 1
        with grown_tree() as tree:
            name = tree.newest_manifest(tree.b)
            tree.objects.objects[name] = b""
            tree.attach_again()
            deletion = tree.tenant.delete_timeline(tree.b)
            tree.process.fault.crash_in(operation)
            try:
                tree.runner.run(deletion)
                break
            except CrashError:
                tree.attach_again()
            if tree.b in tree.tenant.damaged:
                tree.runner.run(tree.tenant.delete_timeline(tree.b))
            assert not tree.tenant.damaged
            assert not tree.layers_of(tree.b)
            del tree.oracles[tree.b]
            tree.check_all(moments=0)
    assert operation > 4


def test_two_damaged_manifests() -> None:
    """Each may branch from anywhere: collection waits for both."""
    with grown_tree() as tree:
        intact = {}
        for each in (tree.b, tree.d):
            name = tree.newest_manifest(each)
            intact[name] = tree.objects.objects[name]
            tree.objects.objects[name] = b"?"
        tree.attach_again()
        assert set(tree.tenant.damaged) == {tree.b, tree.d}
        tree.check_all(moments=0)
        tree.pass_lease_length()
        tree.runner.run(tree.tenant.delete_timeline(tree.d))
        with pytest.raises(GcStandsStillError, match=tree.b):
            tree.runner.run(tree.timeline(MAIN).collect_garbage(Lsn(START)))
        name = tree.newest_manifest(tree.b)
        tree.objects.objects[name] = intact[name]
        del tree.oracles[tree.d]
        tree.attach_again()
        tree.collect(MAIN, 0)
        tree.check_all(moments=1)


def test_a_damaged_archived_timeline() -> None:
    """Nobody knows that it is archived; after its repair it is again."""
    with grown_tree() as tree:
        e = tree.archived["e"]
        name = tree.newest_manifest(e)
        intact = tree.objects.objects[name]
        tree.objects.objects[name] = intact[:-3]
        tree.attach_again()
        assert set(tree.tenant.damaged) == {e}
        with pytest.raises(TimelineDamagedError, match=name):
            tree.runner.run(tree.tenant.unarchive_timeline(e))
        tree.objects.objects[name] = intact
        tree.attach_again()
        with pytest.raises(TimelineArchivedError):
            tree.timeline(e)


def test_a_manifest_that_is_damaged_while_its_timeline_is_served() -> None:
    """Nobody reads it; the next one takes its place. A restart before that finds it, one after it not."""
    for is_flushed in (True, False):
        with grown_tree() as tree:
            name = tree.newest_manifest(tree.a)
            tree.objects.objects[name] = b""
            tree.put(tree.a, 10)
            tree.check_all(moments=0)
            if is_flushed:
                tree.flush(tree.a)
            tree.attach_again()
            assert (tree.a in tree.tenant.damaged) != is_flushed
            tree.check_all(moments=0)


def test_an_archived_timeline_whose_manifest_is_damaged_while_it_is_attached() -> None:
    """Its branch point is known: nothing has to wait. It cannot be taken back, and stays what it is."""
    with grown_tree() as tree:
        e = tree.archived["e"]
        name = tree.newest_manifest(e)
        intact = tree.objects.objects[name]
        tree.objects.objects[name] = b""
        for attempt in (tree.tenant.unarchive_timeline, tree.tenant.delete_timeline):
            with pytest.raises(CorruptionError, match=name):
                tree.runner.run(attempt(e))
        tree.objects.objects[name] = intact
        tree.runner.run(tree.tenant.unarchive_timeline(e))


def test_damage_on_the_way_is_read_again() -> None:
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        intact = tree.objects.objects[name]
        get, reads = tree.objects.get, []

        def damaged_once(asked: str) -> bytes:
            if asked == name:
                reads.append(asked)
                return intact[:100] if len(reads) == 1 else intact
            return get(asked)

        tree.patch.setattr(tree.objects, "get", damaged_once)
        tree.attach_again()
        assert len(reads) == 2
        assert not tree.tenant.damaged
        tree.check_all(moments=0)


def test_an_object_store_that_fails_says_nothing_about_a_timeline() -> None:
    """Even beside damage: the attachment is to be tried again."""
    with grown_tree() as tree:
        damaged, unreadable = tree.newest_manifest(tree.a), tree.newest_manifest(tree.d)
        intact, get = tree.objects.objects[damaged], tree.objects.get
        tree.objects.objects[damaged] = b""

        def failing(asked: str) -> bytes:
            if asked == unreadable:
                raise ObjectStoreError("503 slow down")
            return get(asked)

        tree.patch.setattr(tree.objects, "get", failing)
        with pytest.raises(ObjectStoreError, match="slow down"):
            tree.attach_again()
        tree.patch.setattr(tree.objects, "get", get)
        tree.attach_again()
        assert tree.served == [MAIN, tree.d]
        tree.objects.objects[damaged] = intact
        tree.attach_again()
        tree.check_all(moments=0)


def hide(tree: Tree, timeline_id: TimelineId, listings: int) -> None:
    """So many listings do not have it."""
    listing = tree.objects.list
    left = [listings]

    def lagging(prefix: str) -> list[ObjectInfo]:
        infos = listing(prefix)
        shown = [info for info in infos if timeline_id not in info.name]
        left[0] -= shown != infos
        return infos if left[0] < 0 else shown

    tree.patch.setattr(tree.objects, "list", lagging)


@pytest.mark.parametrize("listings", [1, 2])
def test_an_ancestor_that_a_listing_lacks_is_no_damage(listings: int) -> None:
    """It is looked for by itself; what is there by name and in no listing is a reason to try again."""
    with grown_tree() as tree:
        hide(tree, tree.a, listings)
        if listings > 1:
            with pytest.raises(ObjectStoreError, match="lags behind"):
                tree.attach_again()
        tree.attach_again()
        assert not tree.tenant.damaged
        tree.check_all(moments=0)


def test_an_ancestor_without_manifest() -> None:
    """Lost, with all its manifests: who needs it is told, and nobody's history goes."""
    with grown_tree() as tree:
        prefix = f"{timeline_prefix(TENANT, tree.a)}/index-"
        lost = {name: data for name, data in tree.objects.objects.items() if name.startswith(prefix)}
        for name in lost:
            del tree.objects.objects[name]
        layers = tree.layers_of(tree.a)
        tree.attach_again()
        assert set(tree.tenant.damaged) == {tree.b, tree.archived["c"]}
        with pytest.raises(TimelineDamagedError, match=f"{tree.a}, which has no manifest"):
            tree.timeline(tree.b)
        with pytest.raises(GcStandsStillError):
            tree.runner.run(tree.timeline(MAIN).collect_garbage(Lsn(START)))
        assert tree.layers_of(tree.a) == layers
        tree.objects.objects.update(lost)
        tree.attach_again()
        tree.check_all(moments=0)


def test_a_live_branch_of_an_archived_timeline_is_damage() -> None:
    """No change leads there; whoever finds it must not stumble."""
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        manifest = unpack_manifest(tree.objects.objects[name], name)
        tree.objects.objects[name] = pack_manifest(msgspec.structs.replace(manifest, archived=True))
        tree.attach_again()
        assert set(tree.tenant.damaged) == {tree.b}
        with pytest.raises(TimelineDamagedError, match=f"{tree.a}, which is archived"):
            tree.timeline(tree.b)
        tree.check_all(moments=0)


def test_siblings_are_not_forgotten_by_a_detachment() -> None:
    """One that was broken off goes on when the damaged timeline, a sibling, is known again."""

    async def broken_off(*arguments: object) -> list[TimelineId]:
        raise ObjectStoreError("a lost connection")

    with grown_tree() as tree:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AncestorDetachment, "reparent_siblings", broken_off)
            with pytest.raises(ObjectStoreError, match="lost connection"):
                tree.runner.run(tree.tenant.detach_ancestor(tree.d))
        name, intact = damage_a(tree)
        assert tree.timeline(tree.d).ancestor is None
        assert tree.timeline(tree.d).manifest.detachment is not None
        tree.check_all(moments=1)
        tree.objects.objects[name] = intact
        tree.attach_again()
        assert tree.timeline(tree.d).manifest.detachment is None
        assert tree.timeline(tree.a).ancestor is tree.timeline(tree.d)
        tree.check_all(moments=1)


def test_damaged_settings() -> None:
    """All is served by the defaults, and no history goes until the settings are set anew."""
    with grown_tree() as tree:
        tree.runner.run(tree.tenant.set_settings({"gc_horizon_bytes": 1 << 40}))
        name = max(each for each in tree.objects.objects if "/settings-" in each)
        for data in (b"", tree.objects.objects[name][:-2], tree.objects.objects[name].replace(b"9", b"8")):
            tree.objects.objects[name] = data
            tree.attach_again()
            assert not tree.tenant.damaged
            assert name in (tree.tenant.settings.damage or "")
            tree.check_all(moments=0)
            with pytest.raises(GcStandsStillError, match=name):
                tree.runner.run(tree.timeline(MAIN).collect_garbage(Lsn(START)))
        tree.runner.run(tree.tenant.detach_ancestor(tree.d))  # branches are known
        tree.runner.run(tree.tenant.set_settings({"gc_horizon_bytes": 5}))
        tree.collect(MAIN, 0)
        tree.attach_again()
        assert tree.tenant.settings.overrides == {"gc_horizon_bytes": 5}
        tree.check_all(moments=1)


def test_what_the_marker_of_a_tenant_says_does_not_matter() -> None:
    with grown_tree() as tree:
        tree.objects.objects[f"tenants/{TENANT}/tenant"] = b"\0\0\0"
        tree.attach_again()
        tree.check_all(moments=0)


def test_an_older_generation_still_works_on_it() -> None:
    """It has the whole manifest in memory. The newer one neither claims nor removes anything; what the older
    one writes afterwards is the newest, and the next attachment serves it.
    """
    with grown_tree() as tree:
        name = tree.newest_manifest(tree.a)
        intact = tree.objects.objects[name]
        tree.objects.objects[name] = b""
        older = tree.process
        assert older.tenant is not None
        tree.process = tree._new_process(tree.directory / "newer", 2)
        tree._attach()
        assert set(tree.tenant.damaged) == {tree.a, tree.b, tree.archived["c"]}
        assert tree.newest_manifest(tree.a) == name, "a damaged timeline was claimed"
        a = older.tenant.timeline(tree.a)
        tree.oracles[tree.a].next_values(tree.chance, 20)
        tree.put_after(a, tree.oracles[tree.a], a.last_record_lsn)
        tree.runner.run(a.flush())
        while tree.runner.run(a.compact()):
            pass
        a.deletions.drain()
        main = older.tenant.timeline(MAIN)
        main.deletions.add(main.stack.files.values())
        with pytest.raises(OvertakenError):  # main is the newer one's
            main.deletions.drain()
        assert intact != tree.objects.objects[tree.newest_manifest(tree.a)]
        tree.process = tree._new_process(tree.directory / "newest", 3)
        tree._attach()
        assert not tree.tenant.damaged
        for each in tree.served:
            timeline = tree.timeline(each)
            tree.put_after(timeline, tree.oracles[each], timeline.last_record_lsn)
        tree.check_all(moments=1)


def test_an_older_generation_does_not_delete_what_a_newer_one_serves() -> None:
    """It found damage; then that was repaired, and a newer generation attached."""
    with grown_tree() as tree:
        name, intact = damage_a(tree)
        older = tree.tenant
        tree.runner.run(older.delete_timeline(tree.archived["c"]))
        tree.objects.objects[name] = intact
        tree.process = tree._new_process(tree.directory / "newer", 2)
        tree._attach()
        for each in (tree.b, tree.a):
            with pytest.raises((OvertakenError, TimelineHasBranchesError)):
                tree.runner.run(older.delete_timeline(each))
        for each in tree.served:
            timeline = tree.timeline(each)
            tree.put_after(timeline, tree.oracles[each], timeline.last_record_lsn)
        assert tree.served == list(tree.oracles)
        tree.check_all(moments=1)
