"""postgresql.auto.conf: the file in which ALTER SYSTEM keeps settings, one ``name = 'value'`` a line.

Not here: whether a setting is a good idea (`excimer.postgres.setting_rules`), and postgresql.conf in all that
it may hold: ALTER SYSTEM rewrites its own file whole, without includes or values outside quotes.
"""

import re
from collections.abc import Mapping
from typing import Final

AUTO_CONF_NAME: Final = "postgresql.auto.conf"
AUTO_CONF_NEW_NAME: Final = "postgresql.auto.conf.tmp"
"""What ALTER SYSTEM writes before it renames it."""

_LINE: Final = re.compile(
    r"\s*(?P<name>[A-Za-z_\x80-\uffff][\w$.\x80-\uffff]*)\s*(?:=\s*|\s)"
    r"(?:'(?P<quoted>(?:[^'\\\n]|\\.|'')*)'|(?P<plain>[^'#\s]+))\s*(?:#.*)?\Z"
)
_ESCAPE: Final = re.compile(r"''|\\([0-7]{1,3}|.)")
_LETTERS: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEADING: Final = (
    "# Written by Excimer, which keeps this list: change it with ALTER SYSTEM or `excimer endpoint config`.\n"
)


class AutoConfError(ValueError):
    """A line that is neither a setting nor a comment."""


def parse_auto_conf(text: str) -> dict[str, str]:
    """Settings by name in lower case; of two of one name the last counts. Raises `AutoConfError`."""
    settings: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.match(line)
        if found is None:
            raise AutoConfError(f"line {number} of {AUTO_CONF_NAME} is not a setting")
        quoted = found["quoted"]
        settings[found["name"].lower()] = found["plain"] if quoted is None else _ESCAPE.sub(_plain, quoted)
    return settings


def render_auto_conf(settings: Mapping[str, str]) -> str:
    """The file's text. Values have no line breaks."""
    return _HEADING + render_settings(settings)


def render_settings(settings: Mapping[str, str]) -> str:
    """Lines ``name = 'value'``, as ALTER SYSTEM writes them."""
    return "".join(f"{name} = {_quote(value)}\n" for name, value in settings.items())


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _plain(found: re.Match[str]) -> str:
    escaped = found[1]
    if escaped is None:
        return "'"
    if escaped[0] in "01234567":
        return chr(int(escaped, 8) & 0xFF)
    return _LETTERS.get(escaped, escaped)
