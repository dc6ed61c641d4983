"""What a tenant may set for itself, and the object that remembers it.

A tenant's *overrides* are the settings it has chosen; the host's defaults fill the rest. Each change writes
a new object of all overrides, never overwritten; the greatest name counts::

    tenants/TENANT/settings/settings-GENERATION-SEQUENCE
    excimer settings 1 CRC32C\\n        format version, crc32c (8 hex digits) of all that follows
    {"pitr_interval_s": 86400.0}

Not here: writing it and finding the newest (`excimer.storage.engine.settings_store`).
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

import google_crc32c
import msgspec
from msgspec import Meta

from excimer.base.errors import CorruptionError, RefusedError

FORMAT_VERSION: Final = 1
KIB: Final = 1024
MIB: Final = 1024 * KIB
DAY_S: Final = 86_400

_FIRST_LINE = re.compile(rb"excimer settings (\d+) ([0-9a-f]{8})\n")
_NAME = re.compile(r"settings-([0-9a-f]{8})-([0-9a-f]{8})\Z")


class TenantSettingsError(RefusedError):
    """A setting does not exist, or its value makes no sense."""


class DamagedSettingsError(CorruptionError):
    """A settings object's bytes are not what was written."""


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of them with a value: the defaults with a tenant's overrides laid over."""

    pitr_interval_s: Annotated[float, Meta(ge=0, le=3650 * DAY_S)] = 7.0 * DAY_S
    """History younger than this stays readable."""
    gc_horizon_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 64 * MIB
    """So much of the newest WAL's history stays readable, however old it is."""
    gc_period_s: Annotated[float, Meta(ge=0, le=30 * DAY_S)] = 3600.0
    """Time between two garbage collections; 0: only when asked for."""
    lsn_lease_length_s: Annotated[float, Meta(ge=0, le=DAY_S)] = 600.0
    """How long a lease keeps its LSN readable; after attaching no garbage is collected for so long."""
    flush_size_bytes: Annotated[int, Meta(ge=64 * KIB, le=4096 * MIB)] = 64 * MIB
    """Memory of the open layer at which it is frozen and flushed."""
    flush_interval_s: Annotated[float, Meta(ge=0.01, le=DAY_S)] = 60.0
    """An open layer with anything in it is flushed at the latest after this."""
    compaction_threshold: Annotated[int, Meta(ge=1, le=1000)] = 4
    """So many L0 layers are merged into L1."""
    compaction_target_size_bytes: Annotated[int, Meta(ge=64 * KIB, le=4096 * MIB)] = 128 * MIB
    """Raw size at which an L1 layer ends and the next begins."""
    image_creation_threshold: Annotated[int, Meta(ge=1, le=1000)] = 2
    """So many merged runs above the newest images lead to new images."""


Overrides = Mapping[str, Any]
"""By setting: the values that a tenant has chosen."""


class SettingsName(NamedTuple):
    """Orders settings objects: the greatest is the newest."""

    generation: int
    sequence: int

    def __str__(self) -> str:
        return f"settings-{self.generation:08x}-{self.sequence:08x}"


def check_overrides(overrides: Overrides) -> dict[str, Any]:
    """The overrides as they are stored, numbers in their setting's type. Raises `TenantSettingsError`."""
    known = TenantSettings.__struct_fields__
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise TenantSettingsError(f"there is no tenant setting {name[:80]!r}; {hint}")
    try:
        checked = msgspec.convert(dict(overrides), TenantSettings)
    except msgspec.ValidationError as error:
        raise TenantSettingsError(_sentence(str(error))) from error
    return {name: getattr(checked, name) for name in known if name in overrides}


def _sentence(fault: str) -> str:
    """``Expected `int` >= 1 - at `$.gc_period_s``` as a sentence."""
    wanted, _, place = fault.partition(" - at `$.")
    return f"{place.rstrip('`')}: {wanted[:1].lower()}{wanted[1:].replace('`', '')}" if place else fault


def apply_overrides(defaults: TenantSettings, overrides: Overrides) -> TenantSettings:
    """Raises `TenantSettingsError`. The defaults are taken as they are."""
    return msgspec.structs.replace(defaults, **check_overrides(overrides))


def change_overrides(overrides: Overrides, changes: Overrides) -> dict[str, Any]:
    """The overrides with some set anew, and those set to None given back to the default.

    Raises `TenantSettingsError`.
    """
    check_overrides({name: value for name, value in changes.items() if value is not None})
    check_overrides({name: getattr(TenantSettings(), name, None) for name in changes})
    merged = {**overrides, **changes}
    return check_overrides({name: value for name, value in merged.items() if value is not None})


def parse_settings_name(text: str) -> SettingsName | None:
    """None for an object that is none."""
    match = _NAME.match(text)
    return SettingsName(int(match[1], 16), int(match[2], 16)) if match else None


def pack_overrides(overrides: Overrides) -> bytes:
    body = msgspec.json.format(msgspec.json.encode(dict(overrides)), indent=1) + b"\n"
    return b"excimer settings %d %08x\n" % (FORMAT_VERSION, google_crc32c.value(body)) + body


def unpack_overrides(data: bytes, name: str) -> dict[str, Any]:
    """Raises `DamagedSettingsError`, which names the object."""
    match = _FIRST_LINE.match(data)
    if match is None or int(match[1]) != FORMAT_VERSION:
        raise DamagedSettingsError(f"tenant settings {name} are damaged: the first line is not theirs")
    body = data[match.end() :]
    if google_crc32c.value(body) != int(match[2], 16):
        raise DamagedSettingsError(f"tenant settings {name} are damaged: they fail their checksum")
    try:
        return check_overrides(msgspec.json.decode(body, type=dict[str, Any]))
    except (msgspec.DecodeError, TenantSettingsError) as error:
        raise DamagedSettingsError(f"tenant settings {name} cannot be understood: {error}") from error
