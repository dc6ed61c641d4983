"""The walk of a new user, on each version: a table, a branch that diverges, a stop and a start."""

import pytest

from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION
from tests.kit.stack import running_stack


@pytest.mark.parametrize("pg_version", ALL_VERSIONS)
def test_walk(pg_version: int) -> None:
    safekeepers = 3 if pg_version == NEWEST_VERSION else 1  # they do not know PostgreSQL's version
    with running_stack(pg_version, safekeepers=safekeepers) as stack:
        stack.create_main()
        stack.query("create table t(key int primary key, value text)")
        stack.query("insert into t values(1, 1)")
        stack.branch("migration_check")
        assert stack.query("select * from t", "migration_check") == [(1, "1")]
        stack.query("insert into t values(2, 2)", "migration_check")
        assert stack.query("select * from t") == [(1, "1")], "a branch is invisible to its ancestor (S2)"
        stack.query("insert into t values(3, 3)")

        branches = {row["name"]: row for row in stack.json("timeline", "list")["branches"]}
        assert branches["migration_check"]["ancestor_timeline_id"] == branches["main"]["timeline_id"]
        tree = stack.text("timeline", "list")
        assert tree.index("main") < tree.index("migration_check")

        stack.text("stop")
        stack.text("start")
        stack.text("endpoint", "start", "main")
        stack.text("endpoint", "start", "migration_check")
        assert stack.query("select * from t order by key") == [(1, "1"), (3, "3")]
        assert stack.query("select * from t order by key", "migration_check") == [(1, "1"), (2, "2")]
        version = stack.query("select current_setting('server_version_num')::int / 10000")
        assert version == [(pg_version,)]
