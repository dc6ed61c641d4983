"""Histories of list-append transactions: what each client asked for, what it was told, and when.

A transaction appends unique numbers to lists and reads whole lists. A history is kept as one JSON line a
transaction, written as it ends, so that a run that is killed leaves all it saw:

    {"id":17,"client":3,"outcome":"ok","invoked_ns":1,"completed_ns":9,"operations":[["append",5,88],["read",5,[12,88]]]}

Not here: who runs transactions (`clients`), what a history may look like (`list_append`).
"""

import threading
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec


class Outcome(StrEnum):
    OK = "ok"
    """The database said that it committed."""
    FAILED = "failed"
    """It cannot have committed: the database refused it, or was never asked to commit."""
    UNKNOWN = "unknown"
    """The connection broke between the request to commit and its answer."""


class Append(msgspec.Struct, frozen=True, array_like=True, tag="append"):
    key: int
    value: int
    """Never used twice, in any list of the history."""


class Read(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    key: int
    values: tuple[int, ...]


Operation = Append | Read


class Transaction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: int
    client: int
    operations: tuple[Operation, ...]
    """Those that were answered, in order."""
    invoked_ns: int
    """Of a clock that never goes back, before anything was sent."""
    completed_ns: int
    """After the answer came, or the connection was seen to be lost."""
    outcome: Outcome
    error: str | None = None

    def overlaps(self, other: "Transaction") -> bool:
        return self.invoked_ns < other.completed_ns and other.invoked_ns < self.completed_ns


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Transaction)


class HistoryFile:
    """Appends transactions to a file from any thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def add(self, transaction: Transaction) -> None:
        line = _encoder.encode(transaction) + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "HistoryFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_history(path: Path) -> Iterator[Transaction]:
    """All whole lines; a last one that was cut off is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)


def describe(transaction: Transaction, origin_ns: int) -> str:
    """One line a person can follow: times in milliseconds since `origin_ns`."""
    begin_ms = (transaction.invoked_ns - origin_ns) / 1e6
    end_ms = (transaction.completed_ns - origin_ns) / 1e6
    operations = ", ".join(_describe_operation(operation) for operation in transaction.operations)
    return (
        f"T{transaction.id} client {transaction.client} {begin_ms:.3f}-{end_ms:.3f} ms "
        f"{transaction.outcome.value}: {operations}"
    )


def _describe_operation(operation: Operation) -> str:
    match operation:
        case Append(key, value):
            return f"append {value} to {key}"
        case Read(key, values):
            return f"read {key}: {list(values)}"


def origin_ns(transactions: Iterable[Transaction]) -> int:
    """When the first of them began."""
    return min((transaction.invoked_ns for transaction in transactions), default=0)
