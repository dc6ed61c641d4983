"""What a timeline must answer, computed the slow way from every value that was ever put."""

import random
import struct
from dataclasses import dataclass, field

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, KeyKind, Relation, make_key, parse_key
from excimer.base.keys import relation_block_key as block_key
from excimer.base.keys import relation_size_key as size_key
from excimer.base.lsn import Lsn
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_world import START, expected_page, image_of, record_value, size_value

RELATIONS = tuple(Relation(1663, 5, 16384 + number) for number in range(3))
FORKS = (Fork.MAIN, Fork.VM)
BLOCKS_MAX = 12
MAP_KEY = make_key(KeyKind.RELATION_MAP, 1663, 5)
IMPORTED: list[tuple[bytes, bytes]] = [
    (size_key(RELATIONS[0], Fork.MAIN), struct.pack("<I", 8)),
    *((block_key(RELATIONS[0], Fork.MAIN, number), image_of(b"%d" % number)) for number in range(6)),
    (block_key(RELATIONS[0], Fork.MAIN, 6), bytes(BLOCK_SIZE_BYTES)),
    (MAP_KEY, b"the first map"),
]


@dataclass
class TimelineOracle:
    """One timeline: its own values, oldest first, and its ancestor up to the branch point."""

    ancestor: "TimelineOracle | None" = None
    ancestor_lsn: int = START
    values: list[Value] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Ends of batches: the record ends that a restart or a branch may stand at."""

    @classmethod
    def imported(cls) -> "TimelineOracle":
        values = [Value(key, START, ValueKind.IMAGE, True, data) for key, data in IMPORTED]
        return cls(values=values, ends=[START])

    @property
    def last_lsn(self) -> int:
        return self.ends[-1] if self.ends else self.ancestor_lsn

    def chain(self, key: bytes, lsn: int) -> list[Value]:
        """Every value of a key at or below `lsn`, oldest first."""
        older = [] if self.ancestor is None else self.ancestor.chain(key, min(lsn, self.ancestor_lsn))
        return older + [value for value in self.values if value.key == key and value.lsn <= lsn]

    def value(self, key: bytes, lsn: int) -> bytes | None:
        chain = self.chain(key, lsn)
        return chain[-1].payload if chain and chain[-1].kind != ValueKind.TOMBSTONE else None

    def size(self, relation: Relation, fork: int, lsn: int) -> int | None:
        size = self.value(size_key(relation, fork), lsn)
        return None if size is None else int.from_bytes(size, "little")

    def page(self, key: bytes, lsn: int) -> bytes:
        return expected_page(self.chain(key, lsn))

    def scan(self, lsn: int) -> list[tuple[bytes, bytes]]:
        keys = [size_key(relation, fork) for relation in RELATIONS for fork in FORKS] + [MAP_KEY]
        found = [(key, self.value(key, lsn)) for key in sorted(keys)]
        return [(key, value) for key, value in found if value is not None]

    def next_values(self, chance: random.Random, count: int) -> list[Value]:
        """The values of `count` more records, made as ingest makes them, and noted here."""
        made: list[Value] = []
        for _ in range(count):
            lsn = self.last_lsn + 8 * chance.randrange(1, 5)
            fresh = self._record(chance, lsn)
            made += fresh
            self.values += fresh
            self.ends.append(lsn)
        return made

    def _record(self, chance: random.Random, lsn: int) -> list[Value]:
        relation, fork = chance.choice(RELATIONS), chance.choice(FORKS)
        size = self.size(relation, fork, lsn)
        dice = chance.randrange(20)
        if dice == 0:
            return [Value(MAP_KEY, lsn, ValueKind.IMAGE, True, chance.randbytes(20))]
        if size is not None and dice == 1:
            smaller = None if chance.random() < 0.4 else chance.randrange(size + 1)
            return [size_value(size_key(relation, fork), lsn, smaller)]
        block = chance.randrange(min((size or 0) + 3, BLOCKS_MAX))
        key = block_key(relation, fork, block)
        values = [self._block_value(chance, key, lsn)]
        if size is None or block >= size:  # growing: the blocks between become zeros, this one is initialised
            values = [record_value(key, lsn, chance.randbytes(30), will_init=True)]
            for between in range(size or 0, block):
                between_key = block_key(relation, fork, between)
                values.append(Value(between_key, lsn, ValueKind.ZERO_PAGE, True, b""))
            values.append(size_value(size_key(relation, fork), lsn, block + 1))
        return values

    def _block_value(self, chance: random.Random, key: bytes, lsn: int) -> Value:
        dice = chance.randrange(10)
        payload = chance.randbytes(chance.randrange(1, 200))
        if dice == 0:
            return Value(key, lsn, ValueKind.IMAGE, True, image_of(payload))
        if dice == 1:
            return Value(key, lsn, ValueKind.ZERO_PAGE, True, b"")
        if parse_key(key).fork == Fork.VM:
            return Value(key, lsn, ValueKind.NATIVE, False, payload)
        return record_value(key, lsn, payload, will_init=dice == 2)

    def batches_after(self, lsn: int, records_max: int) -> list[tuple[list[Value], Lsn]]:
        """The own values above `lsn` in batches of whole records, as WAL sent again would bring them."""
        ends = [end for end in self.ends if end > lsn]
        batches = []
        for start in range(0, len(ends), records_max):
            some = ends[start : start + records_max]
            batches.append(([value for value in self.values if lsn < value.lsn <= some[-1]], Lsn(some[-1])))
            lsn = some[-1]
        return batches
