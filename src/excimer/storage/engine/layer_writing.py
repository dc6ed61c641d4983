"""Writing layers: blocks into a local file, and the file into object storage.

The layer's name holds a checksum of its content, so that writing the same layer twice (a retry
after a lost answer, a crash between upload and manifest) puts the same bytes there.

All calls block.
"""

import errno
from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec

from excimer._native.memory_layer import MemoryLayer
from excimer._native.turns import give_way
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, describe_key
from excimer.storage.engine.layer_stack import FrozenLayer, LayerHome
from excimer.storage.format.layer_block import VALUE_HEAD_SIZE_BYTES, pack_value
from excimer.storage.format.layer_file import LayerEncoder, LayerHeader, LayerKind, RawBlock
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value, ValueKind

BLOCKS_PER_TURN = 8
"""Written before others have the core: about a millisecond of decompressing, merging, compressing."""

_ZERO_PAGE = bytes(BLOCK_SIZE_BYTES)


def write_delta(home: LayerHome, frozen: FrozenLayer, generation: int) -> LayerDescription:
    """A frozen memory layer as a local layer file, durable on return. The layer must not be empty."""
    header = LayerHeader(
        LayerKind.DELTA, frozen.memory.start_lsn, frozen.end_lsn, home.tenant_id, home.timeline_id
    )
    blocks = _memory_blocks(frozen.memory, home.context.settings.block_size_bytes)
    layer = write_layer(home, header, blocks, generation)
    return msgspec.structs.replace(layer, key_count=frozen.memory.key_count)


def image_value(key: bytes, lsn: int, data: bytes) -> Value:
    """A whole value for an image layer; a page of zeros takes no room."""
    is_page = key[0] in (KeyKind.RELATION_BLOCK, KeyKind.SLRU_BLOCK)
    if is_page and len(data) != BLOCK_SIZE_BYTES:
        raise ValueError(f"{describe_key(key)}: a page of {len(data)} bytes")
    if is_page and data == _ZERO_PAGE:
        return Value(key, lsn, ValueKind.ZERO_PAGE, True, b"")
    return Value(key, lsn, ValueKind.IMAGE, True, data)


def write_images(
    home: LayerHome, values: Iterable[Value], lsn: int, generation: int, *, covers_after_lsn: int | None
) -> list[LayerDescription]:
    """Values in ascending key order, all of one LSN, as local image layers of a bounded size each."""
    settings = home.context.settings
    blocks = _value_blocks(values, settings.block_size_bytes)
    written = []
    header = LayerHeader(LayerKind.IMAGE, lsn, lsn, home.tenant_id, home.timeline_id)
    block = next(blocks, None)
    while block is not None:
        share = _share(block, blocks, settings.image_layer_size_bytes)
        written.append(write_layer(home, header, share, generation, covers_after_lsn=covers_after_lsn))
        block = next(blocks, None)
    return written


def write_values_delta(
    home: LayerHome, values: Iterable[Value], start_lsn: int, end_lsn: int, generation: int, *, level: int
) -> LayerDescription | None:
    """Values by key, each's from new to old, as a local delta layer; None if there are none.

    All have start < LSN <= end.
    """
    blocks = _value_blocks(values, home.context.settings.block_size_bytes)
    first = next(blocks, None)
    if first is None:
        return None
    header = LayerHeader(LayerKind.DELTA, start_lsn, end_lsn, home.tenant_id, home.timeline_id)
    written = write_layer(home, header, chain((first,), blocks), generation, covers_after_lsn=None)
    return msgspec.structs.replace(written, level=level)


def upload_layer(home: LayerHome, description: LayerDescription) -> None:
    """Copies the local file to object storage, trying a few times; durable on return.

    Raises `ObjectStoreError`, OSError (FileNotFoundError: the local file is gone, write it again).
    """
    context = home.context
    context.uploads.put_layer(
        context.store, home.object_name(description), home.local_path(description), description.size_bytes
    )


def is_here(home: LayerHome, description: LayerDescription) -> bool:
    """Whether the local file is still there and whole."""
    return home.context.filesystem.size_bytes(home.local_path(description)) == description.size_bytes


def write_layer(
    home: LayerHome,
    header: LayerHeader,
    blocks: Iterable[RawBlock],
    generation: int,
    *,
    covers_after_lsn: int | None = None,
) -> LayerDescription:
    """Sorted blocks, at least one, as a local file under its name, durable on return."""
    encoder = LayerEncoder(header)
    filesystem = home.context.filesystem
    kind = "image" if header.kind is LayerKind.IMAGE else "delta"
    unnamed = home.local_dir / f"{kind}-{header.start_lsn:016x}-{header.end_lsn:016x}.new"
    try:
        size = filesystem.write_atomically(unnamed, encoder.parts(_in_turns(blocks)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            home.context.local_disk.relieve()  # so that the caller's next try finds room
        raise
    description = LayerDescription(
        kind=header.kind,
        start_lsn=header.start_lsn,
        end_lsn=header.end_lsn,
        first_key=encoder.places[0].first_key.hex(),
        last_key=encoder.places[-1].last_key.hex(),
        generation=generation,
        fingerprint=encoder.fingerprint,
        size_bytes=size,
        index_offset=encoder.index_offset,
        value_count=encoder.value_count,
        covers_after_lsn=covers_after_lsn,
    )
    filesystem.rename(unnamed, home.local_path(description))
    return description


def _in_turns(blocks: Iterable[RawBlock]) -> Iterator[RawBlock]:
    """The same blocks; readers go first now and then, however many there are."""
    for number, block in enumerate(blocks, 1):
        yield block
        if number % BLOCKS_PER_TURN == 0:
            give_way()


def _memory_blocks(memory: MemoryLayer, target_size_bytes: int) -> Iterator[RawBlock]:
    values = memory.sorted_copy()
    while (block := values.next_block(target_size_bytes)) is not None:
        yield RawBlock(*block)


def _value_blocks(values: Iterable[Value], target_size_bytes: int) -> Iterator[RawBlock]:
    """Cuts sorted values into blocks as `SortedValues.next_block` does."""
    pending: list[Value] = []
    size = 0
    for value in values:
        step = VALUE_HEAD_SIZE_BYTES + len(value.payload)
        if pending and size + step > target_size_bytes:
            yield _raw_block(pending)
            pending, size = [], 0
        pending.append(value)
        size += step
    if pending:
        yield _raw_block(pending)


def _share(first: RawBlock, following: Iterator[RawBlock], size_bytes: int) -> Iterator[RawBlock]:
    """One layer's share of the blocks: `first` and what follows until the size is reached."""
    yield first
    size = len(first.data)
    while size < size_bytes and (block := next(following, None)) is not None:
        size += len(block.data)
        yield block


def _raw_block(values: list[Value]) -> RawBlock:
    lsns = [value.lsn for value in values]
    return RawBlock(
        b"".join(map(pack_value, values)), values[0].key, values[-1].key, min(lsns), max(lsns), len(values)
    )
