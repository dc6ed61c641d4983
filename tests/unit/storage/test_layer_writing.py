"""A layer is written in turns with whoever waits for the core."""

from pathlib import Path

import pytest

from excimer._native.turns import give_way
from excimer.base.keys import Relation, relation_block_key
from excimer.storage.engine import layer_writing
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.layer_writing import BLOCKS_PER_TURN, image_value, write_images
from tests.kit.storage_world import MAIN, START, TENANT, in_event_loop, storage_context

TABLE = Relation(1663, 5, 16384)


@in_event_loop
async def test_others_have_their_turn_between_the_blocks_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    async with storage_context(tmp_path) as context:
        monkeypatch.setattr(layer_writing, "give_way", lambda: turns.append(1))
        pages_per_block = context.settings.block_size_bytes // 8192
        pages = 5 * BLOCKS_PER_TURN * pages_per_block
        images = [
            image_value(relation_block_key(TABLE, 0, number), START, bytes([1 + number % 255]) * 8192)
            for number in range(pages)
        ]
        (layer,) = write_images(LayerHome(context, TENANT, MAIN), images, START, 1, covers_after_lsn=0)
        assert layer.value_count == pages
        assert len(turns) >= 5


def test_giving_way_comes_back_when_nobody_waits() -> None:
    for _ in range(1000):
        give_way()
