"""Under random faults no acknowledged commit is lost, and all that was seen has one serial order (D1, H2)."""

import os
import random
import tempfile
from pathlib import Path

from tests.chaos.excimer_target import excimer_target
from tests.chaos.run import run_chaos
from tests.kit.builds import NEWEST_VERSION

SECONDS = 60


def test_every_acknowledged_commit_is_there_in_one_order() -> None:
    """`make chaos` is the same for half an hour. A failed run keeps its history, and says where."""
    seed = int(os.environ.get("EXCIMER_SEED", random.SystemRandom().randrange(1 << 32)))
    directory = Path(tempfile.mkdtemp(prefix="excimer-chaos-"))
    print(f"rerun with EXCIMER_SEED={seed}; history in {directory}")
    with excimer_target(NEWEST_VERSION) as target:
        result = run_chaos(target, directory, seed=seed, seconds=SECONDS)
    print(result.faults)
    assert not result.problems, "\n".join(result.problems)
    assert result.acknowledged > 1000, "the clients hardly wrote"
    assert result.faults, "nothing was broken"
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
