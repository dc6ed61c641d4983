"""Settings files: values in, one-line errors that name file and field, and a writer that round-trips."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.service.settings import Settings, SettingsError, format_settings, load_settings, save_settings


class Node(Settings, frozen=True):
    id: int
    address: str = "127.0.0.1:1"


class Example(Settings, frozen=True):
    data_dir: Path
    nodes: tuple[Node, ...] = ()
    words: dict[str, str] = msgspec.field(default_factory=dict)
    note: str | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data_dir = 5", "data_dir: expected str, got int"),
        ("", "object missing required field data_dir"),
        ("data_dir = '/x'\ndata_dri = 1", "object contains unknown field data_dri"),
        ("data_dir = '/x'\n[[nodes]]\nid = 'one'", "nodes[0].id: expected int, got str"),
        ("data_dir = '/x'\nlog_level = 'loud'", "log_level: invalid enum value 'loud'"),
        ("data_dir = ", "not valid TOML"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "settings.toml", text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path, Example)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert "\n" not in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml: No such file"):
        load_settings(tmp_path / "absent.toml", Example)


@given(st.text(), st.dictionaries(st.text(), st.text()), st.integers(-(2**62), 2**62))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, text: str, words: dict[str, str], number: int
) -> None:
    path = tmp_path_factory.mktemp("settings") / "s.toml"
    written = Example(
        data_dir=Path("/a b"), nodes=(Node(id=number, address=text),), words=words, log_level="debug"
    )
    save_settings(path, written, "who writes this\nand why")
    assert load_settings(path, Example) == written


def test_none_is_left_out() -> None:
    assert "note" not in format_settings(Example(data_dir=Path("/")))
