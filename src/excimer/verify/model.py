"""What a verification says, and what it asks of the endpoint's own PostgreSQL."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from excimer.base.keys import KeyKind, Relation, parse_key
from excimer.base.lsn import Lsn
from excimer.pgformat.cluster_files import identify_file
from excimer.verify.judgement import Disagreement


class KnownRelation(NamedTuple):
    """A file number, as PostgreSQL's catalogs have it now."""

    is_committed: bool
    """False while the transaction that makes it runs, and after one that was rolled back: its pages may not
    be in WAL.
    """
    name: str | None
    """None also where nobody can connect to the database."""


class VerifiedServer(Protocol):
    """The running PostgreSQL. May raise whatever says that it does not run any more."""

    def settle(self) -> Lsn:
        """An LSN such that every page is on the disk as it was then, or newer."""

    def look_up(self, relations: Set[Relation], /) -> Mapping[Relation, KnownRelation]:
        """Of a relation number 0: its database."""


@dataclass(slots=True)
class Finding:
    """Something that is not the same here and at the pageserver, as far as it was looked at."""

    path: str
    """Of the file, in the data directory."""
    lsn: Lsn
    """Which the pageserver was asked for."""
    disagreement: Disagreement
    key: bytes | None = None
    """Of the block; None if it is about the whole file."""
    here_lsn: Lsn | None = None
    served_lsn: Lsn | None = None
    copies: tuple[bytes, bytes] | None = None
    """Here and served, of pages without LSN."""
    name: str | None = None

    @property
    def relation(self) -> Relation | None:
        """None for SLRUs and transactions."""
        file = identify_file(self.path)
        return None if file is None or file.relation == Relation(0, 0, 0) else file.relation

    @property
    def block(self) -> int | None:
        """Within the relation's fork, or within the SLRU's segment."""
        return None if self.key is None else parse_key(self.key).block

    @property
    def fork(self) -> int | None:
        """None for SLRUs and small files."""
        if self.key is None or (fields := parse_key(self.key)).kind != KeyKind.RELATION_BLOCK:
            return None
        return fields.fork


@dataclass(slots=True)
class Counts:
    """Of the first pass; what is looked at again is not counted again."""

    files: int = 0
    """Of relations and SLRUs."""
    pages: int = 0
    """Compared."""
    absent_pages: int = 0
    """Not fetched yet: they are the pageserver's."""
    unwritten_pages: int = 0
    """Zeros at a file's end, which WAL does not know yet."""
    free_space_pages: int = 0
    unlogged_files: int = 0
    small_files: int = 0


@dataclass(slots=True)
class Verified:
    lsn: Lsn
    """Of the last look."""
    pg_version: int
    relations: int
    counts: Counts
    differences: list[Finding] = field(default_factory=list)
    in_creation: int = 0
    """Relations that differ because the transaction that makes them has not committed."""
    looks: int = 1
    """How often it had to look at something, until what differed only in passing was told apart."""
    is_cut_short: bool = False
    """There are more differences than were looked at."""
