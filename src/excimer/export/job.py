"""Carries an export out: basebackup, layout, pages, pg_control, in this order into a sink.

Reading runs in the event loop and stays a few requests ahead; writing runs in one thread, piece by
piece. However it ends, the sink is either finished or abandoned.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from excimer.base.errors import RetryableError
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn
from excimer.compute.basebackup_client import fetch_basebackup
from excimer.export.layout import CONTROL_FILE_PATH, ExportLayout, PageFile, plan_export
from excimer.export.lease import ReadingLease, keep_lease
from excimer.export.page_stream import PATIENCE_S, RETRY_DELAY_S_MAX, BranchAccess, read_files
from excimer.export.reading_token import Renew
from excimer.export.sink import ExportSink
from excimer.pgformat.basebackup import Basebackup
from excimer.service.tasks import running

Report = Callable[[int, int], None]
"""Bytes of pages written, of how many. Called in the event loop."""


@dataclass(frozen=True, slots=True)
class Exported:
    lsn: Lsn
    pg_version: int
    file_count: int
    size_bytes: int
    """Of all files of pages; with holes, where there are any."""


async def run_export(
    access: BranchAccess, lsn: Lsn, sink: ExportSink, report: Report, renew: Renew
) -> Exported:
    """Writes the branch as it is at `lsn` and returns when it is durable; `renew` is for the access's token.

    Raises what the pageserver answers with, `PageserverUnreachableError`, `OutputRefusedError`, OSError.
    Whatever it raises, and when it is cancelled, nothing of the export is left behind.
    """
    async with running("export token", access.token.keep(renew)):
        return await _export(access, lsn, sink, report)


async def _export(access: BranchAccess, lsn: Lsn, sink: ExportSink, report: Report) -> Exported:
    backup = await read_basebackup(access, lsn)
    layout = plan_export(backup, int(time.time()))
    lease = ReadingLease(access, Lsn(backup.lsn), "export")
    try:
        async with running("export lease", keep_lease(lease.ask, await lease.ask())):
            await _write(access, Lsn(backup.lsn), layout, sink, report)
    finally:
        await lease.release()
    return Exported(
        Lsn(backup.lsn),
        backup.pg_version,
        len(layout.files) + len(layout.wal) + len(layout.page_files) + 1,
        layout.page_count * BLOCK_SIZE_BYTES,
    )


async def _write(
    access: BranchAccess, lsn: Lsn, layout: ExportLayout, sink: ExportSink, report: Report
) -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="export") as thread:
        is_finished = False
        try:
            await loop.run_in_executor(thread, sink.begin)
            await loop.run_in_executor(thread, _write_frame, sink, layout)
            await _write_pages(access, lsn, layout, _PageWriter(sink, thread), report)
            await loop.run_in_executor(thread, _write_end, sink, layout)
            is_finished = True
        finally:
            if not is_finished:
                await loop.run_in_executor(thread, sink.abandon)


async def read_basebackup(access: BranchAccess, lsn: Lsn) -> Basebackup:
    """The pageserver may be starting, or have to receive WAL first."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await fetch_basebackup(
                access.page_service_address, access.tenant_id, access.timeline_id, access.token.text, lsn
            )
        except RetryableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_DELAY_S_MAX)


def _write_frame(sink: ExportSink, layout: ExportLayout) -> None:
    """All that is small, and files without a block."""
    for directory in layout.directories:
        sink.add_directory(directory)
    for path, content in layout.files:
        sink.add_file(path, content)
    for segment in layout.wal:
        sink.open_file(segment.path, segment.size_bytes)
        position = 0
        for offset, data in segment.chunks:
            sink.skip(offset - position)
            sink.write(data)
            position = offset + len(data)
        sink.close_file()
    for file in layout.page_files:
        if file.blocks == 0:
            sink.add_file(file.path, b"")


def _write_end(sink: ExportSink, layout: ExportLayout) -> None:
    sink.add_file(CONTROL_FILE_PATH, layout.control_file)
    sink.finish()


async def _write_pages(
    access: BranchAccess, lsn: Lsn, layout: ExportLayout, writer: "_PageWriter", report: Report
) -> None:
    total = layout.page_count * BLOCK_SIZE_BYTES
    report(0, total)
    pieces = read_files(access, lsn, layout.page_files)
    async with contextlib.aclosing(pieces):
        async for file, data in pieces:
            await writer.write(file, data)
            report(writer.written_bytes, total)


class _PageWriter:
    """Opens and closes the files that pieces belong to, in the sink's thread."""

    def __init__(self, sink: ExportSink, thread: ThreadPoolExecutor) -> None:
        self._sink = sink
        self._thread = thread
        self._missing_bytes = 0
        self.written_bytes = 0

    async def write(self, file: PageFile, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, file, data)
        self.written_bytes += len(data)

    def _write(self, file: PageFile, data: bytes) -> None:
        if self._missing_bytes == 0:
            self._missing_bytes = file.blocks * BLOCK_SIZE_BYTES
            self._sink.open_file(file.path, self._missing_bytes)
        self._sink.write(data)
        self._missing_bytes -= len(data)
        if self._missing_bytes == 0:
            self._sink.close_file()
