"""Two generations at work on one tenant at once, over many seeds (G1, D3). Rerun one: `run_seed(SEED)`."""

import os
import shutil
from collections import Counter
from collections.abc import Callable

import pytest

from excimer.base.errors import ExcimerError
from excimer.io.object_store import ObjectStore
from excimer.storage.engine import (
    attachment,
    claim,
    deletion_queue,
    leftovers,
    tenant,
    timeline_removal,
)
from excimer.storage.engine.manifest_store import (
    FoundManifest,
    TimelineObjects,
    find_newest_manifest,
    list_timeline,
)
from excimer.storage.format.manifest import MAX_GENERATION, Manifest, ManifestName, parse_manifest_name
from tests.kit.directories import new_memory_directory
from tests.simulation.two_pageservers import TwoPageservers

SEED_COUNT = int(os.environ.get("EXCIMER_GENERATION_SEEDS", "60"))
MUTANT_SEED_COUNT = 200


def run_seed(seed: int) -> TwoPageservers:
    directory = new_memory_directory("excimer-generations-")
    try:
        return TwoPageservers(seed, directory).run()
    finally:
        shutil.rmtree(directory)


def test_the_newer_generation_loses_nothing() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEED_COUNT):
        try:
            seen += run_seed(seed).seen
        except (AssertionError, ExcimerError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert seen["deletion fenced"] > SEED_COUNT // 10, "the two never meet"
    assert seen["victim gone before"] > SEED_COUNT // 10
    assert seen["newer branch"] > SEED_COUNT
    assert seen["killed"] > SEED_COUNT // 10


def test_a_seed_tells_the_same_story_twice() -> None:
    assert run_seed(3).baton.trace == run_seed(3).baton.trace != run_seed(4).baton.trace


def deletes_unasked(patch: pytest.MonkeyPatch) -> None:
    """D3 broken: nobody looks for a newer generation before deleting."""
    for module in (deletion_queue, tenant, timeline_removal):
        patch.setattr(module, "check_not_overtaken", lambda *arguments: None)


def sweeps_unasked(patch: pytest.MonkeyPatch) -> None:
    """D3 broken: what our manifest does not name goes, whoever else may have come to name it."""

    def listing(store: ObjectStore, *names: str | int) -> TimelineObjects:
        tenant_id, timeline_id, _ = map(str, names)
        return list_timeline(store, tenant_id, timeline_id, MAX_GENERATION)

    patch.setattr(leftovers, "check_not_overtaken", listing)


def looks_before_it_says_so(patch: pytest.MonkeyPatch) -> None:
    """A timeline's deletion looks for a newer generation before its manifest says so, not after."""
    patch.setattr(timeline_removal, "check_not_overtaken", lambda *arguments: None)


def claims_nothing(patch: pytest.MonkeyPatch) -> None:
    """A new generation reads the newest manifest and works on from there."""

    def found(*arguments: object) -> FoundManifest | None:
        return find_newest_manifest(*arguments)  # type: ignore[arg-type]

    patch.setattr(attachment, "claim_newest", found)


def claims_without_a_second_look(patch: pytest.MonkeyPatch) -> None:
    """What the older generation wrote between the newer one's reading and its claim is not seen."""

    def what_it_repeats(_: ObjectStore, claimed: Manifest, older: list[ManifestName]) -> FoundManifest:
        name = parse_manifest_name(claimed.claimed_from)
        assert name is not None
        return FoundManifest(name, claimed)

    patch.setattr(claim, "_find_settled", what_it_repeats)


def forgets_the_deleted(patch: pytest.MonkeyPatch) -> None:
    """No marker stays: what an older generation writes afterwards is a timeline again."""
    remove_leftovers = timeline_removal.remove_leftovers

    def remove_all(*arguments: object) -> None:
        remove_leftovers(*arguments)  # type: ignore[arg-type]
        context, tenant_id, timeline_id = arguments
        context.store.delete(timeline_removal._marker_name(tenant_id, timeline_id))  # type: ignore[attr-defined, arg-type]

    patch.setattr(timeline_removal, "remove_leftovers", remove_all)


MUTANTS: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    deletes_unasked,
    sweeps_unasked,
    looks_before_it_says_so,
    claims_nothing,
    claims_without_a_second_look,
    forgets_the_deleted,
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    for seed in range(MUTANT_SEED_COUNT):
        try:
            run_seed(seed)
        except (AssertionError, ExcimerError):
            return
    pytest.fail(f"{MUTANT_SEED_COUNT} seeds do not notice {mutant.__name__}")
