"""What a redo worker's greeting says of its sandbox."""

import pytest

from excimer.wire.redo import Sandbox, parse_greeting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"landlock=7 own_root=0 filtered=1", Sandbox(7, has_own_root=False, is_filtered=True)),
        (b"landlock=0 own_root=1 filtered=1", Sandbox(0, has_own_root=True, is_filtered=True)),
        (b"", Sandbox(0, has_own_root=False, is_filtered=False)),
        (b"landlock=-1 own_root=yes filtered", Sandbox(0, has_own_root=False, is_filtered=False)),
        (b"\xff landlock= own_root=2 more=3", Sandbox(0, has_own_root=False, is_filtered=False)),
    ],
)
def test_only_what_is_said_is_in_force(text: bytes, expected: Sandbox) -> None:
    assert parse_greeting(text) == expected
