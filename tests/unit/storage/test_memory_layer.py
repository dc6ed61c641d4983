"""The native memory layer: malformed batches, and readers beside the writer."""

import threading

import pytest

from excimer._native.memory_layer import MemoryLayer
from excimer._native.page_chains import PageChains
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key
from excimer.storage.format.values import ENTRY, Value, ValueKind, pack_batch

TABLE = Relation(1663, 5, 16384)
BLOCKS = 40


def key(block: int) -> bytes:
    return relation_block_key(TABLE, 0, block)


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY.pack(key(0), 1, 1, 5, 20, 0),  # longer than the data
        ENTRY.pack(key(0), 1, 1, 1, 20, 5),  # starts behind the data
        ENTRY.pack(key(0), 1, 1, 1, 20, 2**64 - 1),
        ENTRY.pack(key(0), 1, 1, 1, 10, 0),  # not above the last record
        ENTRY.pack(key(0), 1, 1, 1, 31, 0),  # above the batch's end
        ENTRY.pack(key(0), 1, 1, 1, 20, 0)[:-1],
        ENTRY.pack(key(0), 1, 1, 1, 20, 0) + ENTRY.pack(key(0), 1, 1, 1, 19, 0),  # LSNs go back
    ],
)
def test_malformed_batches_add_nothing(entry: bytes) -> None:
    memory = MemoryLayer(10)
    with pytest.raises(ValueError, match="entr"):
        memory.put_batch(entry, b"data", 10, 30)
    assert (memory.value_count, memory.newest_lsn, memory.data_size_bytes) == (0, 10, 0)


def test_a_frozen_layer_takes_nothing() -> None:
    memory = MemoryLayer(10)
    memory.freeze()
    with pytest.raises(ValueError, match="frozen"):
        memory.put_batch(b"", b"", 10, 10)


def test_of_two_values_of_one_key_and_lsn_the_later_counts() -> None:
    memory = MemoryLayer(10)
    values = [
        Value(key(0), 20, ValueKind.IMAGE, True, b"first"),
        Value(key(0), 20, ValueKind.IMAGE, True, b"second"),
    ]
    batch = pack_batch(values)
    memory.put_batch(batch.entries, batch.data, 10, 20)
    assert memory.find_value(key(0), 0, 20) == (20, 1, b"second")
    assert memory.value_count == 1


def test_readers_beside_the_writer_see_exactly_their_lsn() -> None:
    """The tables are grown many times over while three threads read below what was announced."""
    memory = MemoryLayer(0)
    announced = 0
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            lsn = announced
            chains = PageChains(key(0), BLOCKS, lsn)
            memory.collect(chains, lsn)
            chains.close_all()
            chains.restore_bases()
            pages = chains.take_pages()
            for block in range(BLOCKS):
                newest = max(
                    (each for each in range(lsn, max(lsn - BLOCKS, 0), -1) if each % BLOCKS == block),
                    default=0,
                )
                page = pages[block * BLOCK_SIZE_BYTES : (block + 1) * BLOCK_SIZE_BYTES]
                if page != newest.to_bytes(8, "little") * (BLOCK_SIZE_BYTES // 8):
                    wrong.append(f"block {block} at {lsn}")
                    return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for start in range(1, 6000, 500):
        values = []
        for lsn in range(start, start + 500):
            page = lsn.to_bytes(8, "little") * (BLOCK_SIZE_BYTES // 8)
            values.append(Value(key(lsn % BLOCKS), lsn, ValueKind.IMAGE, True, page))
            values.append(Value(relation_block_key(TABLE, 1, lsn), lsn, ValueKind.ZERO_PAGE, True, b""))
        batch = pack_batch(values)
        memory.put_batch(batch.entries, batch.data, start - 1, start + 499)
        announced = start + 499
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert memory.key_count == BLOCKS + 6000
