"""`python -m tests.chaos --minutes 30 [--control] [--seed N] [--pg-version 18] [--keep DIRECTORY]`."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.excimer_target import excimer_target
from tests.chaos.run import Result, run_chaos, summary
from tests.chaos.stock_target import stock_target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--pg-version", type=int, default=18)
    parser.add_argument("--control", action="store_true", help="stock PostgreSQL with a synchronous standby")
    parser.add_argument("--keep", type=Path, help="where the history and the result go")
    arguments = parser.parse_args()
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="excimer-chaos-"))
    print(f"seed {arguments.seed}, history in {directory}", flush=True)
    making = stock_target if arguments.control else excimer_target
    with making(arguments.pg_version) as target:
        result = run_chaos(
            target,
            directory,
            seed=arguments.seed,
            seconds=arguments.minutes * 60,
            note=lambda text: print(text, flush=True),
        )
    _print(result)
    return 1 if result.problems else 0


def _print(result: Result) -> None:
    for name, count in result.faults.items():
        print(f"{count:5}  {name}")
    for cycle in result.stock_cycles[:3]:
        print(f"stock's cycle: {cycle}")
    for problem in result.problems[:20]:
        print(f"PROBLEM {problem}")
    for name, value in summary(result).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
