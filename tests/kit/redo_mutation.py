"""Real chains with one record damaged so that its checksum is right: what only redo itself can notice."""

import random
import struct
from collections.abc import Sequence

from excimer.pgformat.wal_record import RECORD_HEADER_SIZE_BYTES, WalRecord, record_crc
from excimer.wire.redo import encode_redo_request
from tests.kit.redo_truth import Chain, PageId

CHAIN_RECORDS_MAX = 30
_VALUES_AT_THE_EDGE = (0, 1, 127, 128, 255)


def mutated_request(chance: random.Random, page: PageId, chain: Chain) -> bytes:
    """The first records of a chain, one of them with some bytes changed, or missing."""
    count = chance.randint(1, min(len(chain.records), CHAIN_RECORDS_MAX))
    records: list[WalRecord] = list(chain.records[:count])
    at = chance.randrange(count)
    if chance.random() < 0.15:
        del records[at]
    else:
        records[at] = records[at]._replace(data=_mutate(chance, records[at].data))
    return encode_redo_request(page.relation, page.fork, page.block, None, records)


def _mutate(chance: random.Random, record: bytes) -> bytes:
    changed = bytearray(record)
    for _ in range(chance.choice((1, 1, 2, 6))):
        # Byte 16 is xl_info: which of its manager's operations a record is.
        place = 16 if chance.random() < 0.1 else chance.randrange(RECORD_HEADER_SIZE_BYTES, len(changed))
        bit = changed[place] ^ 1 << chance.randrange(8)
        changed[place] = chance.choice((bit, chance.choice(_VALUES_AT_THE_EDGE), chance.randrange(256)))
    changed[20:24] = struct.pack("<I", record_crc(bytes(changed)))
    return bytes(changed)


def interleave(good: Sequence[bytes], bad: Sequence[bytes], chance: random.Random) -> list[tuple[bytes, int]]:
    """All requests in a random order; the number says which good one it is, -1 for a bad one."""
    mixed = [(request, index) for index, request in enumerate(good)] + [(request, -1) for request in bad]
    chance.shuffle(mixed)
    return mixed
