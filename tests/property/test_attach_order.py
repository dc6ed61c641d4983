"""Who is served beside damage: as a slow and obvious walk of each timeline's ancestors says."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from excimer.base.ids import TimelineId
from excimer.storage.format.manifest import Manifest
from excimer.storage.plan.attach_order import missing_ancestors, plan_attach

IDS = [TimelineId(digit * 32) for digit in "12345678"]


def manifest(timeline_id: TimelineId, ancestor_id: TimelineId | None, *, archived: bool) -> Manifest:
    return Manifest(
        tenant_id="a" * 32,
        timeline_id=timeline_id,
        pg_version=18,
        system_id=1,
        wal_segment_size_bytes=1 << 24,
        oldest_lsn=8,
        disk_consistent_lsn=8,
        prev_record_lsn=0,
        ancestor_timeline_id=ancestor_id,
        archived=archived,
    )


def is_served(timeline_id: TimelineId, manifests: dict[TimelineId, Manifest]) -> bool:
    """A walk up to the root, over what can be read, and never from what is live to what is archived."""
    at: str | None = timeline_id
    has_met_live = False
    for _ in range(len(IDS) + 1):
        if at is None:
            return True
        found = manifests.get(TimelineId(at))
        if found is None or (has_met_live and found.archived):
            return False
        has_met_live = has_met_live or not found.archived
        at = found.ancestor_timeline_id
    return False  # round and round


@given(
    st.dictionaries(
        st.sampled_from(IDS), st.tuples(st.none() | st.sampled_from(IDS), st.booleans()), max_size=len(IDS)
    ),
    st.sets(st.sampled_from(IDS), max_size=3),
)
def test_everything_is_served_that_can_be(
    timelines: dict[TimelineId, tuple[TimelineId | None, bool]], unreadable: set[TimelineId]
) -> None:
    manifests = {
        each: manifest(each, ancestor, archived=archived)
        for each, (ancestor, archived) in timelines.items()
        if each not in unreadable
    }
    reasons = {each: f"object {each} is damaged" for each in unreadable}
    plan = plan_attach(manifests, reasons)
    assert set(plan.in_order) == {each for each in manifests if is_served(each, manifests)}
    assert set(plan.damaged) == (manifests.keys() | unreadable) - set(plan.in_order)
    for place, each in enumerate(plan.in_order):
        ancestor = manifests[each].ancestor_timeline_id
        assert ancestor is None or ancestor in plan.in_order[:place]
    for reason in plan.damaged.values():
        assert any(each in reason for each in IDS), "nobody is told what to repair"


def test_a_reason_names_the_object_however_far_up_it_is() -> None:
    chain = {each: manifest(each, before, archived=False) for before, each in pairwise(IDS)}
    plan = plan_attach(chain, {IDS[0]: "manifest index-1-2 is damaged"})
    assert plan.in_order == ()
    assert all("index-1-2" in plan.damaged[each] for each in IDS)
    assert missing_ancestors(chain, {}) == {IDS[0]}
    assert missing_ancestors(chain, plan.damaged) == set()


def test_deep_chains() -> None:
    """As deep as somebody may branch: no recursion."""
    ids = [TimelineId(f"{number:032x}") for number in range(5000)]
    chain = {
        each: manifest(each, before, archived=False) for before, each in zip([None, *ids], ids, strict=False)
    }
    backwards = dict(reversed(chain.items()))
    assert plan_attach(backwards, {}).in_order == tuple(ids)
    assert set(plan_attach(backwards, {ids[0]: "?"}).damaged) == set(ids)
