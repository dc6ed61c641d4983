"""One run: clients at work, one fault after another, then rest, and the verdict of the checkers."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg

from tests.chaos.clients import (
    BankClient,
    Client,
    Connection,
    Counters,
    ListClient,
    check_bank,
    create_tables,
    read_all_lists,
)
from tests.chaos.faults import HOLD_S, Fault
from tests.chaos.history import HistoryFile, read_history
from tests.chaos.list_append import check

REST_S = (0.5, 3.0)
TWO_FAULTS_SHARE = 0.3
RETURN_LIMIT_S = 90.0
"""Commits must go on within this after everything was undone: else the run has failed."""

CLIENT_END_S = 90.0
LIST_CLIENTS = 6
BANK_CLIENTS = 3


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def start(self) -> None: ...

    def connect(self) -> Connection: ...

    def recover(self) -> None: ...

    def recover_endpoint(self) -> None: ...

    def faults(self) -> list[Fault]: ...

    def is_fit(self) -> str | None: ...

    def logs(self) -> str: ...


@dataclass(slots=True)
class Result:
    target: str
    seed: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    transactions: int = 0
    acknowledged: int = 0
    unknown: int = 0
    commits: int = 0
    """Of all clients, the bank's too."""
    longest_return_s: float = 0.0
    """From the undoing of a fault to the next commit."""
    stock_cycles: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_chaos(
    target: Target,
    directory: Path,
    *,
    seed: int,
    seconds: float,
    note: Callable[[str], None] = lambda _: None,
) -> Result:
    """Leaves `history.jsonl` and `result.json` in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    result = Result(target.name, seed)
    target.start()
    with target.connect() as connection:
        connection.autocommit = True
        create_tables(connection)
    counters = Counters()
    with HistoryFile(directory / "history.jsonl") as history:
        lists = [
            ListClient(number, target.connect, counters, random.Random(f"{seed} lists {number}"), history)
            for number in range(LIST_CLIENTS)
        ]
        banks = [
            BankClient(number, target.connect, counters, random.Random(f"{seed} bank {number}"))
            for number in range(BANK_CLIENTS)
        ]
        clients: list[Client] = [*lists, *banks]
        for client in clients:
            client.start()
        begun = time.monotonic()
        try:
            _break_things(target, counters, result, random.Random(seed), begun + seconds, note)
        finally:
            result.seconds = round(time.monotonic() - begun, 1)
            result.commits = counters.acknowledged
            _end_clients(clients, result)
        _read_all(target, counters, history, banks, result)
    _judge(directory / "history.jsonl", result)
    if problem := target.is_fit():
        result.problems.append(problem)
    if result.problems:
        (directory / "logs.txt").write_text(target.logs())
    (directory / "result.json").write_text(json.dumps(asdict(result), indent=1))
    return result


def _break_things(
    target: Target,
    counters: Counters,
    result: Result,
    chance: random.Random,
    end: float,
    note: Callable[[str], None],
) -> None:
    faults = target.faults()
    counts = Counter[str]()
    while time.monotonic() < end and not result.problems:
        chosen = chance.sample(faults, 2 if chance.random() < TWO_FAULTS_SHARE else 1)
        note(f"{result.target}: {' and '.join(fault.name for fault in chosen)}")
        try:
            for fault in chosen:
                counts[fault.name] += 1
                fault.begin(chance)
            time.sleep(chance.uniform(*HOLD_S))
        finally:
            for fault in chosen:
                fault.end()
        undone = time.monotonic()
        _wait_commits(target, counters, result)
        result.longest_return_s = max(result.longest_return_s, round(time.monotonic() - undone, 2))
        time.sleep(chance.uniform(*REST_S))
    result.faults = dict(sorted(counts.items()))


def _wait_commits(target: Target, counters: Counters, result: Result) -> None:
    """Until one commits again, by starting what is dead as an operator's supervisor would."""
    target.recover()
    target.recover_endpoint()
    before = counters.acknowledged
    deadline = time.monotonic() + RETURN_LIMIT_S
    while counters.acknowledged == before:
        if time.monotonic() > deadline:
            result.problems.append(f"no commit within {RETURN_LIMIT_S:.0f} s after all faults were undone")
            return
        time.sleep(0.02)


def _end_clients(clients: Sequence[Client], result: Result) -> None:
    for client in clients:
        client.stop()
    deadline = time.monotonic() + CLIENT_END_S
    for client in clients:
        client.join(max(0.0, deadline - time.monotonic()))
        if client.is_alive():
            result.problems.append(f"client {client.name} still waits for an answer")
        if client.crash is not None:
            result.problems.append(f"client {client.name} itself failed: {client.crash!r}")


def _read_all(
    target: Target, counters: Counters, history: HistoryFile, banks: Sequence[BankClient], result: Result
) -> None:
    try:
        with target.connect() as connection:
            connection.autocommit = True
            read_all_lists(connection, counters, history)
            result.problems += check_bank(connection, banks)
    except psycopg.Error as error:
        result.problems.append(f"the database cannot be read at the end: {error}")


def _judge(history: Path, result: Result) -> None:
    verdict = check(read_history(history))
    result.transactions = verdict.transactions
    result.acknowledged = verdict.acknowledged
    result.unknown = verdict.unknown
    result.stock_cycles = [cycle.text for cycle in verdict.stock_cycles]
    result.problems += [f"{anomaly.kind}: {anomaly.text}" for anomaly in verdict.anomalies]


def summary(result: Result) -> dict[str, Any]:
    """What a table of runs says of it."""
    return {
        "target": result.target,
        "seed": result.seed,
        "minutes": round(result.seconds / 60, 1),
        "faults": sum(result.faults.values()),
        "kinds": len(result.faults),
        "commits": result.commits,
        "unknown": result.unknown,
        "longest return, s": result.longest_return_s,
        "stock's cycles": len(result.stock_cycles),
        "problems": len(result.problems),
    }
