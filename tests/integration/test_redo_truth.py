"""Redo workers rebuild pages as a stock server of each version wrote them, from nothing but its WAL."""

import asyncio
import os
import random
import shutil
import struct
from collections import Counter
from pathlib import Path

import pytest

from excimer.base.ids import TenantId
from excimer.base.keys import Fork, Relation
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.page_kinds import PageKind, page_kind
from excimer.pgformat.page_masks import masked_page, sequence_agrees
from excimer.postgres import PostgresBuild, run_initdb
from excimer.postgres.redo_extension import LIBRARY_NAME, compile_redo, source_directory
from excimer.storage.engine.redo_pool import RedoError, RedoPool
from excimer.wire.redo import encode_redo_request
from tests.kit.builds import ALL_VERSIONS, build_of
from tests.kit.directories import reachable_directory
from tests.kit.redo_mutation import interleave, mutated_request
from tests.kit.redo_truth import (
    SEGMENT_SIZE_BYTES,
    Chain,
    PageFiles,
    PageId,
    collect_chains,
    read_wal,
)
from tests.kit.redo_workload import BLOOM, END, RELATIONS, ROUND, SETUP
from tests.kit.stock_server import stock_server

TENANT = TenantId("0a" * 16)
UNDEFINED_BEHAVIOUR_TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
"""The library under test dies of whatever C leaves undefined; needs no run-time library."""
ROUNDS = 3
DAMAGE_ROUNDS = int(os.environ.get("EXCIMER_REDO_DAMAGE_ROUNDS", "5"))
DAMAGE_SEED = int(os.environ.get("EXCIMER_REDO_DAMAGE_SEED", "1"))
DAMAGE_VERSIONS = (15, 18)
KINDS = {"heap", "btree", "hash", "gin", "gist", "spgist", "brin", "sequence"}
SETTINGS = {
    "fsync": "off",
    "wal_level": "replica",
    "full_page_writes": "off",
    "max_wal_size": "10GB",
    "wal_keep_size": "10GB",
    "autovacuum": "off",
    "synchronous_commit": "off",
}


class Truth:
    """A stopped server's directory, its state before the workload, its relations and its WAL."""

    def __init__(self, build: PostgresBuild, root: Path, settings: dict[str, str]) -> None:
        self.build = build
        data_dir, base_dir = root / "data", root / "base"
        run_initdb(build, data_dir, wal_segment_size_mib=SEGMENT_SIZE_BYTES >> 20)
        shutil.copytree(data_dir, base_dir)
        start = ControlFile.unpack(
            (data_dir / "global/pg_control").read_bytes(), build.version
        ).checkpoint_lsn
        with stock_server(build, data_dir, SETTINGS | settings) as server:
            script = SETUP + "".join(ROUND.format(round=number) for number in range(1, ROUNDS + 1)) + END
            if "bloom" in build.features.extensions:
                script += BLOOM
            server.sql(script)
            rows = server.sql(RELATIONS)
        # relation -> access method, for what WAL covers
        self.relations = {
            Relation(int(spc), int(db), int(number)): "sequence"
            if kind == "S"
            else method.replace("-", "heap")
            for spc, db, number, _name, kind, method, persistence in rows
            if persistence == "p"
        }
        self.chains = collect_chains(read_wal(data_dir, start, build.version), build.version)
        self.before, self.after = PageFiles(base_dir), PageFiles(data_dir)

    def cases(self) -> list[tuple[PageId, Chain, bytes]]:
        """Pages with a chain that still exist."""
        found = []
        for page, chain in self.chains.items():
            real = self.after.page(page)
            if page.relation in self.relations and page.fork in (Fork.MAIN, Fork.VM) and real is not None:
                found.append((page, chain, real))
        return found

    def request(self, page: PageId, chain: Chain) -> bytes:
        base = None if chain.is_new else self.before.page(page)
        return encode_redo_request(page.relation, page.fork, page.block, base, chain.records)


def assert_equal_to_truth(truth: Truth, results: list[bytes | RedoError]) -> Counter[str]:
    """Compares under PostgreSQL's own masks; counts compared pages by kind."""
    counts: Counter[str] = Counter()
    wrong = []
    for (page, chain, real), result in zip(truth.cases(), results, strict=True):
        method = truth.relations[page.relation]
        if isinstance(result, RedoError):
            wrong.append(f"{page} {method}: {result}")
            continue
        counts[method if page.fork == Fork.MAIN else "visibility map"] += 1
        kind = page_kind(real, page.fork, page.block)
        same = masked_page(result, kind, page.block) == masked_page(real, kind, page.block)
        if kind is PageKind.SEQUENCE:
            same = same and sequence_agrees(real, result)
        if page.fork == Fork.MAIN and not has_own_lsn(method, page, real):
            same = same and result[:8] == real[:8]
        if not same:
            wrong.append(f"{page} {method}: differs after {len(chain.records)} records")
    assert not wrong, f"{len(wrong)} of {len(results)} pages: " + "\n".join(wrong[:20])
    return counts


def has_own_lsn(method: str, page: PageId, real: bytes) -> bool:
    """SP-GiST's metapage is written without a record; a GiST build stamps its pages with LSN 1."""
    return (method == "spgist" and page.block == 0) or real[:8] == struct.pack("<II", 0, 1)


async def rebuild(truth: Truth, scratch: Path, wal_log_hints: bool = False) -> list[bytes | RedoError]:
    checked = scratch.with_name("checked")
    checked.mkdir(mode=0o755)
    compile_redo(truth.build, source_directory(), checked, UNDEFINED_BEHAVIOUR_TRAPS)
    library = checked / LIBRARY_NAME
    pool = RedoPool(truth.build, scratch, 2, wal_log_hints=wal_log_hints, extension=library)
    try:
        return await pool.redo([truth.request(page, chain) for page, chain, _ in truth.cases()], TENANT)
    finally:
        await pool.close()


async def survive_damage(truth: Truth, scratch: Path, seed: int) -> None:
    """Records that redo chokes on give an error or, where it does not notice, a page; never a wrong
    answer to anybody else."""
    chance = random.Random(seed)
    cases = [(page, chain) for page, chain, _ in truth.cases() if chain.is_new and page.fork == Fork.MAIN]
    good = [truth.request(page, chain) for page, chain in chance.sample(cases, 60)]
    pool = RedoPool(truth.build, scratch, 2, request_timeout_s=10)
    try:
        right = await pool.redo(good, TENANT)
        errors = 0
        for _ in range(DAMAGE_ROUNDS):
            bad = [mutated_request(chance, *chance.choice(cases)) for _ in range(6)]
            mixed = interleave(good, bad, chance)
            results = await pool.redo([request for request, _ in mixed], TENANT)
            for (_, index), result in zip(mixed, results, strict=True):
                assert index < 0 or result == right[index], f"seed {seed}: {result!r:.200}"
                errors += isinstance(result, RedoError)
        assert errors >= DAMAGE_ROUNDS, f"seed {seed}: hardly any damage was noticed"
    finally:
        await pool.close()


def check(version: int, settings: dict[str, str]) -> None:
    with reachable_directory() as root:
        truth = Truth(build_of(version), root, settings)
        hints = settings.get("wal_log_hints") == "on"
        results = asyncio.run(rebuild(truth, root / "scratch", hints))
        counts = assert_equal_to_truth(truth, results)
        if version in DAMAGE_VERSIONS and not settings:
            asyncio.run(survive_damage(truth, root / "scratch", DAMAGE_SEED))
    wanted = KINDS | {"visibility map"} | ({"bloom"} & truth.build.features.extensions)
    assert all(counts[kind] >= 2 for kind in wanted), counts


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_whole_chains_give_the_servers_pages(version: int) -> None:
    check(version, {})


@pytest.mark.parametrize(("version", "compression"), [(14, "on"), (17, "zstd")])
def test_full_page_images_in_the_chains(version: int, compression: str) -> None:
    if compression == "zstd" and not build_of(version).features.zstd:
        pytest.skip(f"this PostgreSQL {version} is built without zstd")
    check(version, {"full_page_writes": "on", "wal_compression": compression})


def test_logged_hints_leave_their_lsn() -> None:
    # Without full-page writes such a record carries no image, and redo, ours and a standby's, ignores it.
    check(18, {"wal_log_hints": "on", "full_page_writes": "on"})
