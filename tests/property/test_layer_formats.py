"""Layer files and manifests: what is written is read, and no flipped or missing byte goes unseen."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.memory_layer import MemoryLayer
from excimer._native.page_chains import key_runs, scan_block
from excimer.base.errors import CorruptionError
from excimer.base.keys import KEY_SIZE_BYTES, MAX_KEY, MIN_KEY, Relation, relation_block_key
from excimer.base.lsn import MAX_LSN
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import MemoryObjectStore
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.layer_stack import FrozenLayer, LayerHome
from excimer.storage.engine.layer_writing import upload_layer, write_delta, write_images
from excimer.storage.format.layer_block import pack_value, unpack_block
from excimer.storage.format.layer_file import DamagedLayerError, LayerKind
from excimer.storage.format.manifest import (
    DamagedManifestError,
    LayerDescription,
    Manifest,
    ManifestName,
    pack_manifest,
    parse_manifest_name,
    unpack_manifest,
)
from excimer.storage.format.values import Value, ValueKind, pack_batch
from tests.kit.storage_world import MAIN, START, TENANT, in_event_loop, storage_context

TABLE = Relation(1663, 5, 16384)

keys = st.one_of(
    st.integers(0, 30).map(lambda block: relation_block_key(TABLE, 0, block)),
    st.binary(min_size=KEY_SIZE_BYTES, max_size=KEY_SIZE_BYTES),
)
kinds = st.sampled_from([ValueKind.IMAGE, ValueKind.WAL_RECORD, ValueKind.NATIVE, ValueKind.TOMBSTONE])
values = st.lists(
    st.tuples(keys, st.integers(1, 3), kinds, st.booleans(), st.binary(max_size=300)), min_size=1, max_size=80
)


def with_lsns(drawn: list[tuple[bytes, int, ValueKind, bool, bytes]]) -> list[Value]:
    lsn = START + 1
    made = []
    for key, step, kind, starts, payload in drawn:
        lsn += step - 1
        made.append(Value(key, lsn, kind, starts, payload))
    return made


def stored_form(batch: list[Value]) -> list[Value]:
    """One value per (key, LSN), the later one; by key, then newest first."""
    latest = {(value.key, value.lsn): value for value in batch}
    return sorted(latest.values(), key=lambda value: (value.key, -value.lsn))


def memory_of(batch: list[Value]) -> MemoryLayer:
    memory = MemoryLayer(START)
    packed = pack_batch(batch)
    memory.put_batch(packed.entries, packed.data, START, batch[-1].lsn)
    return memory


@settings(deadline=None)
@given(drawn=values, block_size=st.sampled_from([1, 100, 1000, 100_000]))
def test_a_memory_layer_is_cut_into_blocks_by_key_newest_first(
    drawn: list[tuple[bytes, int, ValueKind, bool, bytes]], block_size: int
) -> None:
    batch = with_lsns(drawn)
    memory = memory_of(batch)
    memory.freeze()
    cut = memory.sorted_copy()
    unpacked: list[Value] = []
    while (block := cut.next_block(block_size)) is not None:
        raw, first_key, last_key, lowest_lsn, highest_lsn, count = block
        inside = list(unpack_block(raw))
        assert raw == b"".join(map(pack_value, inside))
        assert (first_key, last_key, count) == (inside[0].key, inside[-1].key, len(inside))
        assert (lowest_lsn, highest_lsn) == (min(v.lsn for v in inside), max(v.lsn for v in inside))
        assert len(raw) <= block_size or count == 1
        distinct = {value.key for value in inside}
        assert sum(run for _, run in key_runs(raw)) == len(distinct)
        assert {first for first, _ in key_runs(raw)} <= distinct
        unpacked += inside
    assert unpacked == stored_form(batch)
    assert cut.key_range == (unpacked[0].key, unpacked[-1].key)


@settings(deadline=None)
@given(drawn=values, low=st.integers(START, START + 60), high=st.integers(START, START + 200), data=st.data())
def test_memory_and_blocks_find_the_same_values(
    drawn: list[tuple[bytes, int, ValueKind, bool, bytes]], low: int, high: int, data: st.DataObject
) -> None:
    batch = with_lsns(drawn)
    memory = memory_of(batch)
    start, end = sorted((data.draw(st.one_of(keys, st.just(MIN_KEY))), data.draw(keys)))
    expected: dict[bytes, tuple[int, int, bytes]] = {}
    for value in stored_form(batch):
        if low < value.lsn <= high and start <= value.key < end:
            expected.setdefault(value.key, (value.lsn, int(value.kind), value.payload))
    block = b"".join(map(pack_value, stored_form(batch)))
    from_block: dict[bytes, tuple[int, int, bytes]] = {}
    scan_block(block, start, end, low, high, from_block)
    assert from_block == expected
    from_memory: dict[bytes, tuple[int, int, bytes]] = {}
    memory.scan(start, end, low, high, from_memory)
    block_kinds = (0x00, 0x20)
    if start[0] in block_kinds:
        assert from_memory == expected
    else:  # a scan that starts among other kinds promises those only
        metadata = {key: found for key, found in expected.items() if key[0] not in block_kinds}
        assert {key: found for key, found in from_memory.items() if key[0] not in block_kinds} == metadata
    for key in {value.key for value in batch}:
        found = memory.find_value(key, low, high)
        if start <= key < end:
            assert found == expected.get(key)


@in_event_loop
async def test_every_flipped_byte_of_a_layer_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    """In the header, each block, the index and the trailer: never another value, never a silent loss."""
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        home = LayerHome(context, TENANT, MAIN)
        chance = random.Random(5)
        batch = [
            Value(relation_block_key(TABLE, 0, number % 7), START + 8 + number, ValueKind.WAL_RECORD, False,
                  chance.randbytes(400) + bytes(3000))
            for number in range(60)
        ]  # fmt: skip
        memory = memory_of(batch)
        memory.freeze()
        description = write_delta(home, FrozenLayer(memory, batch[-1].lsn, 0), 1)
        upload_layer(home, description)
        path, name = home.local_path(description), home.object_name(description)
        good = path.read_bytes()
        assert read_all(home, description) == stored_form(batch)
        for at in sorted({*range(120), *range(len(good) - 400, len(good)), *range(0, len(good), 97)}):
            damaged = bytearray(good)
            damaged[at] ^= 1 << chance.randrange(8)
            for is_here in (True, False):
                path.unlink(missing_ok=True)
                if is_here:
                    path.write_bytes(damaged)
                objects.objects[name] = bytes(damaged)
                with pytest.raises(DamagedLayerError, match=description.name):
                    read_all(home, description)
            if at % 50:
                continue  # one healed in fifty will do: it is synced to disk
            path.write_bytes(damaged)
            objects.objects[name] = good
            assert read_all(home, description) == stored_form(batch), "a damaged copy is fetched again"


@in_event_loop
async def test_a_local_copy_of_the_wrong_size_is_fetched_again(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        home = LayerHome(context, TENANT, MAIN)
        batch = [Value(relation_block_key(TABLE, 0, 1), START + 8, ValueKind.WAL_RECORD, False, b"x" * 90)]
        memory = memory_of(batch)
        memory.freeze()
        description = write_delta(home, FrozenLayer(memory, batch[-1].lsn, 0), 1)
        upload_layer(home, description)
        path = home.local_path(description)
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        assert read_all(home, description) == stored_form(batch)
        assert path.read_bytes() == good


def read_all(home: LayerHome, description: LayerDescription) -> list[Value]:
    layer = home.disk_layer(description)
    try:
        blocks = layer.blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN, cached=False)
        values = [value for block in blocks for value in unpack_block(block)]
        home.context.local_disk.wait_idle()
        return values
    finally:
        layer.close()


@in_event_loop
async def test_images_are_split_into_layers_of_a_bounded_size(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=StorageSettings(image_layer_size_bytes=100_000)) as context:
        home = LayerHome(context, TENANT, MAIN)
        chance = random.Random(6)
        images = [
            Value(relation_block_key(TABLE, 0, number), START, ValueKind.IMAGE, True, chance.randbytes(8192))
            for number in range(50)
        ]
        layers = write_images(home, images, START, 1, covers_after_lsn=0)
        assert len(layers) > 3
        assert [value for layer in layers for value in read_all(home, layer)] == images
        assert len({layer.name for layer in layers}) == len(layers)


manifests = st.builds(
    Manifest,
    tenant_id=st.just(TENANT),
    timeline_id=st.just(MAIN),
    pg_version=st.integers(14, 18),
    system_id=st.integers(0, 2**64 - 1),
    wal_segment_size_bytes=st.just(1 << 24),
    oldest_lsn=st.integers(0, 2**64 - 1),
    disk_consistent_lsn=st.integers(0, 2**64 - 1),
    prev_record_lsn=st.integers(0, 2**64 - 1),
    ancestor_timeline_id=st.none() | st.just(MAIN),
    layers=st.lists(
        st.builds(
            LayerDescription,
            kind=st.sampled_from(LayerKind),
            start_lsn=st.integers(0, 2**64 - 1),
            end_lsn=st.integers(0, 2**64 - 1),
            first_key=st.just(MIN_KEY.hex()),
            last_key=st.just(MAX_KEY.hex()),
            generation=st.integers(0, 2**32 - 1),
            fingerprint=st.integers(0, 2**32 - 1),
            size_bytes=st.integers(0, 2**40),
            index_offset=st.integers(0, 2**40),
            value_count=st.integers(0, 2**40),
            covers_after_lsn=st.none() | st.integers(0, 2**64 - 1),
        ),
        max_size=3,
    ).map(tuple),
)


@given(manifest=manifests, data=st.data())
@settings(max_examples=60, deadline=None)
def test_manifests_come_back_or_are_refused(manifest: Manifest, data: st.DataObject) -> None:
    packed = pack_manifest(manifest)
    assert unpack_manifest(packed, "index-1") == manifest
    at = data.draw(st.integers(0, len(packed) - 1))
    damaged = packed[:at] + bytes([packed[at] ^ 1 << data.draw(st.integers(0, 7))]) + packed[at + 1 :]
    with pytest.raises(DamagedManifestError, match="index-1"):
        unpack_manifest(damaged, "index-1")
    with pytest.raises(CorruptionError):
        unpack_manifest(packed[:at], "index-1")


def test_manifest_names_order_by_generation_then_sequence() -> None:
    names = [ManifestName(1, 300), ManifestName(2, 1), ManifestName(2, 17)]
    assert sorted(map(str, names)) == list(map(str, names))
    assert [parse_manifest_name(str(name)) for name in names] == names
    assert parse_manifest_name("index-1-2") is None


def test_local_files_are_whole_or_absent(tmp_path: Path) -> None:
    filesystem = LocalFilesystem()
    assert filesystem.write_atomically(tmp_path / "a" / "b", [b"one", b"", b"two"]) == 6
    assert filesystem.read(tmp_path / "a" / "b") == b"onetwo"
    assert filesystem.list_files(tmp_path / "a") == ["b"]
    assert filesystem.size_bytes(tmp_path / "missing") is None
