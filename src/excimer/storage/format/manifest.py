"""The manifest of a timeline (its *index* object): the only truth about which layers exist.

One object per change, never overwritten, named ``index-GENERATION-SEQUENCE`` in hex; the greatest
name counts. Text, so that a person can read it::

    excimer index 1 CRC32C\\n        format version, crc32c (8 hex digits) of all that follows
    {"timeline_id": ..., "layers": [...]}

Not here: writing it and finding the newest (`excimer.storage.engine.manifest_store`).
"""

import re
from typing import NamedTuple

import google_crc32c
import msgspec

from excimer.base.errors import CorruptionError
from excimer.storage.format.layer_file import LayerKind

FORMAT_VERSION = 1
MAX_GENERATION = (1 << 32) - 1
LAYER_NAME_PARTS = 6

_FIRST_LINE = re.compile(rb"excimer index (\d+) ([0-9a-f]{8})\n")
_NAME = re.compile(r"index-([0-9a-f]{8})-([0-9a-f]{8})\Z")


class DamagedManifestError(CorruptionError):
    """A manifest's bytes are not what was written."""


class LayerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest says of one layer. Its name is unique for its content and generation."""

    kind: LayerKind
    start_lsn: int
    end_lsn: int
    """Equal to `start_lsn` for an image layer."""
    first_key: str
    """Hex, like `last_key`. Both are keys that the layer holds."""
    last_key: str
    generation: int
    fingerprint: int
    size_bytes: int
    index_offset: int
    value_count: int
    covers_after_lsn: int | None = None
    """Of images: together those of this LSN hold every key that changed after this LSN and is still
    alive; 0: every live key, whatever its age or timeline. None: there are some missing.
    """
    level: int = 0
    """Of deltas: 0 is one flush over the whole key range; 1 is merged from several and cut by key."""
    key_count: int = 0
    """Of deltas: distinct keys; 0 if that was not counted."""
    round_after_lsn: int | None = None
    """Of a piece of a round that is not finished: what the round will cover when it is."""

    @property
    def name(self) -> str:
        kind = "image" if self.kind is LayerKind.IMAGE else "delta"
        lsns = f"{self.start_lsn:016x}-{self.end_lsn:016x}"
        return f"{kind}-{lsns}-{self.first_key}-{self.generation:08x}-{self.fingerprint:08x}"


class Detachment(msgspec.Struct, frozen=True, kw_only=True):
    """What a timeline that became a root has still to do: branches that left its former ancestor at or
    below the former branch point are to become its own.
    """

    ancestor_timeline_id: str
    ancestor_lsn: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a restart needs. Frozen: a change makes a new one with the next sequence number."""

    tenant_id: str
    timeline_id: str
    pg_version: int
    system_id: int
    wal_segment_size_bytes: int
    oldest_lsn: int
    """Reads below it are refused: a root's import LSN, a branch's branch point, or the GC's cut."""
    disk_consistent_lsn: int
    prev_record_lsn: int
    leased_lsns: tuple[int, ...] = ()
    """Below `oldest_lsn`, and held by leases: readable for one lease length after an attachment, so that
    whoever holds them can renew.
    """
    ancestor_timeline_id: str | None = None
    ancestor_lsn: int = 0
    layers: tuple[LayerDescription, ...] = ()
    archived: bool = False
    """Nobody reads or writes it, and no pageserver keeps more of it than that it exists."""
    detachment: Detachment | None = None
    """None: nothing is left to do."""
    deleted: bool = False
    """The timeline is being deleted: its objects may be missing already."""
    claimed_from: str = ""
    """Not empty: a claim of a new generation, the name of the older one's manifest that it repeats. Only the
    next manifest, which is none, says what the timeline consists of (`storage.engine.claim`)."""
    importing_generation: int = 0
    """Not 0: the timeline is being made of a cluster from outside, or was when that was broken off, by this
    generation. It does not exist, and whoever attaches the tenant removes its objects."""


class ManifestName(NamedTuple):
    """Orders manifests: the greatest is the newest."""

    generation: int
    sequence: int

    def __str__(self) -> str:
        return f"index-{self.generation:08x}-{self.sequence:08x}"


def parse_manifest_name(text: str) -> ManifestName | None:
    """None for an object that is not a manifest."""
    match = _NAME.match(text)
    return ManifestName(int(match[1], 16), int(match[2], 16)) if match else None


def layer_generation(layer_name: str) -> int:
    """Which generation wrote the layer of this name; `MAX_GENERATION` if it is not a layer's name."""
    parts = layer_name.split("-")
    try:
        return int(parts[-2], 16) if len(parts) == LAYER_NAME_PARTS else MAX_GENERATION
    except ValueError:
        return MAX_GENERATION


def pack_manifest(manifest: Manifest) -> bytes:
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    return b"excimer index %d %08x\n" % (FORMAT_VERSION, google_crc32c.value(body)) + body


def unpack_manifest(data: bytes, name: str) -> Manifest:
    """Raises `DamagedManifestError`, which names the object."""
    match = _FIRST_LINE.match(data)
    if match is None:
        raise DamagedManifestError(f"manifest {name} is damaged: its first line is not a manifest's")
    if int(match[1]) != FORMAT_VERSION:
        raise DamagedManifestError(f"manifest {name} has version {int(match[1])}, this program knows 1")
    body = data[match.end() :]
    if google_crc32c.value(body) != int(match[2], 16):
        raise DamagedManifestError(f"manifest {name} is damaged: it fails its checksum")
    try:
        return msgspec.json.decode(body, type=Manifest)
    except msgspec.DecodeError as error:
        raise DamagedManifestError(f"manifest {name} cannot be understood: {error}") from error
