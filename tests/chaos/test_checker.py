"""The checker of list-append histories: what it must find, and what it must let pass."""

import random
from pathlib import Path

import pytest

from tests.chaos.history import Append, HistoryFile, Operation, Outcome, Read, Transaction, read_history
from tests.chaos.list_append import Verdict, check
from tests.chaos.toy_database import Fault, ToyDatabase

SEEDS = 60


def transaction(
    number: int, begin: int, end: int, *operations: Operation, outcome: Outcome = Outcome.OK
) -> Transaction:
    return Transaction(
        id=number,
        client=number,
        operations=operations,
        invoked_ns=begin,
        completed_ns=end,
        outcome=outcome,
    )


def kinds(verdict: Verdict) -> list[str]:
    return [anomaly.kind for anomaly in verdict.anomalies]


def test_a_serial_history_passes() -> None:
    verdict = check(
        [
            transaction(1, 0, 1, Append(1, 10)),
            transaction(2, 2, 3, Read(1, (10,)), Append(1, 20), Read(1, (10, 20))),
            transaction(3, 4, 5, Read(1, (10, 20)), Read(2, ())),
        ]
    )
    assert verdict.anomalies == []
    assert (verdict.transactions, verdict.acknowledged) == (3, 3)


def test_write_skew_is_a_cycle_that_names_its_operations() -> None:
    verdict = check(
        [
            transaction(1, 0, 9, Read(1, ()), Append(2, 10)),
            transaction(2, 1, 8, Read(2, ()), Append(1, 20)),
            transaction(3, 10, 11, Read(1, (20,)), Read(2, (10,))),
        ]
    )
    assert kinds(verdict) == ["cycle"]
    assert "T1 --rw--> T2 --rw--> T1" in verdict.anomalies[0].text
    assert "append 20 to 1" in verdict.anomalies[0].text
    assert verdict.stock_cycles == []


def test_a_read_of_the_past_after_an_acknowledgement_is_a_cycle_through_time() -> None:
    verdict = check(
        [
            transaction(1, 0, 1, Append(1, 10)),
            transaction(2, 2, 3, Read(1, ())),
            transaction(3, 4, 5, Read(1, (10,))),
        ]
    )
    assert kinds(verdict) == ["cycle"]
    assert "--rt-->" in verdict.anomalies[0].text


def test_the_past_may_be_read_while_the_writer_is_not_acknowledged() -> None:
    verdict = check([transaction(1, 0, 3, Append(1, 10)), transaction(2, 1, 2, Read(1, ()))])
    assert verdict.anomalies == []


def test_an_acknowledged_append_that_is_gone_is_lost() -> None:
    verdict = check(
        [
            transaction(1, 0, 1, Append(1, 10)),
            transaction(2, 2, 3, Append(1, 20)),
            transaction(3, 4, 5, Read(1, (20,))),
        ]
    )
    assert kinds(verdict) == ["lost append"]


def test_an_append_of_unknown_outcome_may_be_there_or_not() -> None:
    unknown = transaction(1, 0, 1, Append(1, 10), outcome=Outcome.UNKNOWN)
    assert check([unknown, transaction(2, 2, 3, Read(1, (10,)))]).anomalies == []
    assert check([unknown, transaction(2, 2, 3, Read(1, ()))]).anomalies == []


def test_half_of_a_transaction_of_unknown_outcome_is_a_cycle() -> None:
    unknown = transaction(1, 0, 1, Append(1, 10), Append(2, 11), outcome=Outcome.UNKNOWN)
    verdict = check(
        [unknown, transaction(2, 2, 3, Read(1, (10,)), Read(2, ())), transaction(3, 4, 5, Read(2, (11,)))]
    )
    assert kinds(verdict) == ["cycle"]


def test_what_a_failed_transaction_wrote_must_not_be_seen() -> None:
    failed = transaction(1, 0, 1, Append(1, 10), outcome=Outcome.FAILED)
    assert kinds(check([failed, transaction(2, 2, 3, Read(1, (10,)))])) == ["aborted read"]


def test_half_a_list_of_one_transaction_must_not_be_seen() -> None:
    writer = transaction(1, 0, 9, Append(1, 10), Append(1, 11))
    assert "intermediate read" in kinds(
        check([writer, transaction(2, 2, 3, Read(1, (10,))), transaction(3, 10, 11, Read(1, (10, 11)))])
    )


def test_two_orders_of_a_list_are_incompatible() -> None:
    verdict = check(
        [
            transaction(1, 0, 9, Append(1, 10)),
            transaction(2, 0, 9, Append(1, 20)),
            transaction(3, 10, 11, Read(1, (10, 20))),
            transaction(4, 10, 11, Read(1, (20, 10))),
        ]
    )
    assert "incompatible order" in kinds(verdict)


def test_an_element_twice_or_of_nobody_or_ones_own_missing() -> None:
    assert "duplicate element" in kinds(check([transaction(1, 0, 1, Append(1, 10), Read(1, (10, 10)))]))
    assert "unknown element" in kinds(check([transaction(1, 0, 1, Read(1, (99,)))]))
    assert "own append missing" in kinds(check([transaction(1, 0, 1, Append(1, 10), Read(1, ()))]))


STOCK_SHAPE = (
    transaction(1, 0, 30, Read(1, ()), Append(2, 10)),  # W
    transaction(2, 1, 20, Append(1, 20)),  # T
    transaction(3, 10, 25, Read(1, (20,)), Read(2, ())),  # R
    transaction(4, 40, 41, Read(1, (20,)), Read(2, (10,))),
)


def test_the_cycle_that_stock_postgresql_lets_pass_is_reported_apart() -> None:
    verdict = check(STOCK_SHAPE)
    assert verdict.anomalies == []
    assert len(verdict.stock_cycles) == 1
    assert "T1 --rw--> T2 --wr--> T3 --rw--> T1" in verdict.stock_cycles[0].text


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(
            {2: transaction(3, 31, 35, Read(1, (20,)), Read(2, ()))}, id="R began after W was acknowledged"
        ),
        pytest.param(
            {2: transaction(3, 21, 25, Read(1, (20,)), Read(2, ()))}, id="R began after T was acknowledged"
        ),
        pytest.param(
            {0: transaction(1, 0, 30, Read(1, ()), Append(2, 10), outcome=Outcome.UNKNOWN)},
            id="W is not acknowledged",
        ),
    ],
)
def test_what_only_looks_like_it_is_ours(changed: dict[int, Transaction]) -> None:
    verdict = check([changed.get(place, each) for place, each in enumerate(STOCK_SHAPE)])
    assert kinds(verdict) == ["cycle"]
    assert verdict.stock_cycles == []


def test_a_cycle_beside_stocks_is_still_found() -> None:
    beside = [
        transaction(11, 50, 59, Read(11, ()), Append(12, 110)),
        transaction(12, 51, 58, Read(12, ()), Append(11, 120)),
        transaction(13, 60, 61, Read(11, (120,)), Read(12, (110,))),
    ]
    verdict = check([*STOCK_SHAPE, *beside])
    assert kinds(verdict) == ["cycle"]
    assert len(verdict.stock_cycles) == 1


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_right_database_passes(seed: int) -> None:
    verdict = check(ToyDatabase(random.Random(seed), Fault.NONE).run(400))
    assert verdict.anomalies == []
    assert verdict.acknowledged > 20


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Fault.SNAPSHOT_ISOLATION, {"cycle"}),
        (Fault.STALE_SNAPSHOT, {"cycle"}),
        (Fault.LOST_COMMIT, {"lost append"}),
        (Fault.DIRTY_READ, {"aborted read"}),
        (Fault.TORN_COMMIT, {"lost append"}),
    ],
)
def test_a_wrong_database_is_found_out(fault: Fault, found: set[str]) -> None:
    """In nearly all of its histories, and by the anomaly that it is."""
    verdicts = [check(ToyDatabase(random.Random(seed), fault).run(1000)) for seed in range(SEEDS)]
    caught = [verdict for verdict in verdicts if found <= set(kinds(verdict))]
    assert len(caught) >= SEEDS * 0.9, f"{len(caught)} of {SEEDS}"


def test_a_history_is_read_as_it_was_written_also_when_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with HistoryFile(path) as file:
        for each in STOCK_SHAPE:
            file.add(each)
    with path.open("ab") as cut:
        cut.write(b'{"id": 9, "cli')
    assert list(read_history(path)) == list(STOCK_SHAPE)


def test_a_long_history_is_judged_in_seconds() -> None:
    """Work grows with the history, not with its square: edges of time are one a transaction."""
    rows = []
    for number in range(20_000):
        key = number // 50
        before = tuple(range(key * 50, number))
        rows.append(transaction(number, number * 10, number * 10 + 5, Read(key, before), Append(key, number)))
    assert check(rows).anomalies == []
