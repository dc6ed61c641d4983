"""Which LSNs of a timeline must stay readable, and who holds them (S3).

::

    oldest kept                      cutoff                             newest
       |      branch point     lease   |                                  |
       +-----------x-------------x-----+==================================+
                    only these two       every LSN

Everything at or above the cutoff is readable. Below it, exactly the points where other timelines branch
off, and the LSNs that somebody holds a lease for. The cutoff only rises. Raising it is one step on the event
loop's thread, as is holding a point: who comes to hold a point below a cutoff that has been announced is
refused, who came before is seen by the garbage collection that announced it. No lock is needed for that.

A lease is renewed by asking for it again, also when the cutoff has passed it meanwhile. Leases live in
memory, and each manifest names those below its cutoff. After an attachment these hold for one lease length,
and no garbage is collected meanwhile, so that everyone alive has renewed.

Who follows the newest, a replica, leases all from an LSN on: as long as that lease runs, the cutoff does not
pass its LSN, which rises whenever the replica renews it. It is not in the manifest: the cutoff that is there
was announced while the lease ran, and no other one is before it could be renewed.

Each lease has a holder, who may give it back early: an LSN is held as long as one of its holders holds it. A
lease whose holder is not known (`NOBODY`: it was not said, or forgotten in a restart) just runs out.

Not here: which layers the points need (`gc_plan`), making a cutoff durable
(`excimer.storage.engine.garbage_collector`).
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn
from excimer.storage.format.manifest import Manifest

NOBODY: Final = ""
"""The holder of leases that nobody gives back."""


class NotRetainedError(RefusedError):
    """The history at an LSN is gone, or about to go."""


class RetainedLsns(NamedTuple):
    """What a garbage collection must leave readable."""

    cutoff_lsn: Lsn
    """Everything at or above."""
    points: tuple[Lsn, ...]
    """And these below it, ascending."""
    points_above: tuple[Lsn, ...] = ()
    """Points held at or above it, ascending: somebody reads there."""


class Retention:
    """Of one timeline. Change it on the event loop's thread only; `is_held` may be asked by any."""

    def __init__(self, timeline_id: str, cutoff_lsn: int, attached_at_s: float) -> None:
        self.timeline_id = timeline_id
        self.cutoff_lsn = Lsn(cutoff_lsn)
        """Announced: nothing new is held below it. The manifest's `oldest_lsn` follows."""
        self.attached_at_s = attached_at_s
        self.find_standstill: Callable[[], str | None] = lambda: None
        """Why it is not known who holds what, so that nothing may go; None while it is known."""
        self._branches: dict[str, Lsn] = {}
        self._branch_counts: dict[Lsn, int] = {}
        self._leases: dict[Lsn, Mapping[str, float]] = {}
        """By LSN and holder, until when. What an LSN maps to is replaced, not changed: others read it."""
        self._onwards: dict[str, tuple[Lsn, float]] = {}
        """By holder: from which LSN on, and until when."""
        self._reading: list[tuple[Callable[[], bool], Lsn]] = []

    @classmethod
    def of(cls, manifest: Manifest, now_s: float, lease_length_s: float) -> "Retention":
        """Right after attaching: leases of the former process hold until they can have been renewed."""
        cutoff_lsn = max(manifest.oldest_lsn, manifest.ancestor_lsn)
        retention = cls(manifest.timeline_id, cutoff_lsn, now_s)
        former = {NOBODY: now_s + lease_length_s}
        retention._leases = dict.fromkeys(map(Lsn, manifest.leased_lsns), former)
        return retention

    def hold_branch(self, child_id: str, lsn: Lsn, now_s: float) -> None:
        """Keeps the point that a new child reads from. Raises `NotRetainedError`."""
        self.check_can_hold(lsn, now_s)
        self.keep_branch(child_id, lsn)

    def keep_branch(self, child_id: str, lsn: Lsn) -> None:
        """The same for a child that exists already: what it reads is still there."""
        self.release_branch(child_id)
        self._branches[child_id] = lsn
        self._branch_counts[lsn] = self._branch_counts.get(lsn, 0) + 1

    def release_branch(self, child_id: str) -> None:
        """The child is gone, or reads no more from here."""
        lsn = self._branches.pop(child_id, None)
        if lsn is None:
            return
        self._branch_counts[lsn] -= 1
        if not self._branch_counts[lsn]:
            del self._branch_counts[lsn]

    def set_branches(self, points: Mapping[str, Lsn]) -> None:
        """Exactly these children hold a point."""
        for child_id in self._branches.keys() - points.keys():
            self.release_branch(child_id)
        for child_id, lsn in points.items():
            if self._branches.get(child_id) != lsn:
                self.keep_branch(child_id, lsn)

    def copy_leases(self, other: "Retention") -> None:
        """History of another timeline is to become this one's, with who reads it."""
        for lsn, holders in other._leases.items():
            own = self._leases.get(lsn, {})
            later = {holder: max(until_s, own.get(holder, 0.0)) for holder, until_s in holders.items()}
            self._leases[lsn] = {**own, **later}

    def inherit(self, cutoff_lsn: int) -> None:
        """History below what was this timeline's beginning has come to it, and was not collected."""
        self.cutoff_lsn = Lsn(cutoff_lsn)

    def hold_while(self, is_wanted: Callable[[], bool], lsn: Lsn) -> None:
        """Keeps a point that was held until now from collections as long as they are told to."""
        self._reading.append((is_wanted, lsn))

    def lease(self, lsn: Lsn, now_s: float, length_s: float, holder: str = NOBODY) -> float:
        """Grants or renews a lease and says until when it holds. Raises `NotRetainedError`."""
        self.check_can_hold(lsn, now_s)
        holders = self._leases.get(lsn, {})
        until_s = max(holders.get(holder, 0.0), now_s + length_s)
        self._leases[lsn] = {**holders, holder: until_s}
        return until_s

    def lease_onwards(self, lsn: Lsn, now_s: float, length_s: float, holder: str) -> float:
        """Grants a lease of all from `lsn` on, in place of the holder's former one; until when it holds.

        Raises `NotRetainedError`.
        """
        if lsn < self.cutoff_lsn:
            raise self._not_retained(lsn)
        self._onwards[holder] = lsn, now_s + length_s
        return now_s + length_s

    def held_onwards(self, now_s: float) -> Lsn | None:
        """From where on all is held by leases; forgets those that are over. None: by none."""
        self._onwards = {holder: held for holder, held in self._onwards.items() if held[1] > now_s}
        return min((lsn for lsn, _ in self._onwards.values()), default=None)

    def release_leases(self, holder: str) -> int:
        """Ends all leases of a holder; how many there were. Those of nobody stay."""
        had_onwards = holder != NOBODY and self._onwards.pop(holder, None) is not None
        held = [lsn for lsn, holders in self._leases.items() if holder in holders and holder != NOBODY]
        for lsn in held:
            others = {other: until_s for other, until_s in self._leases[lsn].items() if other != holder}
            if others:
                self._leases[lsn] = others
            else:
                del self._leases[lsn]
        return len(held) + had_onwards

    def check_can_hold(self, lsn: Lsn, now_s: float) -> None:
        """Raises `NotRetainedError` for what is below the cutoff, unless somebody holds it already."""
        if lsn < self.cutoff_lsn and not self.is_held(lsn, now_s):
            raise self._not_retained(lsn)

    def _not_retained(self, lsn: Lsn) -> NotRetainedError:
        return NotRetainedError(
            f"timeline {self.timeline_id} keeps no history at LSN {format_lsn(lsn)}: "
            f"its oldest is {format_lsn(self.cutoff_lsn)}"
        )

    def is_held(self, lsn: int, now_s: float) -> bool:
        """Whether a branch point or a lease keeps exactly this LSN."""
        return lsn in self._branch_counts or _is_running(self._leases.get(Lsn(lsn), {}), now_s)

    def raise_cutoff(self, lsn: Lsn) -> None:
        """Announces a cutoff. From here on nothing new is held below it."""
        self.cutoff_lsn = max(self.cutoff_lsn, lsn)

    def retained(self, now_s: float) -> RetainedLsns:
        """What must stay readable now; forgets leases that are over."""
        self._leases = {
            lsn: {holder: until_s for holder, until_s in holders.items() if until_s > now_s}
            for lsn, holders in self._leases.items()
            if _is_running(holders, now_s)
        }
        self._reading = [(is_wanted, lsn) for is_wanted, lsn in self._reading if is_wanted()]
        held = {*self._branch_counts, *self._leases, *(lsn for _, lsn in self._reading)}
        return RetainedLsns(
            self.cutoff_lsn,
            tuple(sorted(lsn for lsn in held if lsn < self.cutoff_lsn)),
            tuple(sorted(lsn for lsn in held if lsn >= self.cutoff_lsn)),
        )

    def leases_below_cutoff(self, now_s: float) -> tuple[int, ...]:
        """For the manifest, ascending: a restart would not know of them otherwise. Any thread."""
        leases = list(self._leases.items())
        return tuple(
            sorted(lsn for lsn, holders in leases if lsn < self.cutoff_lsn and _is_running(holders, now_s))
        )

    def branch_points(self) -> dict[str, Lsn]:
        """By child, at whatever LSN."""
        return dict(self._branches)

    def gc_wait_s(self, now_s: float, lease_length_s: float) -> float:
        """How long garbage collection has to wait yet for holders of leases to renew them; 0: not."""
        return max(0.0, self.attached_at_s + lease_length_s - now_s)


def _is_running(holders: Mapping[str, float], now_s: float) -> bool:
    return any(until_s > now_s for until_s in holders.values())


def plan_cutoff(
    *,
    time_lsn: int,
    last_record_lsn: int,
    gc_horizon_bytes: int,
    disk_consistent_lsn: int,
    held_lsn: int | None = None,
) -> Lsn:
    """The LSN below which history may go: older than the window in time, and than the one in bytes.

    `time_lsn` is where the timeline stood when the time window begins. What is not durable yet is no history.
    `held_lsn`: somebody reads all from there on.
    """
    oldest_lsn = min(time_lsn, last_record_lsn - gc_horizon_bytes, disk_consistent_lsn)
    return Lsn(max(0, oldest_lsn if held_lsn is None else min(oldest_lsn, held_lsn)))
