"""A layer is written in turns with whoever waits for the core."""

import sys
import threading
import time
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


def test_giving_way_lets_go_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread gets on although it would not be its turn for minutes; nothing else here lets it."""
    begun, done = threading.Event(), threading.Event()

    def other() -> None:
        begun.set()
        for _ in range(100):
            give_way()
        done.set()

    usual_s = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    sys.setswitchinterval(600)
    try:
        for _ in range(1_000_000):
            if done.is_set():
                break
            give_way()
        assert done.is_set()
    finally:
        sys.setswitchinterval(usual_s)
        thread.join()


def test_giving_way_comes_back_at_once_when_nobody_waits() -> None:
    """It may not cost a layer more than what it is for: a thousand times within a time slice or so each."""
    started_s = time.thread_time()
    for _ in range(1000):
        give_way()
    assert time.thread_time() - started_s < 0.1
