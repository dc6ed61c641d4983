"""Page truth (S1) of a whole installation: its page service against stock servers recovered from its WAL.

The history is what a safekeeper has on disk, laid over the initdb directory that the timeline began as.
The page service is asked as a compute asks it; nothing here looks into the pageserver.
"""

import asyncio
import contextlib
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import msgspec

from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    DEFAULT_TABLESPACE,
    GLOBAL_TABLESPACE,
    Fork,
    KeyKind,
    Relation,
    describe_key,
    make_key,
    origin_key,
    parse_key,
    relation_block_key,
    relation_path,
    relation_size_key,
    slru_size_key,
    two_phase_key,
)
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.cli.installation import HOST, Installation, load_installation
from excimer.controller.sqlite_store import SqliteStore
from excimer.io.processes import make_owned_dir, program_environment
from excimer.pageserver.bootstrap import initdb_template
from excimer.pgformat.basebackup import Basebackup, unpack_relation_forks, unpack_slru_segments
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.relation_map import parse_relation_map
from excimer.pgformat.replication_origins import ORIGINS_PATH, parse_origins
from excimer.pgformat.role_catalog import AUTHID_OID, replace_verifier
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_record import WalRecord, decode_record
from excimer.pgformat.wal_segment import segment_name
from excimer.postgres import PostgresBuild
from excimer.wire.auth import Claims, Right, encode_token
from tests.kit.builds import build_of
from tests.kit.kept_wal import KeptWal
from tests.kit.page_client import PageClient, connect_pages
from tests.kit.page_truth import SETTINGS, Comparer, Comparison, History, chunks, recover
from tests.kit.stack import Stack
from tests.kit.stock_server import StockServer, copy_data_dir

HTTP_TIMEOUT_S = 60.0
ARRIVAL_TIMEOUT_S = 60.0
EXPLAINED_MAX = 5
"""Differing pages whose whole chain of records is printed."""

_SYSTEM_ID = struct.Struct("<Q")
_MANAGER_OFFSET = 17
_SYSTEM_ID_OFFSET = 24
"""In the long header that begins a segment."""
_SEGMENT_NAME_LENGTH = 24


class Branch(NamedTuple):
    """One timeline of a running installation, and how its services are asked about it."""

    installation: Installation
    tenant_id: TenantId
    timeline_id: TimelineId
    http_address: Address
    """Of the pageserver that serves it."""
    page_address: Address

    def token(self, *rights: Right) -> str:
        """On this branch."""
        claims = Claims(
            holder="test", rights=frozenset(rights), tenant_id=self.tenant_id, timeline_id=self.timeline_id
        )
        return self.signed(claims)

    def signed(self, claims: Claims) -> str:
        """By the installation's key."""
        return encode_token((self.installation.keys_dir / "private.pem").read_bytes(), claims)

    @property
    def path(self) -> str:
        return f"/tenant/{self.tenant_id}/timeline/{self.timeline_id}"

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, token: str | None = None
    ) -> httpx.Response:
        """Whatever the pageserver answers, by default to the installation's user."""
        headers = {"Authorization": f"Bearer {token or self.installation.admin_token()}"}
        url = f"http://{self.http_address}/v1{path}"
        return httpx.request(method, url, headers=headers, json=body, timeout=HTTP_TIMEOUT_S)

    def _must(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return _answer(self.ask(method, path, body))

    def at_pageserver(self) -> dict[str, Any]:
        return self._must("GET", self.path)

    def flush(self) -> None:
        """What the pageserver has in memory becomes a layer."""
        self._must("POST", f"{self.path}/flush")

    def configure(self, **changes: float) -> None:
        """Changes settings of the whole tenant."""
        self._must("PATCH", f"/tenant/{self.tenant_id}/config", changes)

    def compact(self) -> int:
        """All that is due; the number of steps."""
        return int(self._must("PUT", f"{self.path}/compact")["steps"])

    def collect(self) -> dict[str, Any]:
        """Garbage."""
        return self._must("PUT", f"{self.path}/do_gc")

    def lease(self, lsn: Lsn) -> None:
        _answer(self.try_lease(lsn))

    def try_lease(self, lsn: Lsn) -> httpx.Response:
        """Whatever the pageserver answers to who may read the branch's pages."""
        body = {"lsn": format_lsn(lsn)}
        return self.ask("POST", f"{self.path}/lsn_lease", body, self.token(Right.READ_PAGES))

    def layers(self) -> list[dict[str, Any]]:
        return list(self._must("GET", f"{self.path}/layer_map")["layers"])

    def metric(self, name: str) -> float:
        """Of the pageserver, one without labels."""
        text = httpx.get(f"http://{self.http_address}/metrics", timeout=HTTP_TIMEOUT_S).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def at_safekeeper(self, number: int) -> dict[str, Any]:
        port = self.installation.config.safekeepers[number - 1].http
        headers = {"Authorization": f"Bearer {self.token(Right.MANAGE)}"}
        url = f"http://{HOST}:{port}/v1{self.path}"
        return _answer(httpx.get(url, headers=headers, timeout=HTTP_TIMEOUT_S))

    def wal_dir(self, number: int) -> Path:
        return self.installation.directory / "safekeepers" / str(number) / self.tenant_id / self.timeline_id


def _answer(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def branch_of(stack: Stack, name: str = "main") -> Branch:
    rows = stack.json("timeline", "list")["branches"]
    row = next(each for each in rows if each["name"] == name)
    installation = load_installation(stack.directory)
    config = installation.config
    http_address = Address(HOST, config.pageserver_http_port)
    page_address = Address(HOST, config.page_service_port)
    return Branch(installation, row["tenant_id"], row["timeline_id"], http_address, page_address)


def arrive(branch: Branch, lsn: Lsn) -> None:
    """Waits until the pageserver has all WAL up to there."""
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while parse_lsn((known := branch.at_pageserver())["last_record_lsn"]) < lsn:
        assert time.monotonic() < deadline, f"{format_lsn(lsn)} did not arrive: {known}"
        time.sleep(0.05)


class EndpointServer(StockServer):
    """An endpoint, for workloads written for a stock server."""

    def __init__(self, stack: Stack, root: Path, endpoint: str = "main") -> None:
        super().__init__(build_of(stack.pg_version), root, root, stack.endpoint(endpoint)["postgres_port"])
        self._connection = stack.connection_environment(endpoint)

    def sql(self, script: str, database: str = "postgres") -> list[list[str]]:
        options = ["-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1"]
        result = subprocess.run(
            [self.build.program("psql"), *options, database],
            env=program_environment(self.build.environment() | self._connection),
            input=script,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return [line.split("\t") for line in result.stdout.splitlines()]


@dataclass(frozen=True)
class StackHistory(History):
    records: list[WalRecord]

    def managers(self) -> set[int]:
        """Resource managers of all records."""
        return {record.data[_MANAGER_OFFSET] for record in self.records}


def stack_history(branch: Branch, build: PostgresBuild, root: Path, kept: KeptWal) -> StackHistory:
    """Of a timeline that began as an empty cluster, up to its commit LSN; `kept` is of safekeeper 1."""
    known = branch.at_safekeeper(1)
    size, start_lsn = known["wal_segment_size"], parse_lsn(known["start_lsn"])
    beginning = root / "beginning"
    copy_data_dir(initdb_template(build), beginning)
    _set_system_id(beginning, build.version, known["system_id"])
    _set_verifier(beginning, branch)
    name = segment_name(1, start_lsn // size, size)
    first = bytearray((beginning / "pg_wal" / name).read_bytes())
    _SYSTEM_ID.pack_into(first, _SYSTEM_ID_OFFSET, known["system_id"])
    before = {name: bytes(first)}
    return _continued(branch, build, beginning, before, start_lsn, root / "wal", kept.read)


def imported_history(
    branch: Branch, build: PostgresBuild, beginning: Path, start_lsn: Lsn, source_wal_dir: Path, wal_dir: Path
) -> StackHistory:
    """Of an imported cluster: a copy of it, its source's WAL from `start_lsn` on, and then its own."""
    names = [path for path in source_wal_dir.iterdir() if len(path.name) == _SEGMENT_NAME_LENGTH]
    before = {path.name: path.read_bytes() for path in names}

    def read(name: str) -> bytes:
        return (branch.wal_dir(1) / name).read_bytes()

    return _continued(branch, build, beginning, before, start_lsn, wal_dir, read)


def _continued(
    branch: Branch,
    build: PostgresBuild,
    beginning: Path,
    before: Mapping[str, bytes],
    history_lsn: Lsn,
    wal_dir: Path,
    read: Callable[[str], bytes],
) -> StackHistory:
    """`before` are the segments up to where the timeline's own WAL starts, by name; `read` gives its own."""
    known = branch.at_safekeeper(1)
    size = known["wal_segment_size"]
    own_lsn, commit_lsn = parse_lsn(known["start_lsn"]), parse_lsn(known["commit_lsn"])
    origin = history_lsn // size * size
    data = bytearray()
    make_owned_dir(wal_dir)
    for number in range(origin // size, -(-commit_lsn // size)):
        name = segment_name(1, number, size)
        kept = max(0, min(size, own_lsn - number * size))
        segment = before[name][:kept] if kept else b""
        if kept < size:
            segment += read(name)[kept:]
        segment = segment[: commit_lsn - number * size].ljust(size, b"\0")
        (wal_dir / name).write_bytes(segment)
        data += segment
    settings = SETTINGS | {"min_wal_size": f"{max(2 * size >> 20, 2)}MB"}
    wal = bytes(data[history_lsn - origin : commit_lsn - origin])
    reader = WalReader(history_lsn, build.version, size)
    records = [record for chunk, _ in chunks(wal, history_lsn) for record in reader.feed(chunk)]
    # The last one is left out: a server can be recovered only to before a record.
    ends = [record.end_lsn for record in records[:-1]]
    return StackHistory(build, beginning, wal_dir, settings, history_lsn, wal, ends, records)


def _set_system_id(directory: Path, pg_version: int, system_id: int) -> None:
    path = directory / "global/pg_control"
    control = ControlFile.unpack(path.read_bytes(), pg_version)
    path.write_bytes(msgspec.structs.replace(control, system_id=system_id).pack())


def _set_verifier(directory: Path, branch: Branch) -> None:
    """The superuser's password becomes the one that the branch began with."""
    with contextlib.closing(SqliteStore(branch.installation.directory / "controller")) as store:
        known = store.list_role_passwords(branch.tenant_id)
    verifier = next(row.verifier for row in known if row.timeline_id == branch.timeline_id and row.lsn == 0)
    file_numbers = parse_relation_map((directory / "global/pg_filenode.map").read_bytes())
    path = directory / f"global/{file_numbers[AUTHID_OID]}"
    (page,) = replace_verifier([path.read_bytes()], verifier)
    path.write_bytes(page)


class StackView:
    """The page service at one LSN, as `Comparer` wants to see a timeline."""

    def __init__(self, client: PageClient, backup: Basebackup) -> None:
        self.pg_version = backup.pg_version
        self._client = client
        self._values = dict(_metadata(backup))

    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None:
        return self._values.get(key)

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> Sequence[tuple[bytes, bytes]]:
        return [(key, value) for key, value in sorted(self._values.items()) if start <= key < end]

    async def get_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        return await self._client.get_pages(parse_key(key), count, lsn)


def _metadata(backup: Basebackup) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values that a basebackup was made from."""
    for fork in unpack_relation_forks(backup.relation_forks):
        yield relation_size_key(Relation(*fork[:3]), fork.fork), fork.blocks.to_bytes(4, "little")
    for slru, segment, blocks in unpack_slru_segments(backup.slru_segments):
        yield slru_size_key(slru, segment), blocks.to_bytes(4, "little")
    for path, content in backup.files:
        directory, name = path.rsplit("/", 1)
        if directory == "pg_twophase":
            yield two_phase_key(int(name, 16)), content
        elif path == ORIGINS_PATH:
            for origin, remote_lsn in parse_origins(content):
                yield origin_key(origin), remote_lsn.to_bytes(8, "little")
        else:
            kind = KeyKind.DATABASE if name == "PG_VERSION" else KeyKind.RELATION_MAP
            is_global = directory == "global"
            db = 0 if is_global else int(directory.removeprefix("base/"))
            yield make_key(kind, GLOBAL_TABLESPACE if is_global else DEFAULT_TABLESPACE, db), content
    settings = ClusterSettings.from_control_file(ControlFile.unpack(backup.control_file, backup.pg_version))
    state = CheckpointState(CheckPoint.unpack(backup.checkpoint), settings)
    yield make_key(KeyKind.CHECKPOINT), state.pack()


class StackComparer(Comparer):
    """Draws most pages among those that the history has changed, and says how a wrong one comes about."""

    def __init__(
        self, view: StackView, lsn: Lsn, data_dir: Path, chance: Random, history: StackHistory
    ) -> None:
        super().__init__(view, lsn, data_dir, chance)
        self.history = history
        self.explained = 0

    async def compare_pages(self, sizes: dict[bytes, int], count: int) -> None:
        changed = self._changed_pages(sizes)
        relations = sorted(changed)
        of_changed = count - count // 4 if relations else 0
        await super().compare_pages(sizes, count - of_changed)
        for _ in range(of_changed):
            relation, fork = self.chance.choice(relations)
            block, theirs = self.chance.choice(changed[relation, fork])
            await self.compare_page(relation_block_key(relation, fork, block), theirs)

    def _changed_pages(self, sizes: dict[bytes, int]) -> dict[tuple[Relation, int], list[tuple[int, bytes]]]:
        """Pages with an LSN of the history, by relation."""
        found: dict[tuple[Relation, int], list[tuple[int, bytes]]] = {}
        for key in sizes:
            _, *numbers, fork, _ = parse_key(key)
            relation = Relation(*numbers)
            path = self.data_dir / relation_path(relation, fork)
            data = path.read_bytes() if fork != Fork.FSM and path.exists() else b""
            pages = []
            for start in range(0, len(data), BLOCK_SIZE_BYTES):
                page = data[start : start + BLOCK_SIZE_BYTES]
                if _page_lsn(page) > self.history.start_lsn:
                    pages.append((start // BLOCK_SIZE_BYTES, page))
            if pages:
                found[relation, fork] = pages
        return found

    def describe_difference(self, key: bytes, ours: bytes, theirs: bytes) -> str:
        places = [at for at in range(BLOCK_SIZE_BYTES) if ours[at] != theirs[at]]
        told = (
            f"{describe_key(key)}: {len(places)} bytes differ from {places[0]} to {places[-1]}; page LSN "
            f"{format_lsn(_page_lsn(ours))}, stock {format_lsn(_page_lsn(theirs))}"
        )
        self.explained += 1
        if self.explained <= EXPLAINED_MAX:
            told += "".join(f"\n    {line}" for line in records_of(self.history, key, self.lsn))
        return told


def _page_lsn(page: bytes) -> int:
    high, low = struct.unpack_from("<II", page)
    return int(high) << 32 | int(low)


def records_of(history: StackHistory, key: bytes, lsn: Lsn) -> list[str]:
    """The records from which a page at `lsn` is reconstructed: all that name it, one line each."""
    _, *numbers, fork, block = parse_key(key)
    relation = Relation(*numbers)
    named_by = struct.pack("<III", *relation)
    lines: list[str] = []
    for record in history.records:
        if record.end_lsn > lsn or named_by not in record.data:
            continue
        decoded = decode_record(record.data, history.build.version)
        for named in decoded.blocks:
            if (named.relation, named.fork, named.block) == (relation, fork, block):
                kind = "initialises" if named.will_init else "image" if named.image else "changes"
                header = decoded.header
                where = f"{format_lsn(record.start_lsn)}..{format_lsn(record.end_lsn)}"
                lines.append(f"{where} manager {header.rmgr} info {header.info:#04x} {kind}")
    return lines


async def compare_stack(
    branch: Branch, history: StackHistory, root: Path, lsns: Sequence[Lsn], pages: int, seed: int
) -> Comparison:
    """Compares a branch with the stock server at each LSN; one sum of all."""
    total = Comparison(Lsn(0))
    for lsn in lsns:
        data_dir = await asyncio.to_thread(recover, history, lsn, root / f"recovered-{lsn:x}")
        part = await compare_with(branch, history, data_dir, lsn, pages, seed)
        total.compared += part.compared
        total.wrong += part.wrong
        await asyncio.to_thread(shutil.rmtree, data_dir)
    return total


async def compare_with(
    branch: Branch, history: StackHistory, data_dir: Path, lsn: Lsn, pages: int, seed: int
) -> Comparison:
    async with connect_pages(branch.page_address) as client:
        await client.hello(branch.tenant_id, branch.timeline_id, branch.token(Right.READ_PAGES))
        backup = await client.get_basebackup(lsn)
        assert backup.lsn == lsn, "the LSN is the end of a record"
        view = StackView(client, backup)
        return await StackComparer(view, lsn, data_dir, Random(seed ^ lsn), history).compare(pages)


class Moments:
    """Data directories of stock servers, recovered to moments of a history when they are first asked for."""

    def __init__(self, history: StackHistory, root: Path) -> None:
        self.history = history
        self._root = root
        self._made: dict[Lsn, Path] = {}

    def directory(self, lsn: Lsn) -> Path:
        if lsn not in self._made:
            self._made[lsn] = recover(self.history, lsn, self._root / f"moment-{lsn:x}")
        return self._made[lsn]

    async def compare(self, branch: Branch, lsns: Sequence[Lsn], pages: int, seed: int) -> Comparison:
        """One sum of all, as `compare_stack`."""
        total = Comparison(Lsn(0))
        for lsn in lsns:
            data_dir = await asyncio.to_thread(self.directory, lsn)
            part = await compare_with(branch, self.history, data_dir, lsn, pages, seed)
            total.compared += part.compared
            total.wrong += part.wrong
        return total
