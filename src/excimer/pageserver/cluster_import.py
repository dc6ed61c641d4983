"""Brings an existing cluster in: takes the import stream, makes a timeline of it.

::

    CLI: data directory, or BASE_BACKUP and WAL of a server --HTTP body--> ClusterImport --> TimelineImport

**Why the command line reads the cluster and the pageserver only takes a stream.** The other way, a pageserver
that opens a directory or a URL that a request names, would let whoever may import read the pageserver's
disk and reach whatever its network reaches; it would carry a foreign server's password through our
services and their logs; and the directory is on the user's machine, not on the pageserver's. So the
password stays in the user's process, and the stream is what BASE_BACKUP sends anyway. It costs one more
copy of the bytes through a socket. A broken connection is a broken-off import: there is no state to resume.

Memory is bounded: a chunk is worked off before the next is read, images and WAL go to layers as they come.

Not here: authentication and HTTP (`endpoints.import_api`), what files mean (`cluster_images`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar, assert_never

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TimelineId
from excimer.base.keys import KeyKind, kind_range, parse_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.pageserver.basebackup_plan import BUILT_IN_TABLESPACES
from excimer.pageserver.cluster_images import ClusterImages, check_built_alike
from excimer.pageserver.ingest import WalIngest
from excimer.pageserver.special_records import UnsupportedRecordError
from excimer.pgformat.cluster_files import (
    ClusterFile,
    ClusterFileError,
    file_size_bytes_max,
    identify_file,
)
from excimer.pgformat.control_file import ControlFile, ControlFileError
from excimer.pgformat.tar_stream import MemberData, MemberEnd, MemberStart, TarError, TarParser
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.storage.engine.tenant import NewTimeline, TenantStorage
from excimer.storage.engine.timeline_import import TimelineImport
from excimer.wire.import_stream import (
    FilesEnd,
    ImportBegin,
    ImportEnd,
    ImportFrame,
    ImportStreamError,
    ImportStreamParser,
    TarBytes,
    WalBytes,
)

T = TypeVar("T")


class ImportIncompleteError(RefusedError):
    """What came is not enough for a consistent cluster."""


class TablespacesError(RefusedError):
    """The cluster uses tablespaces, which Excimer's computes do not have."""


class DatabaseCopiedError(RetryableError):
    """A database was copied file by file while the backup was taken: nobody knows what the copy contains."""


class ClusterImport:
    """One import. `run` takes it to where `made` can be finished; whoever calls it aborts it otherwise."""

    def __init__(
        self,
        store: TenantStorage,
        timeline_id: TimelineId,
        executor: Executor,
        own_control_file: Callable[[int], ControlFile],
    ) -> None:
        """`own_control_file` gives pg_control as our build of a version makes it; it may block."""
        self._store = store
        self._timeline_id = timeline_id
        self._executor = executor
        self._own_control_file = own_control_file
        self._loop = asyncio.get_running_loop()
        self._tar = TarParser()
        self._begin: ImportBegin | None = None
        self._images: ClusterImages | None = None
        self._ours: ControlFile | None = None
        self._is_checked = False
        self._ingest: WalIngest | None = None
        self.made: TimelineImport | None = None
        self.readable_lsn = Lsn(0)
        self.received_bytes = 0

    async def run(self, chunks: AsyncIterator[bytes]) -> TimelineImport:
        """Takes the whole stream. Raises `ImportStreamError`, `ClusterFileError`, `ImportIncompleteError`,
        `TablespacesError`, and what storing raises.
        """
        parser = ImportStreamParser()
        async for chunk in chunks:
            for frame in parser.feed(chunk):
                await self._take(frame)
            self.received_bytes += len(chunk)
            if parser.is_ended:
                break
        if not parser.is_ended or self.made is None:
            raise ImportStreamError("the stream ends before the import is complete: nothing was imported")
        return self.made

    async def _take(self, frame: ImportFrame) -> None:
        try:
            match frame:
                case ImportBegin():
                    await self._take_begin(frame)
                case TarBytes(data):
                    await self._in_thread(partial(self._take_tar, data))
                case FilesEnd():
                    await self._end_files(frame)
                case WalBytes(start_lsn, data):
                    await self._take_wal(start_lsn, data)
                case ImportEnd():
                    await self._in_thread(self._check_complete)
                case _:
                    assert_never(frame)
        except (InvalidWalError, ControlFileError, UnsupportedRecordError, TarError, ValueError) as error:
            raise ClusterFileError(f"the cluster cannot be imported: {error}") from error

    async def _take_begin(self, begin: ImportBegin) -> None:
        if self._begin is not None:
            raise ImportStreamError("the stream begins twice")
        self._begin = begin
        self._ours = await self._in_thread(partial(self._own_control_file, begin.pg_version))
        self.made = await self._store.begin_import(
            NewTimeline(
                timeline_id=self._timeline_id,
                pg_version=begin.pg_version,
                system_id=begin.system_id,
                wal_segment_size_bytes=begin.wal_segment_size_bytes,
                last_record_lsn=begin.start_lsn,
                prev_record_lsn=begin.prev_record_lsn,
            )
        )
        self._images = ClusterImages(begin.pg_version, self.made.add_image)

    # Files

    def _take_tar(self, data: bytes) -> None:
        images = self._images
        if images is None:
            raise ImportStreamError("files come after the beginning and before WAL")
        for event in self._tar.feed(data):
            match event:
                case MemberStart():
                    file = wanted_file(event)
                    if file is not None:
                        images.begin_file(file)
                case MemberData(part):
                    images.feed(part)
                case MemberEnd():
                    images.end_file()
                    if images.control_file is not None and not self._is_checked:
                        self._check_control_file(images.control_file)

    def _check_control_file(self, control: ControlFile) -> None:
        """As soon as it is there, which of a directory is before all else."""
        assert self._begin is not None
        assert self._ours is not None
        check_built_alike(control, self._ours)
        said = control.system_id, control.wal_segment_size
        if said != (self._begin.system_id, self._begin.wal_segment_size_bytes):
            raise ClusterFileError("pg_control is of another cluster than the stream says")
        self._is_checked = True

    async def _end_files(self, end: FilesEnd) -> None:
        images, self._images = self._images, None
        if images is None or self.made is None:
            raise ImportStreamError("files end before they began, or twice")
        if not self._tar.is_between_members:
            raise ImportStreamError("the tar file is cut short")
        self.readable_lsn = end.readable_lsn
        await self._in_thread(images.finish)
        await self.made.finish_images()
        timeline = self.made.timeline
        self._ingest = await self._in_thread(partial(WalIngest, timeline, read_pages=self._read_pages))

    # WAL

    async def _take_wal(self, start_lsn: Lsn, data: bytes) -> None:
        ingest, made = self._ingest, self.made
        if ingest is None or made is None:
            raise ImportStreamError("WAL comes after the files")
        await self._in_thread(partial(ingest.ingest, data, start_lsn))
        await made.make_room()

    def _read_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        """For databases made by copying files (called in a thread)."""
        if lsn < self.readable_lsn or self.made is None:
            raise DatabaseCopiedError(
                "a database was created by copying another's files while the backup was taken: import again"
            )
        pages = self.made.timeline.get_pages(key, count, lsn)
        return asyncio.run_coroutine_threadsafe(pages, self._loop).result()

    # The end

    def _check_complete(self) -> None:
        if self.made is None or self._ingest is None:
            raise ImportStreamError("the stream ends before the files do")
        timeline = self.made.timeline
        if timeline.last_record_lsn < self.readable_lsn:
            raise ImportIncompleteError(
                f"WAL ends at {format_lsn(timeline.last_record_lsn)}, but the files are consistent only from "
                f"{format_lsn(self.readable_lsn)} on"
            )
        for kind in (KeyKind.RELATION_SIZE, KeyKind.DATABASE):
            for key, _ in timeline.scan(*kind_range(kind), timeline.last_record_lsn):
                if parse_key(key).spc not in BUILT_IN_TABLESPACES:
                    raise TablespacesError(
                        "the cluster has relations in tablespaces of its own: "
                        "move them to pg_default, drop the tablespaces, and import again"
                    )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Waits for the thread even when cancelled: it owns what comes next."""
        future = self._loop.run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


def wanted_file(member: MemberStart) -> ClusterFile | None:
    """What of the tar file is taken. Raises `TablespacesError`; `ClusterFileError` for paths, links and sizes
    that no cluster's files have.
    """
    if member.path.startswith("pg_tblspc/") and member.path != "pg_tblspc/":
        raise TablespacesError("the cluster has tablespaces: Excimer's computes have only the built-in ones")
    if member.type == b"5":
        if member.path:  # the data directory itself has none
            identify_file(member.path.removesuffix("/"))
        return None
    if member.type != b"0":
        raise ClusterFileError(f"{member.path[:200]} is a link: only files and directories are taken")
    file = identify_file(member.path)
    if file is not None and member.size_bytes > file_size_bytes_max(file.kind):
        raise ClusterFileError(f"{member.path} has {member.size_bytes} bytes, too many for what it is")
    return file
