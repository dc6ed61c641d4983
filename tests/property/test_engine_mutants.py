"""The engine's model against engines that are broken on purpose, within its usual number of examples."""

import pytest
from hypothesis.stateful import run_state_machine_as_test

from excimer.base.errors import ExcimerError
from tests.kit.engine_mutants import MUTANTS, Mutant
from tests.property.test_engine_model import SETTINGS, EngineMachine


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_engine_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ExcimerError)):
        run_state_machine_as_test(EngineMachine, settings=SETTINGS)
