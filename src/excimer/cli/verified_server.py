"""The PostgreSQL of an endpoint that is verified: checkpoints, and what its catalogs know of a file."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Final

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.keys import GLOBAL_TABLESPACE, Relation
from excimer.base.lsn import Lsn, parse_lsn
from excimer.cli.local_server import DATABASES, LocalServer, connected
from excimer.compute.local_access import LocalAccess
from excimer.verify.model import KnownRelation

CHECKPOINT_TIMEOUT_S: Final = 600.0
"""Much may have to be written, on a disk that is busy."""

REPLAY_TIMEOUT_S: Final = 300.0
REPLAY_POLL_S: Final = 0.05

_DATABASES_SQL: Final = """
select oid, datname, datallowconn, datconnlimit = -2 from pg_database
"""
"""-2 marks one whose removal was interrupted: nothing in it counts."""


class NotFollowingError(RetryableError):
    """A replica does not come to where its primary is."""


class LocalVerifiedServer:
    """Through the endpoint's Unix socket, as its bootstrap superuser; a connection for each question, so that
    an endpoint that has started anew meanwhile is not taken for the one that was read.
    """

    def __init__(
        self,
        access: LocalAccess,
        static_lsn: Lsn | None = None,
        *,
        is_replica: bool = False,
        primary: LocalAccess | None = None,
    ) -> None:
        """`primary`: whom a replica follows, if that runs."""
        self._access = access
        self._static_lsn = static_lsn
        self._is_replica = is_replica
        self._primary = primary
        with self._connected() as server:
            ((self._started, checksums),) = server.rows(
                "select pg_postmaster_start_time()::text, current_setting('data_checksums')"
            )
        self.hints_are_logged = checksums == "on"

    def settle(self) -> Lsn:
        """The redo LSN of a checkpoint that has just ended; of a static endpoint the only LSN it has.

        A standby makes one only where its primary has made one, so that does it first. Raises
        `NotFollowingError`.
        """
        if self._static_lsn is not None:
            self._check_same()
            return self._static_lsn
        made_lsn = "0/0" if self._primary is None else _make_checkpoint(self._primary)
        with self._connected() as server:
            self._check(server)
            if self._is_replica:
                _wait_replayed(server, made_lsn)
            server.rows("checkpoint")
            ((lsn,),) = server.rows("select redo_lsn from pg_control_checkpoint()")
        assert lsn is not None
        return parse_lsn(lsn)

    def look_up(self, relations: Set[Relation]) -> Mapping[Relation, KnownRelation]:
        by_database: dict[int, list[Relation]] = defaultdict(list)
        for relation in relations:
            by_database[relation.db].append(relation)
        known: dict[Relation, KnownRelation] = {}
        with self._connected() as server:
            self._check(server)
            databases = {int(row[0] or 0): row[1:] for row in server.rows(_DATABASES_SQL)}
            known |= _names(server, by_database.pop(0, []), GLOBAL_TABLESPACE)
        for oid, members in by_database.items():
            name, is_open, is_invalid = databases.get(oid, (None, "f", "t"))
            if is_invalid == "t" or name is None:
                known |= dict.fromkeys(members, KnownRelation(False, None))
            else:
                known |= self._names_in(name if is_open == "t" else None, members)
        return known

    def _names_in(
        self, database: str | None, relations: Iterable[Relation]
    ) -> Mapping[Relation, KnownRelation]:
        if database is not None:
            with contextlib.suppress(RefusedError), self._connected(database) as server:
                return _names(server, relations, 0)
        return dict.fromkeys(relations, KnownRelation(True, None))

    def _check_same(self) -> None:
        with self._connected() as server:
            self._check(server)

    def _check(self, server: LocalServer) -> None:
        ((started,),) = server.rows("select pg_postmaster_start_time()::text")
        if started != self._started:
            raise RefusedError("the endpoint was started anew while it was verified: verify it again")

    def _connected(self, database: str | None = None) -> contextlib.AbstractContextManager[LocalServer]:
        databases = DATABASES if database is None else (database,)
        return connected(self._access, databases, timeout_s=CHECKPOINT_TIMEOUT_S)


def _make_checkpoint(access: LocalAccess) -> str:
    """Where it ends."""
    with connected(access, DATABASES, timeout_s=CHECKPOINT_TIMEOUT_S) as server:
        server.rows("checkpoint")
        ((lsn,),) = server.rows("select pg_current_wal_flush_lsn()::text")
    assert lsn is not None
    return lsn


def _wait_replayed(server: LocalServer, lsn: str) -> None:
    """Raises `NotFollowingError`."""
    deadline = time.monotonic() + REPLAY_TIMEOUT_S
    while server.rows(f"select pg_last_wal_replay_lsn() >= '{lsn}'")[0][0] != "t":
        if time.monotonic() > deadline:
            raise NotFollowingError(
                f"the replica has not replayed its primary's checkpoint up to {lsn} within "
                f"{REPLAY_TIMEOUT_S:.0f} s: see how it is with excimer endpoint show"
            )
        time.sleep(REPLAY_POLL_S)


def _names(
    server: LocalServer, relations: Iterable[Relation], tablespace: int
) -> Mapping[Relation, KnownRelation]:
    """Of relations of the database that is connected to, or of the shared ones."""
    numbers = {relation.rel: relation for relation in relations}
    if not numbers:
        return {}
    listed = ",".join(str(number) for number in numbers)
    rows = server.rows(
        f"select n, pg_filenode_relation({tablespace}, n)::text, current_database() "
        f"from unnest('{{{listed}}}'::oid[]) n"
    )
    known = {}
    for number, name, database in rows:
        relation = numbers[int(number or 0)]
        if relation.rel == 0:
            known[relation] = KnownRelation(True, None)
        else:
            shown = name if relation.db == 0 or name is None else f"{database}: {name}"
            known[relation] = KnownRelation(name is not None, shown)
    return known
