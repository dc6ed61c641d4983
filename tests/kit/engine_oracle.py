"""What a timeline must answer, computed the slow way from every value that was ever put."""

import random
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, KeyKind, Relation, Slru, make_key
from excimer.base.keys import relation_block_key as block_key
from excimer.base.keys import relation_size_key as size_key
from excimer.base.lsn import Lsn
from excimer.storage.format.page_image import PAGE_IMAGE_HEAD
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_world import START, expected_page, image_of, record_value, size_value


class BlockFile(NamedTuple):
    """A fork of a relation, or a segment of an SLRU: a size and blocks."""

    block_kind: KeyKind
    spc: int
    db: int
    rel: int
    fork: int

    @property
    def size_key(self) -> bytes:
        is_slru = self.block_kind is KeyKind.SLRU_BLOCK
        return make_key(KeyKind.SLRU_SIZE if is_slru else KeyKind.RELATION_SIZE, *self[1:])

    @property
    def has_native_records(self) -> bool:
        """Whether its changes are records of our own rather than PostgreSQL's."""
        return self.block_kind is KeyKind.SLRU_BLOCK or self.fork == Fork.VM

    def block_key(self, block: int) -> bytes:
        return make_key(*self, block=block)


RELATIONS = tuple(Relation(1663, 5, 16384 + number) for number in range(3))
FORKS = (Fork.MAIN, Fork.VM)
FILES = (
    *(BlockFile(KeyKind.RELATION_BLOCK, *relation, fork) for relation in RELATIONS for fork in FORKS),
    BlockFile(KeyKind.SLRU_BLOCK, Slru.XACT, 0, 0, 0),
    BlockFile(KeyKind.SLRU_BLOCK, Slru.MULTIXACT_OFFSETS, 0, 1, 0),
)
BLOCKS_MAX = 12
MAP_KEY = make_key(KeyKind.RELATION_MAP, 1663, 5)
TWO_PHASE_KEY = make_key(KeyKind.TWO_PHASE, 0, 0, 700)
IMPORTED: list[tuple[bytes, bytes]] = [
    (size_key(RELATIONS[0], Fork.MAIN), struct.pack("<I", 8)),
    *((block_key(RELATIONS[0], Fork.MAIN, at), random.Random(at).randbytes(8192)) for at in range(6)),
    (block_key(RELATIONS[0], Fork.MAIN, 6), bytes(BLOCK_SIZE_BYTES)),
    (size_key(RELATIONS[1], Fork.MAIN), struct.pack("<I", BLOCKS_MAX)),
    *(
        (block_key(RELATIONS[1], Fork.MAIN, at), random.Random(99 + at).randbytes(8192))
        for at in range(BLOCKS_MAX)
    ),
    (TWO_PHASE_KEY, b"prepared"),
    (MAP_KEY, b"the first map"),
]
"""Pages that do not compress: what is put later is small beside them, and rounds of images partial."""
LITTLE_IMPORTED: list[tuple[bytes, bytes]] = [(TWO_PHASE_KEY, b"prepared"), (MAP_KEY, b"the first map")]
"""What is put later is large beside it: rounds are complete, and history soon outweighs what is alive."""


@dataclass
class TimelineOracle:
    """One timeline: its own values and its ancestor up to the branch point."""

    ancestor: "TimelineOracle | None" = None
    ancestor_lsn: int = START
    values: dict[bytes, dict[int, Value]] = field(default_factory=dict)
    """By key and LSN, LSNs ascending."""
    ends: list[int] = field(default_factory=list)
    """Ends of batches: the record ends that a restart or a branch may stand at."""

    @classmethod
    def imported(cls, images: list[tuple[bytes, bytes]] = IMPORTED) -> "TimelineOracle":
        values = {key: {int(START): Value(key, START, ValueKind.IMAGE, True, data)} for key, data in images}
        return cls(values=values, ends=[START])

    @property
    def last_lsn(self) -> int:
        return self.ends[-1] if self.ends else self.ancestor_lsn

    def chain(self, key: bytes, lsn: int) -> list[Value]:
        """Every value of a key at or below `lsn`, oldest first."""
        older = [] if self.ancestor is None else self.ancestor.chain(key, min(lsn, self.ancestor_lsn))
        return older + [value for at, value in self.values.get(key, {}).items() if at <= lsn]

    def value(self, key: bytes, lsn: int) -> bytes | None:
        chain = self.chain(key, lsn)
        return chain[-1].payload if chain and chain[-1].kind != ValueKind.TOMBSTONE else None

    def blocks(self, file: BlockFile, lsn: int) -> int | None:
        """How many the file has; None if it does not exist."""
        size = self.value(file.size_key, lsn)
        return None if size is None else int.from_bytes(size, "little")

    def page(self, key: bytes, lsn: int) -> bytes:
        return expected_page(self.chain(key, lsn))

    def pages(self, file: BlockFile, first: int, count: int, lsn: int) -> bytes:
        return b"".join(self.page(file.block_key(first + at), lsn) for at in range(count))

    def scan(self, lsn: int) -> list[tuple[bytes, bytes]]:
        """Everything that is not a block."""
        keys = [file.size_key for file in FILES] + [MAP_KEY, TWO_PHASE_KEY]
        found = [(key, self.value(key, lsn)) for key in sorted(keys)]
        return [(key, value) for key, value in found if value is not None]

    def next_values(self, chance: random.Random, count: int) -> None:
        """Notes the values of `count` more records, made as ingest makes them."""
        for _ in range(count):
            lsn = self.last_lsn + 8 * chance.randrange(1, 5)
            for value in self._record(chance, lsn):
                self.values.setdefault(value.key, {})[lsn] = value
            self.ends.append(lsn)

    def _record(self, chance: random.Random, lsn: int) -> list[Value]:
        file = chance.choice(FILES)
        blocks = self.blocks(file, lsn)
        dice = chance.randrange(20)
        if dice == 0:
            return [Value(MAP_KEY, lsn, ValueKind.IMAGE, True, chance.randbytes(20))]
        if dice == 1:
            gone = self.value(TWO_PHASE_KEY, lsn) is not None
            kind = ValueKind.TOMBSTONE if gone else ValueKind.IMAGE
            return [Value(TWO_PHASE_KEY, lsn, kind, True, b"" if gone else chance.randbytes(9))]
        if blocks is not None and dice <= 3:
            fewer = None if chance.random() < 0.4 else chance.randrange(blocks + 1)
            return [size_value(file.size_key, lsn, fewer)]
        block = chance.randrange(min((blocks or 0) + 3, BLOCKS_MAX))
        if blocks is not None and block < blocks:
            return [self._change(chance, file, file.block_key(block), lsn)]
        return self._growth(chance, file, (blocks or 0, block), lsn)

    def _growth(
        self, chance: random.Random, file: BlockFile, blocks: tuple[int, int], lsn: int
    ) -> list[Value]:
        """Blocks between become zeros, the last one is initialised."""
        old_end, block = blocks
        last_key = file.block_key(block)
        zero = Value(last_key, lsn, ValueKind.ZERO_PAGE, True, b"")
        is_slru = file.block_kind is KeyKind.SLRU_BLOCK
        values = [zero if is_slru else record_value(last_key, lsn, chance.randbytes(30), will_init=True)]
        for between in range(old_end, block):
            values.append(zero._replace(key=file.block_key(between)))
        return [*values, size_value(file.size_key, lsn, block + 1)]

    def _change(self, chance: random.Random, file: BlockFile, key: bytes, lsn: int) -> Value:
        dice = chance.randrange(10)
        payload = chance.randbytes(chance.randrange(1, 200))
        if dice == 0:
            return Value(key, lsn, ValueKind.IMAGE, True, image_of(payload))
        if dice == 1:
            return Value(key, lsn, ValueKind.ZERO_PAGE, True, b"")
        if file.has_native_records:
            return Value(key, lsn, ValueKind.NATIVE, False, payload)
        if dice == 2:
            hole = chance.randrange(24, BLOCK_SIZE_BYTES - 600), chance.randrange(600)
            data = image_of(payload)[: BLOCK_SIZE_BYTES - hole[1]]
            return Value(key, lsn, ValueKind.PAGE_IMAGE, True, PAGE_IMAGE_HEAD.pack(0, *hole) + data)
        return record_value(key, lsn, payload, will_init=dice == 3)

    def batches_after(self, lsn: int, records_max: int) -> list[tuple[list[Value], Lsn]]:
        """The own values above `lsn` in batches of whole records, as WAL sent again would bring them."""
        ends = [end for end in self.ends if end > lsn]
        newer = [value for by_lsn in self.values.values() for at, value in by_lsn.items() if at > lsn]
        newer.sort(key=lambda value: value.lsn)
        batches = []
        for start in range(0, len(ends), records_max):
            some = ends[start : start + records_max]
            batches.append(([value for value in newer if lsn < value.lsn <= some[-1]], Lsn(some[-1])))
            lsn = some[-1]
        return batches
