"""The engine's model with manifests that come to be damaged, and are repaired or given up.

All that `test_engine_model` does happens meanwhile to what is still served; what was damaged is whole
afterwards.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from excimer.base.errors import ExcimerError
from excimer.base.ids import TimelineId
from tests.kit.engine_mutants import collection_goes_on_beside_damage
from tests.property.test_engine_model import EXAMPLES, SETTINGS, EngineMachine

DAMAGE_SETTINGS = settings(SETTINGS, max_examples=EXAMPLES // 3)


class DamagedEngineMachine(EngineMachine):
    @precondition(lambda self: not self.world.harmed)
    @rule(data=st.data(), collections=st.integers(0, 3), stays=st.booleans())
    def damage(self, data: st.DataObject, collections: int, stays: bool) -> None:
        """A branch's manifest; its root is still served."""
        world = self.world
        if not self.branches():
            ancestor_id = self.any_timeline(data)
            world.branch(ancestor_id, self.any_record_end(data, ancestor_id))
        damaged_id = data.draw(st.sampled_from(self.branches()))
        ancestor = world.timeline(damaged_id).ancestor
        assert ancestor is not None
        world.damage(damaged_id)
        for _ in range(collections):  # where its branch point lies
            world.put(ancestor.timeline_id, 15)
            world.flush(ancestor.timeline_id)
            world.collect(ancestor.timeline_id, 0)
        if not stays:
            self.repair()

    @precondition(lambda self: self.world.harmed)
    @rule()
    def repair(self) -> None:
        self.world.repair()
        self.world.check_all(moments=0)

    def branches(self) -> list[TimelineId]:
        """Timelines with an ancestor."""
        return [each for each in self.world.served if self.world.timeline(each).ancestor is not None]


DamagedEngineMachine.TestCase.settings = DAMAGE_SETTINGS
TestDamagedEngine = DamagedEngineMachine.TestCase


def test_a_collection_that_does_not_stand_still_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    collection_goes_on_beside_damage(monkeypatch)
    with pytest.raises((AssertionError, ExcimerError)):
        run_state_machine_as_test(DamagedEngineMachine, settings=SETTINGS)
