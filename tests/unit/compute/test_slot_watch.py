"""A slot that holds much WAL is told, and one that nobody uses does not hold it for ever."""

import asyncio
from pathlib import Path

from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn
from excimer.compute.proposer import PROPOSER_SLOT
from excimer.compute.slot_watch import GIVEN_UP, HOLDS, HeldWal, SlotWatch, held_wal
from excimer.service.health import Health
from tests.unit.compute.test_saved_state import slot_file

MIB = 1 << 20


class Postgres:
    """Slots, of which those of `used` have a consumer."""

    def __init__(self, held: dict[str, int], used: frozenset[str] = frozenset()) -> None:
        self.held = held
        self.used = used
        self.is_away = False

    def slots(self) -> list[HeldWal]:
        return [HeldWal(name, size * MIB) for name, size in self.held.items()]

    async def drop(self, limit_bytes: int) -> list[HeldWal]:
        if self.is_away:
            raise RetryableError("no connection")
        gone = [each for each in self.slots() if each.size_bytes > limit_bytes and each.slot not in self.used]
        for each in gone:
            del self.held[each.slot]
        return gone


def look(postgres: Postgres, health: Health, limit_mib: int = 100) -> None:
    asyncio.run(SlotWatch(health, limit_mib * MIB).look(postgres.slots, postgres.drop))


def test_what_holds_little_is_not_spoken_of() -> None:
    health = Health("compute")
    look(Postgres({"mine": 50}), health)
    assert health.warnings == {}


def test_who_holds_more_than_half_is_named_until_it_goes_on() -> None:
    health, postgres = Health("compute"), Postgres({"mine": 51, "other": 60})
    look(postgres, health)
    assert "other (60 MiB, and 1 more)" in health.warnings[HOLDS]
    assert set(postgres.held) == {"mine", "other"}
    postgres.held.update(mine=0, other=0)
    look(postgres, health)
    assert health.warnings == {}


def test_beyond_the_limit_what_nobody_uses_is_dropped_and_said() -> None:
    health, postgres = Health("compute"), Postgres({"mine": 101, "slow": 500}, frozenset({"slow"}))
    look(postgres, health)
    assert set(postgres.held) == {"slow"}
    assert "mine (101 MiB)" in health.warnings[GIVEN_UP]
    look(postgres, health)
    assert "slow (500 MiB)" in health.warnings[HOLDS]
    assert GIVEN_UP in health.warnings


def test_a_postgres_that_does_not_answer_is_asked_again() -> None:
    health, postgres = Health("compute"), Postgres({"mine": 101})
    postgres.is_away = True
    look(postgres, health)
    assert GIVEN_UP not in health.warnings
    postgres.is_away = False
    look(postgres, health)
    assert postgres.held == {}


def test_without_a_limit_nothing_is_dropped() -> None:
    health, postgres = Health("compute"), Postgres({"mine": 1 << 20})
    look(postgres, health, limit_mib=0)
    assert (health.warnings, set(postgres.held)) == ({}, {"mine"})


def test_what_is_held_is_read_from_the_files(tmp_path: Path) -> None:
    for name, content in {
        "mine": slot_file("mine", restart_lsn=3 * MIB),
        "none": slot_file("none", restart_lsn=0),
        "lost": slot_file("lost", restart_lsn=MIB, invalid=1),
        "torn": slot_file("torn", restart_lsn=MIB)[:-1],
        "proposer": slot_file(PROPOSER_SLOT, restart_lsn=MIB),
    }.items():
        (tmp_path / "pg_replslot" / name).mkdir(parents=True)
        (tmp_path / "pg_replslot" / name / "state").write_bytes(content)
    assert held_wal(tmp_path, 18, Lsn(10 * MIB)) == [HeldWal("mine", 7 * MIB)]
    assert held_wal(tmp_path, 18, Lsn(MIB)) == [HeldWal("mine", 0)]
