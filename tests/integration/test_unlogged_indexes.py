"""Unlogged tables with every kind of index: as before after a planned stop, usable after a crash.

EXCIMER_UNLOGGED_VERSIONS names versions of PostgreSQL (like 14,16,18); by default the newest.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_UNLOGGED_VERSIONS", str(NEWEST_VERSION)).split(",")]
SEQUENCES_SINCE = 15


class Method(NamedTuple):
    """An operator that the access method knows, and a value that finds itself by it."""

    type: str = "text"
    value: str = "1"
    operator: str = "="


METHODS = {
    "btree": Method(),
    "hash": Method(),
    "gin": Method("text[]", "{1}", "@>"),
    "gist": Method("box", "(1,1),(0,0)", "~="),
    "spgist": Method(),
    "brin": Method(),
    "bloom": Method(),
}
WAYS = {
    "made": "create index i_{name} on {name} using {method} (v)",
    "concurrently": "create index concurrently i_{name} on {name} using {method} (v)",
    "rebuilt": "create index i_{name} on {name} using {method} (v); reindex table {name}",
    "rebuilt_concurrently": "create index i_{name} on {name} using {method} (v);"
    "reindex table concurrently {name}",
    "truncated": "create index i_{name} on {name} using {method} (v); truncate {name}",
    "vacuumed": "create index i_{name} on {name} using {method} (v); vacuum full {name}",
    "turned": "alter table {name} set logged; create index i_{name} on {name} using {method} (v);"
    "alter table {name} set unlogged",
    "prepared": "begin; create index i_{name} on {name} using {method} (v); prepare transaction '{name}';"
    "commit prepared '{name}'",
    "nested": "begin; savepoint a; create index i_{name} on {name} using {method} (v); release a; commit",
}
"""How an index comes by its init fork. bloom, whose PostgreSQL leaves out of WAL, comes by it in all ways."""
RELATIONS = {f"{method}_made": method for method in METHODS} | {f"bloom_{way}": "bloom" for way in WAYS}


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("endpoint", "create", "main", "--set", "max_prepared_transactions=1")
        stack.text("endpoint", "start", "main")
        with stack.connect() as connection:
            connection.execute("create extension bloom")
            for name, method in RELATIONS.items():
                connection.execute(f"create unlogged table {name} (v {METHODS[method].type})".encode())
                for statement in WAYS[name.partition("_")[2]].split(";"):
                    connection.execute(statement.format(name=name, method=method).encode())
            if stack.pg_version >= SEQUENCES_SINCE:
                connection.execute("create unlogged sequence s start 7")
        yield stack


def insert(stack: Stack, endpoint: str = "main") -> None:
    """A row into each."""
    with stack.connect(endpoint) as connection:
        for name, method in RELATIONS.items():
            connection.execute(f"insert into {name} values ('{METHODS[method].value}')".encode())


def found(stack: Stack, endpoint: str = "main") -> dict[str, int]:
    """How many rows each index finds."""
    counts = {}
    with stack.connect(endpoint) as connection:
        connection.execute("set enable_seqscan = off")
        for name, method in RELATIONS.items():
            way = METHODS[method]
            query = f"select count(*) from {name} where v {way.operator} '{way.value}'::{way.type}"
            plan = connection.execute(f"explain {query}".encode()).fetchall()
            assert any(f"i_{name}" in row[0] and "Index" in row[0] for row in plan), plan
            counts[name] = connection.execute(query.encode()).fetchall()[0][0]
    return counts


def everywhere(count: int) -> dict[str, int]:
    return dict.fromkeys(RELATIONS, count)


def next_value(stack: Stack, endpoint: str = "main") -> int | None:
    """Of the unlogged sequence, where the version has them."""
    if stack.pg_version < SEQUENCES_SINCE:
        return None
    return int(stack.query("select nextval('s')", endpoint)[0][0])


def empty(stack: Stack) -> None:
    """As after a crash, and with a sequence at its beginning."""
    stack.query(f"truncate {', '.join(RELATIONS)}")
    if stack.pg_version >= SEQUENCES_SINCE:
        stack.query("alter sequence s restart")


@pytest.mark.parametrize("kind", ["warm", "cold"])
def test_a_planned_stop_keeps_them(stack: Stack, kind: str) -> None:
    empty(stack)
    insert(stack)
    before = next_value(stack)
    stack.text("endpoint", "stop", "main")
    if kind == "cold":
        stack.evict("main")
    stack.text("endpoint", "start", "main")
    assert stack.json("endpoint", "show", "main")["start"] == kind
    assert found(stack) == everywhere(1)
    insert(stack)
    assert found(stack) == everywhere(2)
    assert before is None or next_value(stack) == before + 1


def test_after_a_crash_they_are_empty_and_take_rows(stack: Stack) -> None:
    insert(stack)
    first = None if next_value(stack) is None else 7
    stack.kill("endpoint-main")
    stack.text("endpoint", "start", "main")
    assert found(stack) == everywhere(0)
    insert(stack)
    assert found(stack) == everywhere(1)
    assert next_value(stack) == first


@pytest.mark.parametrize("parent", ["running", "stopped"])
def test_a_branch_begins_with_empty_ones(stack: Stack, parent: str) -> None:
    """Where the parent stopped, PostgreSQL starts as after a clean shutdown and resets nothing by itself."""
    insert(stack)
    if parent == "stopped":
        stack.text("endpoint", "stop", "main")
    stack.branch(parent)
    assert found(stack, parent) == everywhere(0)
    insert(stack, parent)
    assert found(stack, parent) == everywhere(1)
    stack.text("endpoint", "start", "main")
