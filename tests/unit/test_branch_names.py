"""Branches may be called what Git allows, Git itself being the judge, but for what we refuse besides."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer.base.branch_names import SIZE_MAX, branch_name_fault

PIECES = st.sampled_from(
    [
        *(
            "a",
            "B9",
            "ä",
            "é",
            "/",
            ".",
            "..",
            "@",
            "{",
            "@{",
            "-",
            "~",
            "^",
            ":",
            "?",
            "*",
            "[",
            "]",
            "\\",
            " ",
        ),
        *(".lock", "\t", "\x7f", "%", "#", "&", "$(x)", "'", '"', ";", "HEAD", "lock", "_", "=", "!"),
    ]
)


def git_allows(name: str) -> bool:
    done = subprocess.run(
        ["git", "check-ref-format", "--branch", name], capture_output=True, check=False, cwd="/"
    )
    return done.returncode == 0


@settings(max_examples=120, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=5).map("".join))
def test_git_agrees(name: str) -> None:
    fault = branch_name_fault(name)
    if name == "@" or name.startswith("@{"):
        return  # Git takes it for HEAD, or for a reference to an earlier branch
    assert (fault is None) == git_allows(name), (name, fault)


@pytest.mark.parametrize(
    "name", ["main", "feature/x", "a.b-c_d", "9", "ä/日本", "fix#12;'$(x)'", "a" * SIZE_MAX]
)
def test_good_names(name: str) -> None:
    assert branch_name_fault(name) is None
    assert git_allows(name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("a" * (SIZE_MAX + 1), "is longer than 200 bytes"),
        ("ä" * 101, "is longer than 200 bytes"),
        ("ab" * 16, "looks like an id"),
        ("a\u202eb", "contains what cannot be seen"),
        ("a\u00a0b", "contains what cannot be seen"),
        ("\ud800", "contains what cannot be seen"),
        ("a b", "contains ' '"),
        ("-a", "begins with '-'"),
        ("a//b", "has an empty part"),
        ("a/.b", "has a part that begins with '.'"),
        ("a.lock/b", "ends with '.lock'"),
        ("a..b", "contains '..'"),
        ("HEAD", "has a meaning of its own in Git"),
    ],
)
def test_bad_names_say_why(name: str, fault: str) -> None:
    assert fault in (branch_name_fault(name) or "")
