"""What a supervisor makes of workers that err, die, fall silent or do not start, and of many tenants; the
workers are fakes.
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from excimer.base.ids import TenantId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.storage.engine import redo_supervisor
from excimer.storage.engine.redo_supervisor import ATTEMPTS, RedoError, RedoSupervisor, RedoUnavailableError
from excimer.storage.engine.redo_worker import Exchange, Failure, RedoWorkerStartError
from excimer.wire.redo import decode_redo_request, encode_redo_request

TENANT, OTHER, THIRD = (TenantId(f"{number:032x}") for number in (1, 2, 3))

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
    supervisor = RedoSupervisor(yard.start, 4)
    for _ in range(3):
        assert supervisor.run_batch(TENANT, [request(block) for block in range(20)]) == [
            page(b) for b in range(20)
        ]
    assert len(yard.workers) == 1
    supervisor.close()
    assert yard.workers[0].closed == 1
    assert supervisor.process_ids() == []


@pytest.mark.parametrize(("bad", "attempts"), [(ERRS, 2), (DIES, ATTEMPTS)])
def test_a_bad_request_is_named_and_the_others_answered(bad: int, attempts: int) -> None:
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 4)
    results = supervisor.run_batch(TENANT, [request(block) for block in (1, 2, bad, 3, bad, 4)])
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
    assert supervisor.run_batch(TENANT, [request(9)]) == [page(9)]


def test_workers_killed_from_outside_cost_nothing_else() -> None:
    yard = Yard(dies_at=lambda count: count == 7)
    supervisor = RedoSupervisor(yard.start, 4)
    assert supervisor.run_batch(TENANT, [request(block) for block in range(30)]) == [
        page(block) for block in range(30)
    ]
    assert len(yard.workers) == 5


def test_workers_that_never_live_are_an_error_to_retry() -> None:
    supervisor = RedoSupervisor(Yard(dies_at=lambda count: True).start, 4)
    with pytest.raises(RedoUnavailableError, match="do not stay alive"):
        supervisor.run_batch(TENANT, [request(1)])


def test_starting_is_tried_again_with_growing_pauses() -> None:
    pauses: list[float] = []
    yard = Yard()

    def start() -> FakeWorker:
        if len(pauses) < 2:
            raise RedoWorkerStartError("no memory")
        return yard.start()

    supervisor = RedoSupervisor(start, 4, pause=pauses.append)
    assert supervisor.run_batch(TENANT, [request(1)]) == [page(1)]
    assert pauses == sorted(pauses)
    assert len(pauses) == 2


def test_starting_is_given_up_with_the_reason() -> None:
    def start() -> FakeWorker:
        raise RedoWorkerStartError("no memory")

    with pytest.raises(RedoUnavailableError, match="no memory"):
        RedoSupervisor(start, 4, pause=lambda seconds: None).run_batch(TENANT, [request(1)])


def test_a_worker_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo_supervisor, "CHECK_EVERY_REQUESTS", 10)
    yard = Yard(memory=redo_supervisor.MEMORY_BYTES_MAX + 1)
    supervisor = RedoSupervisor(yard.start, 4)
    for _ in range(4):
        supervisor.run_batch(TENANT, [request(block) for block in range(5)])
    assert len(yard.workers) == 2
    assert all(worker.closed for worker in yard.workers)


def test_a_worker_does_not_live_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo_supervisor, "LIFE_REQUESTS", 12)
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 4)
    for _ in range(4):
        supervisor.run_batch(TENANT, [request(block) for block in range(6)])
    assert len(yard.workers) == 2


def tenants_of(yard: Yard) -> list[int]:
    """Which worker each tenant's page came from is seen by the number of its requests."""
    return [worker.request_count for worker in yard.workers]


def test_a_worker_serves_one_tenant_only() -> None:
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 4)
    for tenant, count in [(TENANT, 3), (OTHER, 5), (TENANT, 1), (THIRD, 2), (OTHER, 1)]:
        supervisor.run_batch(tenant, [request(block) for block in range(count)])
    assert tenants_of(yard) == [4, 6, 2]
    assert supervisor.recycled == 0


@pytest.mark.parametrize(("pause_s", "closed"), [(2.0, [0, 1, 0]), (0.1, [1, 0, 0])])
def test_the_tenant_that_has_not_read_for_longest_loses_its_worker(pause_s: float, closed: list[int]) -> None:
    """Or, where all have read just now, the one that has had its own for longest."""
    now = [0.0]
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 2, clock=lambda: now[0])
    for tenant in (TENANT, OTHER, TENANT, THIRD):
        assert supervisor.would_recycle(tenant) is (tenant == THIRD)
        supervisor.run_batch(tenant, [request(1)])
        now[0] += pause_s
    assert [worker.closed for worker in yard.workers] == closed
    assert tenants_of(yard) == [2, 1, 1]
    assert supervisor.recycled == 1
    assert len(supervisor.process_ids()) == 2


def test_a_request_at_fault_is_tried_again_in_a_fresh_worker_of_the_same_bound() -> None:
    """The bound counts what is alive, whatever ends workers."""
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 1)
    for tenant in (TENANT, OTHER, TENANT):
        outcome = supervisor.run_batch(tenant, [request(1), request(DIES), request(2)])
        assert [outcome[0], outcome[2]] == [page(1), page(2)]
        assert len([worker for worker in yard.workers if not worker.closed]) <= 1
    supervisor.close()
    assert not supervisor.has_workers


def test_workers_that_do_not_start_leave_their_places_to_others() -> None:
    yard = Yard()
    fails = [True]

    def start() -> FakeWorker:
        if fails[0]:
            raise RedoWorkerStartError("no memory")
        return yard.start()

    supervisor = RedoSupervisor(start, 1, pause=lambda seconds: None)
    for _ in range(3):
        with pytest.raises(RedoUnavailableError):
            supervisor.run_batch(TENANT, [request(1)])
    fails[0] = False
    assert supervisor.run_batch(OTHER, [request(1)]) == [page(1)]


def test_idle_workers_go() -> None:
    now = [0.0]
    yard = Yard()
    supervisor = RedoSupervisor(yard.start, 4, clock=lambda: now[0])
    supervisor.run_batch(TENANT, [request(1)])
    now[0] = redo_supervisor.IDLE_S_MAX / 2
    supervisor.run_batch(OTHER, [request(1)])
    now[0] = redo_supervisor.IDLE_S_MAX
    supervisor.close_idle()
    assert [worker.closed for worker in yard.workers] == [1, 0]
    assert len(supervisor.process_ids()) == 1


def test_never_more_processes_than_allowed_and_none_is_shared() -> None:
    """Threads of many tenants at once, workers that err and die among them; seeds as they come."""
    chance = random.Random(11)
    alive: set[int] = set()
    most = [0]
    lock = threading.Lock()

    class Counted(FakeWorker):
        def __init__(self) -> None:
            super().__init__()
            self.tenant: bytes | None = None
            with lock:
                alive.add(id(self))
                most[0] = max(most[0], len(alive))

        def exchange(self, requests: Sequence[bytes], timeout_s: float) -> Exchange:
            tenants = {decode_redo_request(each).relation.db.to_bytes(4) for each in requests}
            assert len(tenants) == 1
            assert self.tenant in (None, *tenants)
            (self.tenant,) = tenants
            return super().exchange(requests, timeout_s)

        def close(self) -> None:
            super().close()
            with lock:
                alive.discard(id(self))

    supervisor = RedoSupervisor(Counted, 5)

    def one(number: int, blocks: list[int]) -> None:
        requests = [encode_redo_request((1663, number, 1), 0, b, None, [(1, 2, b"x" * 30)]) for b in blocks]
        for block, outcome in zip(
            blocks, supervisor.run_batch(TenantId(f"{number:032x}"), requests), strict=True
        ):
            assert isinstance(outcome, RedoError) if block in (ERRS, DIES) else outcome == page(block)
        if number == 7:
            supervisor.close_idle()

    with ThreadPoolExecutor(5) as executor:
        turns = [
            executor.submit(one, chance.randrange(12), chance.choices((1, 2, 3, 4, 5, 6, ERRS, DIES), k=6))
            for _ in range(400)
        ]
        for turn in turns:
            turn.result()
    supervisor.close()
    assert most[0] == 5
    assert not alive
