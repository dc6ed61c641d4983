"""The engine's model against engines that are broken on purpose, within some times its usual examples.

Each new rule of the model changes which example comes upon a defect: usually one of the first few dozen.
"""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from excimer.base.errors import ExcimerError
from tests.kit.engine_mutants import MUTANTS, Mutant
from tests.property.test_engine_model import EXAMPLES, SETTINGS, EngineMachine

PATIENT = settings(SETTINGS, max_examples=5 * EXAMPLES)
"""The first example that notices is the last."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_engine_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ExcimerError)):
        run_state_machine_as_test(EngineMachine, settings=PATIENT)
