"""How the size of a cache is written and shown."""

import pytest

from excimer.cli.commands.endpoint_cache import parse_size, shown_size
from excimer.cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_mib"),
    [("16MB", 16), ("1GB", 1024), ("3 tb", 3 << 20), ("unlimited", 0), ("Unlimited", 0)],
)
def test_a_size_is_read(text: str, size_mib: int) -> None:
    assert parse_size(text) == size_mib


@pytest.mark.parametrize("text", ["", "10", "10KB", "-1GB", "1.5GB", "GB", "10GB0", "99999999999MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a cache size: write 256MB"):
        parse_size(text)


@pytest.mark.parametrize("size_mib", [0, 1, 16, 1000, 1024, 1536, 1 << 20, 5 << 20])
def test_what_is_shown_is_read_again(size_mib: int) -> None:
    assert parse_size(shown_size(size_mib)) == size_mib
