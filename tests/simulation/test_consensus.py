"""A fixed list of simulated worlds holds; worlds with a broken rule do not; a seed always tells one story."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from excimer.base.errors import CorruptionError
from tests.simulation.consensus_mutants import MUTANTS, NOTICED, Mutant, NeverPersistsVotes
from tests.simulation.consensus_world import World

SEED_COUNT = int(os.environ.get("EXCIMER_SIMULATION_SEEDS", "2000"))
"""2,000 take about 15 s; a long sweep sets the variable to a million."""
BATCH_COUNT = 20


@pytest.mark.parametrize("batch", range(BATCH_COUNT))
def test_seeds_keep_every_promise(batch: int) -> None:
    size = -(-SEED_COUNT // BATCH_COUNT)
    for seed in range(batch * size, (batch + 1) * size):
        try:
            World(seed).run()
        except (AssertionError, CorruptionError) as error:
            pytest.fail(
                f"{error}\nrerun: PYTHONPATH=src {sys.executable} -m tests.simulation.consensus_world {seed}"
            )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_noticed_by_its_outcome(mutant: Mutant) -> None:
    """By what is lost or contradicted alone: the checks of single steps (C1, C2) are off."""
    for offset in range(2000):
        seed = mutant.first_seed + offset
        world = World(
            seed,
            acceptor_type=mutant.acceptor_type,
            proposer_type=mutant.proposer_type,
            outcomes_only=True,
        )
        try:
            world.run()
        except NOTICED:
            return
    pytest.fail(f"2,000 seeds do not notice {mutant.name}: {mutant}")


def test_a_spoken_promise_that_is_not_on_disk_is_noticed_at_once() -> None:
    with pytest.raises(AssertionError, match=r"C2: node . spoke of term"):
        World(0, acceptor_type=NeverPersistsVotes).run()


def test_the_worlds_are_eventful() -> None:
    """A simulator that never elects, cuts or repairs would pass everything."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        for kind, *rest in World(seed).run().trace:
            seen[str(kind)] += 1
            if kind == "deliver":
                seen[type(rest[2]).__name__] += 1
            if kind == "truncate":
                _, to_lsn, from_lsn = rest
                seen["cut"] += to_lsn != from_lsn
    assert seen["elected"] > 400
    assert seen["fenced"] > 100
    assert seen["commit"] > 400
    assert seen["crash"] > 500
    assert seen["cut"] > 100
    assert seen["skip"] > 10
    assert seen["WalChunk"] > 100
    assert seen["AppendRejected"] > 100


def test_a_seed_tells_the_same_story_twice() -> None:
    assert World(7).run().trace_hash() == World(7).run().trace_hash()
    assert World(7).run().trace_hash() != World(8).run().trace_hash()


def test_a_seed_tells_the_same_story_in_another_process() -> None:
    """Nothing may hang on the hash seed of a process."""
    told = {
        subprocess.run(
            [sys.executable, "-m", "tests.simulation.consensus_world", "7"],
            env={**os.environ, "PYTHONPATH": "src", "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for hash_seed in ("1", "2")
    }
    assert told == {f"trace {World(7).run().trace_hash()}"}
