"""Carries a verification out: one look at everything, then looks at what seemed to differ, until it is sure.

::

    settle: LSN R --> list, sizes at R --> read blocks here, ask for them at max(R, pd_lsn) --> findings
       ^                                                                                          |
       +------------- again, only what was found, at a newer R, at most LOOKS_MAX times ----------+

Under load a look finds what is none: a block that was half written while it was read, a file that has
just been cut or dropped, a map whose bits change without LSN. None of it is there when it is looked at again;
a difference is. Of pages without LSN the copy of one look is also held against what the next one is served:
each of its bits must be as it was at one of the two moments.

Memory is bounded by the requests in flight (`export.page_stream`) and by `FINDINGS_MAX`.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from excimer.base.errors import ExcimerError
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, Relation, parse_key
from excimer.base.lsn import Lsn
from excimer.export.job import read_basebackup
from excimer.export.layout import PageRun, page_files_of
from excimer.export.lease import ReadingLease, keep_lease, take_lease
from excimer.export.page_stream import BranchAccess, PageStream, RunRequest
from excimer.export.reading_token import Renew
from excimer.pgformat.basebackup import Basebackup
from excimer.pgformat.cluster_files import FileKind, identify_file
from excimer.service.tasks import running
from excimer.verify.judgement import (
    Disagreement,
    comparable_bits,
    is_between,
    judge_block,
    page_lsn,
    stamps_lsn,
)
from excimer.verify.local_files import LocalFiles
from excimer.verify.model import Counts, Finding, Verified, VerifiedServer
from excimer.verify.plan import (
    Batch,
    ComparedFile,
    Targets,
    block_key,
    is_unwritten,
    plan_batches,
    plan_files,
    size_is_wrong,
)

LOOKS_MAX: Final = 6
LOOK_PAUSE_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0)
FINDINGS_PER_FILE_MAX: Final = 64
"""The rest of a file with more is left for the next look, which takes the whole file again."""
FINDINGS_MAX: Final = 4096
"""Beyond that nothing more is looked for."""

Report = Callable[[int, int], None]
"""Bytes compared or passed over, of how many; of the first look."""


class Rate:
    """Holds a reader to so many bytes in a second; 0 does not."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._next_at = 0.0

    async def passed(self, size_bytes: int) -> None:
        if self._bytes_per_s > 0:
            now = time.monotonic()
            self._next_at = max(self._next_at, now) + size_bytes / self._bytes_per_s
            await asyncio.sleep(max(self._next_at - now - 1.0, 0.0))  # a second may be saved up


class Subject(NamedTuple):
    """What is verified."""

    access: BranchAccess
    files: LocalFiles
    server: VerifiedServer
    hints_are_logged: bool


async def run_verification(subject: Subject, rate: Rate, report: Report, renew: Renew) -> Verified:
    """Raises what the pageserver answers with, what `VerifiedServer` raises, `PageserverUnreachableError`."""
    async with running("verification token", subject.access.token.keep(renew)):
        verification = _Verification(subject, rate, report)
        return await verification.run()


class _Verification:
    def __init__(self, subject: Subject, rate: Rate, report: Report) -> None:
        self._subject = subject
        self._rate = rate
        self._report = report

    async def run(self) -> Verified:
        lsn = await self._settle()
        async with self._leased(lsn):
            look = _Look(self._subject, self._rate, self._report, lsn)
            await look.run(None, [])
        counts, relations = look.counts, len(look.relations)
        looks, making = 1, set[Relation]()
        while look.findings and looks < LOOKS_MAX:
            await asyncio.sleep(LOOK_PAUSE_S[min(looks, len(LOOK_PAUSE_S)) - 1])
            # Asked before the checkpoint: what had committed by then is whole on the disk after it.
            making = await self._in_creation(look.findings)
            earlier, targets = look.findings, look.targets()
            look = _Look(self._subject, self._rate, lambda done, total: None, await self._settle())
            await look.run(targets, earlier)
            looks += 1
        result = Verified(look.lsn, look.pg_version, relations, counts, looks=looks)
        result.in_creation = len({found.relation for found in look.findings if found.relation in making})
        result.differences = [found for found in look.findings if found.relation not in making]
        result.is_cut_short = look.is_cut_short
        await self._name(result.differences)
        return result

    async def _settle(self) -> Lsn:
        return await asyncio.to_thread(self._subject.server.settle)

    @contextlib.asynccontextmanager
    async def _leased(self, lsn: Lsn) -> AsyncIterator[None]:
        lease = ReadingLease(self._subject.access, lsn, "verify")
        try:
            async with running("verification lease", keep_lease(lease.ask, await take_lease(lease.ask))):
                yield
        finally:
            await lease.release()

    async def _in_creation(self, findings: Sequence[Finding]) -> set[Relation]:
        relations = {found.relation for found in findings if found.relation is not None}
        known = await asyncio.to_thread(self._subject.server.look_up, relations)
        return {relation for relation, now in known.items() if not now.is_committed}

    async def _name(self, findings: Sequence[Finding]) -> None:
        relations = {found.relation for found in findings if found.relation is not None}
        known = await asyncio.to_thread(self._subject.server.look_up, relations)
        for found in findings:
            if found.relation is not None:
                found.name = known[found.relation].name


class _Look:
    """One comparison, at one LSN, of everything or of what an earlier look has found."""

    def __init__(self, subject: Subject, rate: Rate, report: Report, lsn: Lsn) -> None:
        self._subject = subject
        self._rate = rate
        self._report = report
        self.lsn = lsn
        self.pg_version = 0
        self.counts = Counts()
        self.relations: set[Relation] = set()
        self.findings: list[Finding] = []
        self.is_cut_short = False
        self._per_file: Counter[str] = Counter()
        self._whole: set[str] = set()
        """Files that are to be looked at again as a whole."""
        self._earlier: dict[bytes, Finding] = {}
        self._failed: list[Batch] = []
        """Of several blocks, one of which the pageserver cannot serve."""
        self._done_bytes = self._total_bytes = 0

    def targets(self) -> Targets | None:
        """What the next look should compare; None for everything."""
        if self.is_cut_short:
            return None
        found: dict[str, set[int] | None] = {}
        for finding in self.findings:
            blocks = found.setdefault(finding.path, set())
            if finding.key is None:
                found[finding.path] = None
            elif blocks is not None:
                blocks.add(parse_key(finding.key).block)
        return found | dict.fromkeys(self._whole)

    async def run(self, targets: Targets | None, earlier: Sequence[Finding]) -> None:
        self._earlier = {
            each.key: each for each in earlier if each.key is not None and each.copies is not None
        }
        backup = await read_basebackup(self._subject.access, self.lsn)
        self.pg_version = backup.pg_version
        listing = await asyncio.to_thread(self._subject.files.listing)
        self._compare_small_files(backup, listing.small_files, targets)
        page_targets = (
            None
            if targets is None
            else {path: blocks for path, blocks in targets.items() if _is_page_file(path)}
        )
        layout = plan_files(listing.page_files, page_files_of(backup), page_targets)
        self.counts.files = len(layout.files)
        self.counts.free_space_pages = layout.free_space_pages
        self.counts.unlogged_files = layout.unlogged_files
        for file in layout.files:
            self._total_bytes += (file.here_blocks or 0) * BLOCK_SIZE_BYTES
            fields = parse_key(file.key)
            if fields.kind == KeyKind.RELATION_BLOCK:
                self.relations.add(Relation(fields.spc, fields.db, fields.rel))
        await self._read(partial(self._batches, layout.files, targets or {}))
        failed, self._failed = self._failed, []
        await self._read(lambda _: _in_single_blocks(failed))

    async def _read(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        def requests(blocks_max: int) -> Iterator[RunRequest[Batch]]:
            for batch in batches(blocks_max):
                yield RunRequest(batch, PageRun(batch.key, len(batch.pages)), batch.lsn)

        stream = PageStream[Batch](self._subject.access)
        async with contextlib.aclosing(stream.read(requests)) as answers:
            async for batch, answer in answers:
                self._judge(batch, answer)
                await self._rate.passed(len(batch.pages) * BLOCK_SIZE_BYTES)

    def _batches(self, files: Sequence[ComparedFile], targets: Targets, blocks_max: int) -> Iterator[Batch]:
        for file in files:
            wanted = targets.get(file.path)
            if wanted is None:
                if size_is_wrong(file):
                    self._find_size(file)
                runs = [(at, blocks_max) for at in range(0, file.here_blocks or 0, blocks_max)]
            else:
                first = parse_key(file.key).block
                runs = [(block - first, 1) for block in sorted(wanted)]
            for block, count in runs:
                if self._is_full(file.path):
                    break
                pages = self._subject.files.read(file.path, block, count)
                yield from plan_batches(file, block, self._kept(file, block, pages), self.lsn)
                self._progress(len(pages))

    def _kept(self, file: ComparedFile, block: int, pages: Sequence[bytes | None]) -> list[bytes | None]:
        """Without those that WAL does not know yet."""
        kept: list[bytes | None] = []
        for number, page in enumerate(pages, block):
            self.counts.absent_pages += page is None
            if page is not None and is_unwritten(file, number, page):
                self.counts.unwritten_pages += 1
                page = None
            kept.append(page)
        return kept

    def _judge(self, batch: Batch, answer: bytes | ExcimerError) -> None:
        if isinstance(answer, ExcimerError):
            if len(batch.pages) > 1:
                self._failed.append(batch)
            else:
                self.counts.pages += 1
                told = Disagreement(f"the pageserver does not serve it: {answer}")
                self._find_block(batch.file, batch.block, told, batch.lsn, (batch.pages[0], b""))
            return
        self.counts.pages += len(batch.pages)
        for index, here in enumerate(batch.pages):
            served = answer[index * BLOCK_SIZE_BYTES : (index + 1) * BLOCK_SIZE_BYTES]
            if here != served:
                self._judge_block(batch.file, batch.block + index, (here, served), batch.lsn)

    def _judge_block(self, file: ComparedFile, block: int, copies: tuple[bytes, bytes], lsn: Lsn) -> None:
        key = block_key(file, block)
        told = judge_block(key, *copies, hints_are_logged=self._subject.hints_are_logged)
        if told is None:
            return
        earlier = self._earlier.get(key)
        if earlier is not None and earlier.copies is not None and all(earlier.copies):
            moments = (*earlier.copies, copies[1])
            if is_between(*(comparable_bits(key, page) for page in moments)):
                return
        self._find_block(file, block, told, lsn, copies)

    def _find_block(
        self, file: ComparedFile, block: int, told: Disagreement, lsn: Lsn, copies: tuple[bytes, bytes]
    ) -> None:
        key = block_key(file, block)
        found = Finding(file.path, lsn, told, key)
        if parse_key(key).kind == KeyKind.RELATION_BLOCK:
            found.here_lsn, found.served_lsn = (page_lsn(page) if page else None for page in copies)
        if not stamps_lsn(key):
            found.copies = copies
        self._find(found)

    def _find_size(self, file: ComparedFile) -> None:
        here, served = (
            "no such file" if blocks is None else f"{blocks} block{'' if blocks == 1 else 's'}"
            for blocks in (file.here_blocks, file.served_blocks)
        )
        self._find(Finding(file.path, self.lsn, Disagreement(f"{here} here, {served} at the pageserver")))

    def _find(self, found: Finding) -> None:
        self.findings.append(found)
        self._per_file[found.path] += 1
        self.is_cut_short = len(self.findings) >= FINDINGS_MAX

    def _is_full(self, path: str) -> bool:
        if self._per_file[path] >= FINDINGS_PER_FILE_MAX:
            self._whole.add(path)
        return self.is_cut_short or path in self._whole

    def _compare_small_files(self, backup: Basebackup, here: set[str], targets: Targets | None) -> None:
        """Relation maps, versions of databases, states of prepared transactions: whole."""
        served = {path: content for path, content in backup.files if _is_small_file(path)}
        for path in sorted({*here, *served}):
            if targets is not None and path not in targets:
                continue
            self.counts.small_files += 1
            ours, theirs = self._subject.files.small_file(path), served.get(path)
            if ours != theirs:
                told = (
                    "it is not here"
                    if ours is None
                    else "the pageserver has none"
                    if theirs is None
                    else None
                )
                self._find(Finding(path, self.lsn, Disagreement(told or "its contents differ")))

    def _progress(self, blocks: int) -> None:
        self._done_bytes += blocks * BLOCK_SIZE_BYTES
        self._report(self._done_bytes, max(self._done_bytes, self._total_bytes))


def _in_single_blocks(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for index, page in enumerate(batch.pages):
            yield Batch(batch.file, batch.block + index, [page], batch.lsn)


def _is_page_file(path: str) -> bool:
    file = identify_file(path)
    return file is not None and file.kind in (FileKind.RELATION, FileKind.SLRU)


def _is_small_file(path: str) -> bool:
    file = identify_file(path)
    return file is not None and file.kind in (FileKind.RELATION_MAP, FileKind.DATABASE, FileKind.TWO_PHASE)
