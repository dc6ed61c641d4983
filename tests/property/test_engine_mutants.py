"""The engine's model against engines that are broken on purpose, within some times its usual examples.

Here the model does mostly what a defect needs, in rounds of few examples that have nothing in common: one
long run varies what it has found, and may stay with what does not show the defect. With
EXCIMER_ENGINE_EXAMPLES it does all that it can, as it always does on the whole engine.
"""

import os
from collections.abc import Mapping
from typing import Final

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from excimer.base.errors import ExcimerError
from tests.kit.engine_mutants import MUTANTS, Mutant
from tests.property.test_engine_model import EXAMPLES, SETTINGS, EngineMachine

PATIENCE: Final = 5 * EXAMPLES
"""Examples. The first that notices is the last."""
ROUND: Final = 12

NEEDED: Final[Mapping[str, str]] = {
    "rounds_lose_tombstones": "put_and_flush compact branch read_everything",
    "rounds_cover_more_than_they_hold": "put_and_flush compact branch read_everything",
    "collection_ignores_branch_points": "put_and_flush compact branch collect",
    "collection_ignores_leases": "put_and_flush compact lease collect",
    "restart_forgets_leases": "put_and_flush lease collect restart",
    "cutoff_is_not_durable": "put_and_flush collect restart crash",
    "layers_are_deleted_before_the_manifest_says_so": "put_and_flush compact collect crash",
}
"""Rules of the model, for defects that need several of them; the others are noticed by whatever happens."""


def machine_for(mutant: Mutant) -> type[EngineMachine]:
    rules = {rule.function.__name__ for rule in EngineMachine.setup_state().rules}
    needed = set(NEEDED.get(mutant.__name__, " ".join(rules)).split())
    assert needed <= rules
    return type("FocusedMachine", (EngineMachine,), dict.fromkeys(rules - needed))


def run_model(mutant: Mutant) -> None:
    if "EXCIMER_ENGINE_EXAMPLES" in os.environ:
        run_state_machine_as_test(EngineMachine, settings=settings(SETTINGS, max_examples=PATIENCE))
        return
    machine = machine_for(mutant)
    for number in range(PATIENCE // ROUND):
        run_state_machine_as_test(seed(number)(machine), settings=settings(SETTINGS, max_examples=ROUND))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_engine_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ExcimerError)):
        run_model(mutant)
