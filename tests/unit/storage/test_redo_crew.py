"""What a crew makes of workers that err, die, fall silent or do not start; the workers are fakes."""

from collections.abc import Callable, Sequence

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.storage.engine import redo_crew
from excimer.storage.engine.redo_crew import ATTEMPTS, RedoCrew, RedoError, RedoUnavailableError
from excimer.storage.engine.redo_gathering import BATCH_REQUESTS_MAX, BATCH_SIZE_BYTES_MAX
from excimer.storage.engine.redo_pool import split_batches
from excimer.storage.engine.redo_worker import Exchange, Failure, RedoWorkerStartError
from excimer.wire.redo import decode_redo_request, encode_redo_request

ERRS, DIES = 1_000, 2_000
"""Blocks that a fake worker cannot rebuild, in one way or the other."""


def request(block: int) -> bytes:
    return encode_redo_request((1663, 5, 16384), 0, block, None, [(0x100, 0x180, b"x" * 30)])


def page(block: int) -> bytes:
    return block.to_bytes(8, "little") * (BLOCK_SIZE_BYTES // 8)


class FakeWorker:
    """Rebuilds any page but two; notes whether it is asked anything after a failure."""

    def __init__(self, dies_at: Callable[[int], bool] = lambda count: False, memory: int = 0) -> None:
        self.process_id = 1
        self.request_count = 0
        self.closed = 0
        self.memory = memory
        self._dies_at = dies_at
        self._failed = False

    def exchange(self, requests: Sequence[bytes], timeout_s: float) -> Exchange:
        assert not self._failed, "a worker was used again after a failure"
        assert not self.closed
        pages: list[bytes] = []
        for index, each in enumerate(requests):
            block = decode_redo_request(each).block
            self.request_count += 1
            if block == ERRS:
                return self._fail(pages, Failure(index, "record 0/100 (Heap): invalid lp", 0x100, True))
            if block == DIES:
                return self._fail(pages, Failure(index, "died of SIGSEGV", 0x100, False))
            if self._dies_at(self.request_count):
                return self._fail(pages, Failure(None, "died of SIGKILL", 0, False))
            pages.append(page(block))
        return Exchange(pages, None)

    def _fail(self, pages: list[bytes], failure: Failure) -> Exchange:
        self._failed = True
        return Exchange(pages, failure)

    def memory_bytes(self) -> int:
        return self.memory

    def scratch_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.closed += 1


class Yard:
    """Starts fake workers and remembers them."""

    def __init__(self, **options: object) -> None:
        self.workers: list[FakeWorker] = []
        self._options = options

    def start(self) -> FakeWorker:
        worker = FakeWorker(**self._options)  # type: ignore[arg-type]
        self.workers.append(worker)
        return worker


def test_pages_come_in_order_from_one_worker() -> None:
    yard = Yard()
    crew = RedoCrew(yard.start)
    for _ in range(3):
        assert crew.run_batch([request(block) for block in range(20)]) == [page(b) for b in range(20)]
    assert len(yard.workers) == 1
    crew.close()
    assert yard.workers[0].closed == 1
    assert crew.process_ids() == []


@pytest.mark.parametrize(("bad", "attempts"), [(ERRS, 2), (DIES, ATTEMPTS)])
def test_a_bad_request_is_named_and_the_others_answered(bad: int, attempts: int) -> None:
    yard = Yard()
    crew = RedoCrew(yard.start)
    results = crew.run_batch([request(block) for block in (1, 2, bad, 3, bad, 4)])
    assert [results[index] for index in (0, 1, 3, 5)] == [page(block) for block in (1, 2, 3, 4)]
    for index in (2, 4):
        error = results[index]
        assert isinstance(error, RedoError)
        assert error.record_lsn == 0x100
        assert error.lsn == 0x180
        assert f"relation block 1663/5/16384 main {bad}" in str(error)
        assert "0/180" in str(error)
        assert "0/100" in str(error)
    # Each failure took a worker: two in the batch, then each suspect alone. One more served the rest.
    assert len(yard.workers) == 2 + 1 + 2 * (attempts - 1)
    assert all(worker.closed == 1 for worker in yard.workers[:2])
    assert crew.run_batch([request(9)]) == [page(9)]


def test_workers_killed_from_outside_cost_nothing_else() -> None:
    yard = Yard(dies_at=lambda count: count == 7)
    crew = RedoCrew(yard.start)
    assert crew.run_batch([request(block) for block in range(30)]) == [page(block) for block in range(30)]
    assert len(yard.workers) == 5


def test_workers_that_never_live_are_an_error_to_retry() -> None:
    crew = RedoCrew(Yard(dies_at=lambda count: True).start)
    with pytest.raises(RedoUnavailableError, match="do not stay alive"):
        crew.run_batch([request(1)])


def test_starting_is_tried_again_with_growing_pauses() -> None:
    pauses: list[float] = []
    yard = Yard()

    def start() -> FakeWorker:
        if len(pauses) < 2:
            raise RedoWorkerStartError("no memory")
        return yard.start()

    crew = RedoCrew(start, pause=pauses.append)
    assert crew.run_batch([request(1)]) == [page(1)]
    assert pauses == sorted(pauses)
    assert len(pauses) == 2


def test_starting_is_given_up_with_the_reason() -> None:
    def start() -> FakeWorker:
        raise RedoWorkerStartError("no memory")

    with pytest.raises(RedoUnavailableError, match="no memory"):
        RedoCrew(start, pause=lambda seconds: None).run_batch([request(1)])


def test_a_worker_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo_crew, "CHECK_EVERY_REQUESTS", 10)
    yard = Yard(memory=redo_crew.MEMORY_BYTES_MAX + 1)
    crew = RedoCrew(yard.start)
    for _ in range(4):
        crew.run_batch([request(block) for block in range(5)])
    assert len(yard.workers) == 2
    assert all(worker.closed for worker in yard.workers)


def test_a_worker_does_not_live_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo_crew, "LIFE_REQUESTS", 12)
    yard = Yard()
    crew = RedoCrew(yard.start)
    for _ in range(4):
        crew.run_batch([request(block) for block in range(6)])
    assert len(yard.workers) == 2


@pytest.mark.parametrize(
    ("count", "workers", "batches"), [(0, 4, 0), (1, 4, 1), (16, 4, 1), (40, 4, 3), (400, 2, 2), (2000, 2, 8)]
)
def test_batches_are_fair_and_bounded(count: int, workers: int, batches: int) -> None:
    requests = [bytes([index % 256]) for index in range(count)]
    split = list(split_batches(requests, workers))
    assert [each for batch in split for each in batch] == requests
    assert len(split) == batches
    assert all(len(batch) <= BATCH_REQUESTS_MAX for batch in split)


def test_long_requests_make_small_batches() -> None:
    requests = [bytes(BATCH_SIZE_BYTES_MAX // 2)] * 3 + [bytes(BATCH_SIZE_BYTES_MAX * 2)]
    assert [len(batch) for batch in split_batches(requests, 1)] == [2, 1, 1]
