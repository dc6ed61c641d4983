"""Why postgres did not start: whether its settings are at fault, and which. No I/O.

A start that failed for want of a page, of space or of a port may be tried again; one that failed for a
setting would fail for ever.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from excimer.base.errors import RefusedError
from excimer.postgres.setting_check import LIBRARY_SETTINGS, MEMORY_SETTINGS

_FAULTS: Final = re.compile(
    r"invalid value for parameter|unrecognized configuration parameter|valid range for parameter"
    r"|cannot be (set|changed) |configuration file .* contains errors|syntax error in file"
    r"|must be less than|requires \"?wal_level|insufficient parameter settings|insufficient file descriptors"
    r"|could not (access|load|open) (file|library)|incompatible library|must be loaded via"
    r"|could not (map anonymous|create|resize) shared memory|could not open log file"
    r"|could not create any (TCP|Unix)|multiple recovery targets|not supported by this build"
    r"|not supported on this platform"
)
_PASSING: Final = re.compile(r"Input/output error|No space left|Too many open files|Interrupted system call")
_SEVERE: Final = re.compile(r" (?:FATAL|PANIC|ERROR|LOG|HINT|DETAIL|CONTEXT): +(.*)")
_LAST: Final = re.compile(r" (?:FATAL|PANIC): +(.*)")


class ConfigurationFaultError(RefusedError):
    """postgres does not start with the settings that it has."""


def configuration_fault(log_lines: Sequence[str], settings: Mapping[str, str]) -> str | None:
    """A sentence that names the settings at fault; None when a failed start has another reason.

    `log_lines` are what this postgres wrote, `settings` the endpoint's own list: without one nothing can be
    changed, and so nothing is said.
    """
    fatal = [found[1] for line in log_lines if (found := _LAST.search(line))]
    if not fatal or not settings:
        return None
    said = [found[1] for line in log_lines if (found := _SEVERE.search(line))]
    if _PASSING.search(fatal[-1]) or not any(_FAULTS.search(sentence) for sentence in (fatal[-1], *said)):
        return None
    names = _named(said, settings)
    which = ", ".join(names) if names else "one of " + ", ".join(sorted(settings))
    return f"PostgreSQL does not start with the setting {which}: {fatal[-1].strip()}"


def _named(said: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """Of the settings those that the log speaks of, by name or by value."""
    text = "\n".join(said)
    by_name = [name for name in settings if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text, re.I)]
    if by_name:
        return sorted(by_name)
    if "shared memory" in text:
        return sorted(MEMORY_SETTINGS & settings.keys())
    if re.search(r"library|\.so\b|could not access file", text):
        return sorted(name for name in LIBRARY_SETTINGS if name in settings)
    return []
