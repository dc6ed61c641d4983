"""Damage in object storage: found, named, and told of by exactly the reads that need what is damaged.

One byte of each region of a delta and of an image layer is flipped, the file cut, emptied, removed. What is
read from elsewhere is still right, and nothing wrong is ever served.

Not here: manifests (`test_damaged_manifest`).
"""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from excimer.base.errors import ExcimerError
from excimer.io.object_store import ObjectStoreError
from excimer.storage.engine.partial_copy import LayerMissingError
from excimer.storage.format.layer_file import (
    HEADER_SIZE_BYTES,
    TRAILER_SIZE_BYTES,
    BlockPlace,
    DamagedLayerError,
    unpack_index,
)
from excimer.storage.format.manifest import LayerDescription
from tests.kit.directories import new_memory_directory
from tests.kit.engine_oracle import FILES, BlockFile
from tests.kit.engine_world import EngineWorld
from tests.kit.storage_world import MAIN, START

REGIONS = ("header", "block", "index", "trailer")


@contextmanager
def grown_world() -> Iterator[EngineWorld]:
    world = EngineWorld(new_memory_directory("excimer-damage-"), seed=11)
    try:
        world.create()
        for _ in range(2):
            world.put(MAIN, 40)
            world.flush(MAIN)
        world.compact(MAIN)
        world.put(MAIN, 40)
        world.flush(MAIN)
        yield world
    finally:
        world.close()


def layers_of_each_kind(world: EngineWorld) -> list[LayerDescription]:
    """The newest delta, the largest image layer."""
    layers = [layer.description for layer in world.timeline(MAIN).stack.disk.layers]
    deltas = [layer for layer in layers if layer.start_lsn != layer.end_lsn]
    images = [layer for layer in layers if layer.start_lsn == layer.end_lsn]
    return [
        max(deltas, key=lambda layer: layer.end_lsn),
        max(images, key=lambda layer: (layer.end_lsn, layer.size_bytes)),
    ]


def places(data: bytes, layer: LayerDescription) -> list[BlockPlace]:
    return list(unpack_index(data[layer.index_offset :], layer.index_offset, layer.name).places)


def offset_in(region: str, data: bytes, layer: LayerDescription, chance: random.Random) -> int:
    start, end = {
        "header": (0, HEADER_SIZE_BYTES),
        "block": (HEADER_SIZE_BYTES, layer.index_offset),
        "index": (layer.index_offset, len(data) - TRAILER_SIZE_BYTES),
        "trailer": (len(data) - TRAILER_SIZE_BYTES, len(data)),
    }[region]
    return chance.randrange(start, end)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def attach_without_copies(world: EngineWorld) -> None:
    """As after the loss of the pageserver's disk: nothing of the former process is left."""
    shutil.rmtree(world.process.directory, ignore_errors=True)
    world.process = world._new_process(world.process.directory, world.process.generation)
    world._attach()


def failing_reads(
    world: EngineWorld, errors: tuple[type[ExcimerError], ...], name: str
) -> tuple[list[BlockFile], int]:
    """Every page, now and at the beginning: the files whose reading fails in one of these ways, always
    naming the layer; how many pages were read, and were right.
    """
    timeline, oracle = world.timeline(MAIN), world.oracles[MAIN]
    failed, told, served = [], [], 0
    for lsn in (START, timeline.last_record_lsn):
        for file in FILES:
            for block in range(oracle.blocks(file, lsn) or 0):
                try:
                    page = world.runner.run(timeline.get_pages(file.block_key(block), 1, lsn))
                except errors as error:
                    failed.append(file)
                    told.append(str(error))
                    continue
                assert page == oracle.page(file.block_key(block), lsn)
                served += 1
    assert all(name in each for each in told), "the damaged layer is not named"
    return failed, served


@pytest.mark.parametrize("kind", [0, 1], ids=["delta", "image"])
@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_byte_is_told_of_by_the_reads_that_need_it(region: str, kind: int) -> None:
    chance = random.Random(f"{region} {kind}")
    with grown_world() as world:
        layer = layers_of_each_kind(world)[kind]
        object_name = world.timeline(MAIN).home.object_name(layer)
        intact = world.objects.objects[object_name]
        for _ in range(4):
            at = offset_in(region, intact, layer, chance)
            world.objects.objects[object_name] = flipped(intact, at)
            attach_without_copies(world)
            failed, served = failing_reads(world, (DamagedLayerError,), layer.name)
            assert served, "all is lost for one byte"
            if region != "header":  # which holds nothing that is not known from elsewhere
                assert failed, f"a flipped byte at {at} goes unnoticed"
        world.objects.objects[object_name] = intact
        attach_without_copies(world)
        world.check_all(moments=2)


@pytest.mark.parametrize("kind", [0, 1], ids=["delta", "image"])
def test_only_reads_of_the_damaged_block_fail(kind: int) -> None:
    with grown_world() as world:
        layer = layers_of_each_kind(world)[kind]
        object_name = world.timeline(MAIN).home.object_name(layer)
        data = world.objects.objects[object_name]
        for place in places(data, layer)[1:]:
            world.objects.objects[object_name] = flipped(data, place.offset)
            attach_without_copies(world)
            failed, _ = failing_reads(world, (DamagedLayerError,), layer.name)
            for file in failed:
                first_key, last_key = file.block_key(0), file.block_key(0xFFFF)
                touches_blocks = place.first_key <= last_key and place.last_key >= first_key
                assert touches_blocks or place.first_key <= file.size_key <= place.last_key
        world.objects.objects[object_name] = data


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "cut"])
def test_a_layer_that_is_cut_is_told_of(kept: float) -> None:
    """In object storage, which then has fewer bytes than the manifest says."""
    with grown_world() as world:
        for layer in layers_of_each_kind(world):
            object_name = world.timeline(MAIN).home.object_name(layer)
            intact = world.objects.objects[object_name]
            world.objects.objects[object_name] = intact[: int(len(intact) * kept)]
            attach_without_copies(world)
            failed, served = failing_reads(world, (DamagedLayerError, ObjectStoreError), layer.name)
            assert failed
            assert served
            world.objects.objects[object_name] = intact


def test_a_missing_layer_is_told_of_by_the_reads_that_need_it() -> None:
    with grown_world() as world:
        for layer in layers_of_each_kind(world):
            object_name = world.timeline(MAIN).home.object_name(layer)
            intact = world.objects.objects.pop(object_name)
            attach_without_copies(world)
            failed, served = failing_reads(world, (LayerMissingError,), layer.name)
            assert failed
            assert served
            world.objects.objects[object_name] = intact
        attach_without_copies(world)
        world.check_all(moments=2)


def test_a_damaged_local_copy_is_fetched_again() -> None:
    """The object is good: no read fails."""
    with grown_world() as world:
        timeline = world.timeline(MAIN)
        for layer in layers_of_each_kind(world):
            path = timeline.home.local_path(layer)
            intact = world.objects.objects[timeline.home.object_name(layer)]
            for at in range(0, len(intact), max(1, len(intact) // 12)):
                path.write_bytes(flipped(intact, at))
                world.restart(keep_files=True)
                world.check_all(moments=0)
