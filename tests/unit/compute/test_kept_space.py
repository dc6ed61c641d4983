"""Directories of stopped endpoints: the oldest go first, none that is in use, and never half of one."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.compute.directory_lock import DirectoryBusyError, directory_lock
from excimer.compute.kept_directory import discard, hide, remove_hidden, take_reason, write_record
from excimer.compute.kept_space import MADE_ROOM, find_kept, keep_within
from excimer.compute.kept_space_plan import KeptEntry, plan_removals
from excimer.compute.places import ComputePlaces, find_places
from excimer.compute.server_certificate import CertificatePair, install_pair
from tests.unit.compute.test_warm_start import RECORD

SIZES = st.integers(0, 1000)
KEPT = st.lists(st.tuples(st.floats(0, 1e6), SIZES), max_size=8).map(
    lambda rows: [KeptEntry(Path(f"/e/{number}"), *row) for number, row in enumerate(rows)]
)


@given(kept=KEPT, most=SIZES, free=SIZES, free_min=SIZES)
def test_as_few_as_are_needed_go_and_they_are_the_oldest(
    kept: list[KeptEntry], most: int, free: int, free_min: int
) -> None:
    gone = plan_removals(kept, size_bytes_max=most, free_bytes=free, free_bytes_min=free_min)
    left = [entry for entry in kept if entry not in gone]

    def is_enough(removed: list[KeptEntry]) -> bool:
        size = sum(entry.size_bytes for entry in removed)
        return sum(entry.size_bytes for entry in kept) - size <= most and free + size >= free_min

    assert is_enough(gone) or not left
    assert not gone or not is_enough(gone[:-1])
    assert all(old.stopped_at_s <= young.stopped_at_s for old in gone for young in left)


def keep(endpoints: Path, name: str, stopped_at_s: float) -> ComputePlaces:
    (endpoints / name).mkdir(parents=True)
    places = find_places(endpoints / name)
    places.data_dir.mkdir()
    (places.data_dir / "file").write_text("content")
    places.arena.write_text("arena")
    install_pair(CertificatePair(b"certificate", b"key"), places.run_dir)
    write_record(places, msgspec.structs.replace(RECORD, stopped_at_s=stopped_at_s, size_bytes=100))
    return places


def test_the_oldest_are_removed_whole(tmp_path: Path) -> None:
    old, young = keep(tmp_path, "old", 1), keep(tmp_path, "young", 2)
    keep_within(tmp_path, 100, free_bytes_min=0)
    assert [entry.endpoint_dir.name for entry in find_kept(tmp_path)] == ["young"]
    assert list(old.run_dir.iterdir()) == []
    assert young.data_dir.exists()


def test_they_make_room_on_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    keep(tmp_path, "old", 1)
    keep_within(tmp_path, 1 << 40, free_bytes_min=1 << 60)
    assert list(find_kept(tmp_path)) == []
    places = find_places(tmp_path / "old")
    assert (take_reason(places), take_reason(places)) == (MADE_ROOM, None)


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    places = keep(tmp_path, "main", 1)
    with directory_lock(places.run_dir):
        keep_within(tmp_path, 0, free_bytes_min=0)
        assert (places.data_dir.exists(), places.shutdown_record.exists()) == (True, True)
        with pytest.raises(DirectoryBusyError), directory_lock(places.run_dir, wait_s=0):
            pass
    keep_within(tmp_path, 0, free_bytes_min=0)
    assert (places.data_dir.exists(), places.shutdown_record.exists()) == (False, False)


def test_a_removal_that_was_cut_short_is_finished_by_the_next(tmp_path: Path) -> None:
    places = keep(tmp_path, "main", 1)
    hide(places)
    assert [path.name.partition("-")[0] for path in places.run_dir.iterdir()] == ["removed"]
    discard(places)
    assert list(places.run_dir.iterdir()) == []
    remove_hidden(places.run_dir)


def test_a_directory_whose_record_cannot_be_read_goes_before_all_others(tmp_path: Path) -> None:
    keep(tmp_path, "young", 2)
    keep(tmp_path, "torn", 9).shutdown_record.write_text("{")
    keep_within(tmp_path, 99, free_bytes_min=0)
    assert list(find_kept(tmp_path)) == []


def test_a_directory_that_somebody_made_a_link_is_not_followed(tmp_path: Path) -> None:
    places = keep(tmp_path, "main", 1)
    target = tmp_path / "target"
    places.data_dir.rename(target)
    places.data_dir.symlink_to(target)
    discard(places)
    assert (target / "file").read_text() == "content"
    assert not places.data_dir.is_symlink()
