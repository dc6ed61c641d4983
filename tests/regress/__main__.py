"""`python -m tests.regress --pg-version 18 [--suites core,isolation,contrib] [--source DIR] [--control]`.

Prints each test that differs; exit code 1 if one does that is not known, or if verify finds a difference.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from excimer.base.errors import ExcimerError
from excimer.io.processes import make_owned_dir
from tests.kit.builds import build_of
from tests.regress.places import endpoint_place, stock_place
from tests.regress.sources import source_tree
from tests.regress.suites import KNOWN, NOTHING_RUN, Place, SuiteResult, contrib, core, isolation

SUITES = ("core", "isolation", "contrib")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.regress", description=__doc__)
    parser.add_argument("--pg-version", type=int, default=18)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--source", type=Path, help="an unpacked source tree, instead of Debian's")
    parser.add_argument("--control", action="store_true", help="the same on stock PostgreSQL")
    parser.add_argument("--keep", type=Path, help="where outputs and regression.diffs go")
    arguments = parser.parse_args()
    build = build_of(arguments.pg_version)
    try:
        source = arguments.source or source_tree(build)
    except ExcimerError as error:
        print(f"{error}\nwith --source DIR the suites are taken from a source tree that you have unpacked")
        return 1
    kept = arguments.keep or Path(tempfile.mkdtemp(prefix="excimer-regress-"))
    kept.mkdir(mode=0o755, exist_ok=True)
    kept.chmod(0o755)
    print(f"PostgreSQL {build.full_version}; outputs and regression.diffs in {kept}", flush=True)
    making = stock_place if arguments.control else endpoint_place
    problems = 0
    with making(build, source, make_owned_dir(kept / f"pg{build.version}", 0o755)) as (place, verify):
        for suite in arguments.suites.split(","):
            begun = time.monotonic()
            results = run_suite(suite, place)
            problems += sum(report(suite, result) for result in results)
            print(f"{suite}: {time.monotonic() - begun:.0f} s", flush=True)
            problems += verify()
    return 1 if problems else 0


def run_suite(suite: str, place: Place) -> list[SuiteResult]:
    match suite:
        case "core":
            return [core(place)]
        case "isolation":
            return [isolation(place)]
        case "contrib":
            return contrib(place)
    raise SystemExit(f"there is no suite {suite!r}: {', '.join(SUITES)}")


def report(suite: str, result: SuiteResult) -> int:
    """One line, and one for each test that differs; how many of those are not known."""
    print(f"{suite}: {result.name}: {result.passed} passed, {len(result.failed)} differ", flush=True)
    if result.failed == [NOTHING_RUN]:
        print(result.output.strip())
    unknown = 0
    for test in result.failed:
        reason = KNOWN.get(f"{result.name}/{test}")
        unknown += reason is None
        print(f"    {test}: {reason or 'NOT KNOWN'}", flush=True)
    return unknown


if __name__ == "__main__":
    sys.exit(main())
