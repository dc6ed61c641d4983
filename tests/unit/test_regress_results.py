"""What is read from the words of PostgreSQL's test programs, before 16 and since."""

from pathlib import Path

import pytest

from tests.regress.suites import read_results, regress_names

TAP = """
# parallel group (2 tests):  boolean char
ok 2         + boolean                                   210 ms
not ok 3     + char                                      110 ms
ok 4         - test_setup                                977 ms
1..3
# 1 of 3 tests failed.
"""
BEFORE = """
test test_setup                   ... ok          336 ms
parallel group (3 tests):  boolean char name
     boolean                      ... ok           80 ms
     char                         ... FAILED       50 ms
test tablespace                   ... FAILED      120 ms
"""


@pytest.mark.parametrize(
    ("output", "passed", "failed"),
    [(TAP, 2, ["char"]), (BEFORE, 2, ["char", "tablespace"]), ("no such server", 0, [])],
    ids=("TAP", "before 16", "nothing"),
)
def test_results_are_counted_and_failures_named(output: str, passed: int, failed: list[str]) -> None:
    assert read_results(output) == (passed, failed)


def test_thetests_of_a_contrib_module_are_read_from_its_makefile(tmp_path: Path) -> None:
    makefile = tmp_path / "Makefile"
    makefile.write_text(
        "REGRESS = init md5 \\\n\t$(CF_TESTS) \\\n\tsha1\nREGRESS_OPTS = --encoding=UTF8\nISOLATION = one\n"
    )
    assert regress_names(makefile) == [("REGRESS", ["init", "md5", "sha1"]), ("ISOLATION", ["one"])]
