"""`excimer endpoint config`: what its arguments mean, and what it says of a change."""

from typing import Any

import pytest

from excimer.cli.commands.endpoint_config import Action, change_of, parse_assignments, sentence_of
from excimer.cli.errors import UsageError


def test_arguments_become_a_request() -> None:
    assert change_of(Action.LIST, [], unset_all=False) is None
    given = ["work_mem=9MB", "search_path=a=b, 'c'", "work_mem=10MB", "x.y="]
    assert change_of(Action.SET, given, unset_all=False) == {
        "set": {"work_mem": "10MB", "search_path": "a=b, 'c'", "x.y": ""}
    }
    assert change_of(Action.UNSET, ["work_mem"], unset_all=False) == {"unset": ["work_mem"]}
    assert change_of(Action.UNSET, [], unset_all=True) == {"unset": ["*"]}


@pytest.mark.parametrize(
    ("action", "arguments", "unset_all"),
    [
        (Action.SET, [], False),
        (Action.SET, ["work_mem"], False),
        (Action.SET, ["=9MB"], False),
        (Action.SET, ["a=b"], True),
        (Action.UNSET, [], False),
        (Action.UNSET, ["a"], True),
        (Action.UNSET, ["a=b"], False),
        (Action.LIST, ["a"], False),
        (Action.LIST, [], True),
    ],
)
def test_contradictions_are_wrong_usage(action: Action, arguments: list[str], unset_all: bool) -> None:
    with pytest.raises(UsageError):
        change_of(action, arguments, unset_all=unset_all)


def test_assignments_name_the_option_they_came_from() -> None:
    with pytest.raises(UsageError, match=r"--set 'a': write NAME=VALUE"):
        parse_assignments(["a"], "--set")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"changed": []}, "nothing changes"),
        ({"running": False}, "a, b kept; in force at its next start"),
        ({"in_force": False}, "a, b kept, but its manager has not taken it over: excimer logs main"),
        ({}, "a, b in force"),
        ({"restart_pending": ["b", "c"]}, "a in force; b after restart: excimer endpoint restart main"),
        (
            {"changed": ["a", "x.y"], "settings": {"a": "1", "x.y": "2"}},
            "a in force; x.y kept for its extension, which checks it by itself",
        ),
        ({"changed": ["a", "b", "x.y"], "settings": {"a": "1"}}, "a in force; b, x.y unset"),
        (
            {"settings": {}, "restart_pending": ["b"]},
            "a unset; b after restart: excimer endpoint restart main",
        ),
        ({"restart_pending": ["a", "b"]}, "a, b after restart: excimer endpoint restart main"),
    ],
)
def test_it_says_what_is_in_force(answer: dict[str, Any], said: str) -> None:
    whole = {
        "changed": ["a", "b"],
        "settings": {"a": "1", "b": "2"},
        "running": True,
        "in_force": True,
        "restart_pending": [],
    } | answer
    assert sentence_of("main", whole) == f"endpoint main: {said}"
