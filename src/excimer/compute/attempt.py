"""One attempt: election, data directory, postgres, and its WAL to the quorum.

::

                   +--warm: the directory of the last stop--------+
    elect ---> E --+                                              +--> postgres ready ---> stream WAL
                   +--cold: basebackup at E ---> directory, arena-+           |
                                                                              |
    keep it, with a record <--- clean, a quorum has all <-- postgres is dead -+ (stop, crash, fenced)
    remove it              <--- anything else <----------------+

Whatever happens, an attempt ends with postgres dead, without a directory or with one that H3 lets be used.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial

from excimer.base.address import Address, parse_address
from excimer.base.errors import CorruptionError, ExcimerError, FencedError, RefusedError, RetryableError
from excimer.base.lsn import Lsn, format_lsn
from excimer.compute.admission import Admission, Door
from excimer.compute.arena import Arena, preload_environment
from excimer.compute.backpressure import Backpressure
from excimer.compute.basebackup_client import fetch_awaited
from excimer.compute.cache_keeper import CacheKeeper
from excimer.compute.core import AttemptEnd, Ended, Fenced, StartFailed
from excimer.compute.data_directory import write_private
from excimer.compute.directory_preparation import prepare_kept, prepare_new
from excimer.compute.endpoint_directory import EndpointDirectory
from excimer.compute.hot_keeper import HotKeeper
from excimer.compute.idle_watch import IdleWatch, Serving
from excimer.compute.kept_directory import CleanEnd
from excimer.compute.local_access import LocalAccess, write_local_access
from excimer.compute.lsn_lease import LeasedMoment, LeaseRefusedError, LsnLease
from excimer.compute.outside_work import GATE, disable_inherited_subscriptions
from excimer.compute.page_relay import relaying_pages
from excimer.compute.position_client import PositionClient
from excimer.compute.postgres_process import PostgresProcess, PostgresStartError, check_port, kill_left_behind
from excimer.compute.postgres_settings import access_arguments
from excimer.compute.proposer import PostgresAddress, Proposer
from excimer.compute.replica import Replica
from excimer.compute.replica_start import NoStandbyStartError
from excimer.compute.server_certificate import CertificatePair, follow_files, installed_files, read_pair
from excimer.compute.server_look import look_at_server
from excimer.compute.settings_keeper import SettingsKeeper
from excimer.compute.slot_return import SlotReturn
from excimer.compute.slot_wal import ReplacedWal, SlotWal, put_back
from excimer.compute.spec import ComputeSpec
from excimer.compute.start_failure import ConfigurationFaultError, configuration_fault
from excimer.compute.start_session import leave_start_lsn
from excimer.compute.state_keeper import StateKeeper
from excimer.compute.state_resumption import Resumption
from excimer.compute.stop_progress import AroundStop, StopBeat
from excimer.compute.superuser_names import find_superuser
from excimer.compute.wal_horizon import ask_horizon
from excimer.compute.warm_start import Cold, QuorumEnd, Warm, told
from excimer.io.processes import describe_exit
from excimer.pgformat.basebackup import Basebackup
from excimer.postgres.setting_rules import check_rules
from excimer.service.listen import bind_listen
from excimer.service.logs import get_logger
from excimer.service.tasks import SystemClock, TaskScope, finish_in_thread
from excimer.service.tls import has_tls
from excimer.wire.endpoint_tokens import EndpointTokens

AWAITED_NOTICE_S = 2.0
"""A step that takes longer is spoken of to whoever asks how the endpoint is."""
SERVED_TIMEOUT_S = 1.0
ELECTION = "election"
EXITS_OF_NO_START = (0, 1)
"""As postgres ends that was told to stop, or that refuses to start; not as it crashes."""

log = get_logger(__name__)


class Attempt:
    """Run once: `run` returns how it ended; `stop` makes it end."""

    def __init__(
        self,
        spec: ComputeSpec,
        tokens: Callable[[], EndpointTokens],
        keeper: SettingsKeeper,
        states: StateKeeper,
        on_started: Callable[[], None],
        idle: IdleWatch,
        beat: StopBeat,
        slots: SlotReturn,
    ) -> None:
        """`tokens` gives the newest; `renew_tokens` tells of newer ones. `beat` hears how a stop gets on."""
        self._spec = spec
        self._tokens = tokens
        self._keeper = keeper
        self._states = states
        self._on_started = on_started
        self._idle = idle
        self._beat = beat
        self._slots = slots
        self._replaced: ReplacedWal | None = None
        self._directory = EndpointDirectory(spec)
        self._hot = HotKeeper(spec)
        self.decided: Warm | Cold | None = None
        """How it starts; None while that is not known."""
        self._options: list[str] = []
        self._settings: dict[str, str] = {}
        self._process: PostgresProcess | None = None
        self._is_launched = False
        self._clean_end: CleanEnd | None = None
        self._task: asyncio.Task[object] | None = None
        self._stopping = False
        self._superusers: list[str] = []
        self._admission: Admission | None = None
        self.arena: Arena | None = None
        self.proposer: Proposer | None = None
        self.replica: Replica | None = None
        self._outdated: str | None = None
        """Why a replica is started anew."""
        self._lease: LsnLease | None = None
        """What is given back at the end."""
        self.backpressure: Backpressure | None = None
        self._step = ""
        self._step_since = time.monotonic()

    @property
    def awaited(self) -> str | None:
        """What a start, or commits if postgres runs, wait for; None while there is nothing to speak of."""
        if time.monotonic() - self._step_since < AWAITED_NOTICE_S:
            return None
        missing = None if self.proposer is None else self.proposer.missing_majority()
        if self._step == ELECTION:
            return missing or "an election by the safekeepers"
        return missing or self._step or None

    def _begin(self, step: str) -> None:
        self._step, self._step_since = step, time.monotonic()

    async def run(self) -> AttemptEnd:
        self._task = asyncio.current_task()
        try:
            async with _page_relay(self._spec), TaskScope() as scope:
                return await self._run(scope)
        except FencedError as error:
            return Fenced(str(error))
        except (RefusedError, CorruptionError) as error:
            return StartFailed(str(error), may_retry=False)
        except (ExcimerError, OSError) as error:
            return StartFailed(str(error), may_retry=True)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            return Ended(time.monotonic(), "stopped while it started")
        finally:
            await asyncio.shield(self._clean_up())

    async def stop(self) -> None:
        """Makes `run` end: a fast shutdown of postgres if there is one, else no start."""
        self._stopping = True
        self._slots.keeper.stopping()
        if self.backpressure is not None:
            self.backpressure.lift()
        if self.proposer is not None:
            self.proposer.expect_end()
        if self._process is not None:
            if self._admission is not None and self._admission.door is Door.SHUT:
                await self._process.let_leave()
            await self._process.stop(AroundStop(self._own_walsender, self._quorum, self._beat))
        elif self._task is not None:
            self._task.cancel()

    def _own_walsender(self) -> int | None:
        return None if self.proposer is None else self.proposer.walsender_pid

    def _quorum(self) -> tuple[int, bool]:
        """Commit LSN, and whether a majority answers; who writes no WAL needs none."""
        proposer = self.proposer
        return (0, True) if proposer is None else (proposer.commit_lsn, proposer.missing_majority() is None)

    def renew_tokens(self, tokens: EndpointTokens) -> None:
        """Into the arena goes what opens the branch's pages, to the proposer what writes its WAL."""
        if self.arena is not None:
            self.arena.set_token(tokens.read_pages)
        if self.proposer is not None and tokens.write_wal is not None:
            self.proposer.renew_token(tokens.write_wal)

    async def _run(self, scope: TaskScope) -> AttemptEnd:
        spec = self._spec
        clock = _StepClock()
        await self._end_postgres()
        # Before the election, which ends whoever else serves this timeline.
        check_port(spec.port)
        bind_listen(str(Address(spec.host, spec.port)), "PostgreSQL", is_ours=False).close()
        pair = None if spec.certificate is None else await asyncio.to_thread(read_pair, spec.certificate)
        if spec.is_standby:
            end_lsn = await self._begin_standby(scope, clock)
        else:
            end_lsn = await self._begin_primary(scope, clock)
        ingested_lsn = await self._lay_directory(scope, end_lsn, pair, clock)
        self.renew_tokens(self._tokens())  # they may have changed meanwhile
        clock.step("directory")
        self._begin("PostgreSQL to accept connections")
        self._is_launched = True
        if self.replica is not None:
            await self.replica.serve(scope)
        self._process = process = self._start_postgres()
        await self._wait_ready(process)
        assert self.arena is not None
        self.arena.set_ready()
        clock.step("postgres")
        log.info("ready", lsn=format_lsn(end_lsn), **told(self.decided), **clock.steps_ms)
        socket_dir = str(spec.places.socket_dir)
        superuser = await find_superuser(self._superusers, socket_dir, spec.port, spec.build.version)
        address = PostgresAddress(socket_dir, spec.port, spec.build.version, superuser)
        if self.proposer is not None:
            await self._begin_writing(scope, self.proposer, address, ingested_lsn)
        assert self._admission is not None
        self._admission.set(Door.OPEN)
        self._keeper.started(process.pid)
        if spec.certificate is not None and pair is not None:
            following = follow_files(spec.certificate, pair, spec.places.run_dir, process.reload)
            scope.start("certificate", following)
        self._tell_access(address)
        self._begin("")
        self._on_started()
        self._watch_use(scope, process, address)
        if self.replica is not None:
            scope.start("replica", self._end_outdated(self.replica, process))
        beside = self._keep_cache(scope, self.arena, address)
        status = await process.wait_exit()
        for task in beside:
            task.cancel()
        if status == 0 and self.proposer is not None and self.backpressure is not None:
            await self._ended_cleanly(self.proposer, self.backpressure, self.arena)
        elif status != 0 and self._stopping:
            log.warning("postgres did not stop cleanly: the next start is cold", ended=describe_exit(status))
        return Ended(time.monotonic(), self._outdated or f"postgres {describe_exit(status)}")

    async def _begin_primary(self, scope: TaskScope, clock: "_StepClock") -> Lsn:
        """The election; where WAL ends, and so where it goes on from."""
        spec = self._spec
        token = self._tokens().write_wal
        if token is None:
            raise RefusedError("a primary needs a token that writes WAL, and was given none")
        self.proposer = Proposer(
            tenant_id=spec.tenant_id, timeline_id=spec.timeline_id, safekeepers=spec.safekeepers, token=token
        )
        self._begin(ELECTION)
        looking = scope.start("directory", asyncio.to_thread(self._directory.look))
        served = self._begin_asking(scope)
        election = await self.proposer.elect()
        end_lsn = election.start_lsn
        self._slots.keeper.begin(election.term)
        clock.step("election")
        await looking
        self.decided = await asyncio.to_thread(self._directory.decide, QuorumEnd(end_lsn, election.writer))
        if isinstance(self.decided, Warm) and served is not None:
            await served
        return end_lsn

    async def _begin_standby(self, scope: TaskScope, clock: "_StepClock") -> Lsn:
        """Where one that only reads begins; from there on it may read. There is no directory."""
        spec = self._spec
        await asyncio.to_thread(self._directory.begin_anew)
        if spec.mode == "static":
            assert spec.static_lsn is not None
            lsn = spec.static_lsn
            held = partial(Lsn, lsn)
        else:
            self.replica = Replica(spec, lambda: self._tokens().read_wal)
            self._begin("the branch's WAL to say where a replica can begin")
            lsn = (await self.replica.find_start()).begin.lsn
            held = partial(_needed_lsn, self.replica)
            clock.step("place")
        if spec.pageserver_http_address:
            self._begin(f"the pageserver to keep {format_lsn(lsn)}")
            try:
                await self._hold_history(scope, held)
            except LeaseRefusedError as error:
                if self.replica is None:
                    raise
                raise NoStandbyStartError(
                    f"the last place where a replica can begin is no longer kept, its primary makes another "
                    f"within 15 s of its next change: {error}"
                ) from error
        return lsn

    async def _end_outdated(self, replica: Replica, process: PostgresProcess) -> None:
        self._outdated = await replica.wait_outdated()
        log.warning("the replica begins anew", reason=self._outdated)
        await process.stop()

    async def _begin_writing(
        self, scope: TaskScope, proposer: Proposer, address: PostgresAddress, ingested_lsn: Lsn
    ) -> None:
        """From here on the quorum gets PostgreSQL's WAL."""
        assert self.arena is not None
        scope.start("proposer", proposer.stream(address))
        self.backpressure = self._make_backpressure(proposer, self.arena, ingested_lsn)
        scope.start("backpressure", self.backpressure.run())
        if self._may_count_again():
            await leave_start_lsn(address)
        if self._replaced is not None:
            await put_back(self._replaced, address)
        await self._open_gate(address)

    def _tell_access(self, address: PostgresAddress) -> None:
        """To commands on this machine."""
        access = LocalAccess(
            socket_dir=address.socket_dir,
            port=address.port,
            superuser=address.user,
            pg_version=address.pg_version,
            has_tls=self._spec.certificate is not None,
        )
        write_local_access(self._spec.places.local_access, access)

    async def _ended_cleanly(self, proposer: Proposer, backpressure: Backpressure, arena: Arena) -> None:
        """What a quorum has now decides whether the directory stays, and is the state that is saved."""
        end = CleanEnd(proposer.commit_lsn, proposer.last_writer, backpressure.ingested_lsn, False)
        self._clean_end = end
        if self._stopping:
            self._clean_end = end._replace(saved_unlogged=True)  # until it is known
            hot_blocks = await finish_in_thread(self._hot.close, arena)
            data_dir = self._spec.places.data_dir
            is_there = await self._states.save(data_dir, arena, proposer.commit_lsn, hot_blocks)
            self._clean_end = end._replace(saved_unlogged=is_there)

    def _watch_use(self, scope: TaskScope, process: PostgresProcess, address: PostgresAddress) -> None:
        assert self._admission is not None
        serving = Serving(process.pid, self._admission, partial(look_at_server, address))
        scope.supervise("idle watch", partial(self._idle.run, serving))
        if self.proposer is not None:
            scope.supervise("slots", self._slots.watching(self._spec, self.proposer, address))

    def _keep_cache(
        self, scope: TaskScope, arena: Arena, address: PostgresAddress
    ) -> list[asyncio.Task[None]]:
        """What is used most comes in; within its bound, if this postgres began with one."""
        hot = [] if self.proposer is None else [scope.supervise("hot blocks", partial(self._hot.run, arena))]
        if not arena.evicts:
            return hot
        backpressure = self.backpressure
        keeper = CacheKeeper(
            self._spec.cache,
            arena,
            self._spec.places.arena,
            ingested_lsn=None if backpressure is None else lambda: backpressure.ingested_lsn,
            ask=None if backpressure is None else partial(ask_horizon, address),
            clock=SystemClock(),
        )
        return [*hot, scope.supervise("cache", keeper.run)]

    async def _lay_directory(
        self, scope: TaskScope, end_lsn: Lsn, pair: CertificatePair | None, clock: "_StepClock"
    ) -> Lsn:
        """How far the pageserver has surely ingested. What was fetched, megabytes, is let go of again."""
        if isinstance(self.decided, Warm):
            record = self.decided.record
            prepared = await asyncio.to_thread(
                prepare_kept, self._spec, record, self._list(), token=self._tokens().read_pages, pair=pair
            )
            self.arena, self._options, self._superusers, _ = prepared
            return record.ingested_lsn
        self._begin(f"the pageserver to have WAL up to {format_lsn(end_lsn)} and send a basebackup")
        fetching = taking = None
        if not self._spec.is_standby:
            fetching = scope.start("saved state", self._states.fetch(end_lsn))
            taking = scope.start("kept slots", self._slots.keeper.take_over())
        spec, token = self._spec, self._tokens().read_pages
        backup = await fetch_awaited(
            spec.pageserver_address, spec.tenant_id, spec.timeline_id, token, end_lsn
        )
        saved = None if fetching is None else await fetching
        self._hot.is_cold, self._hot.saved = True, b"" if saved is None else saved[1].hot_blocks
        kept = None if taking is None else await taking
        clock.step("basebackup")
        resumption = await asyncio.to_thread(self._states.resume, saved, backup)
        slots = None
        if kept is not None:
            self._begin("the WAL that replication slots need")
            slots = await self._slots.fetch(self._spec, kept, backup, resumption, self._tokens)
            clock.step("slots")
        await asyncio.to_thread(self._lay, backup, pair, resumption, slots)
        return Lsn(backup.lsn)

    def _begin_asking(self, scope: TaskScope) -> asyncio.Task[None] | None:
        """Beside the election, during which there is nothing to do; None for a start that is surely cold."""
        if not self._spec.places.shutdown_record.exists():
            return None
        return scope.start("served", self._check_served())

    async def _check_served(self) -> None:
        """A start without a basebackup asks nothing else of the pageserver, which may be away for now.

        Raises what the pageserver answers with when it does not serve the branch: it is gone, or damaged.
        """
        spec = self._spec
        token = self._tokens().read_pages
        client = PositionClient(spec.pageserver_address, spec.tenant_id, spec.timeline_id, token)
        try:
            async with asyncio.timeout(SERVED_TIMEOUT_S):
                await client.position()
        except (RetryableError, TimeoutError) as error:
            log.warning("the pageserver does not say whether it serves the branch", error=error)
        finally:
            client.close()

    def _lay(
        self,
        backup: Basebackup,
        pair: CertificatePair | None,
        resumption: Resumption | None,
        slots: SlotWal | None,
    ) -> None:
        settings, token = self._list(), self._tokens().read_pages
        replica = None if self.replica is None else self.replica.begun(backup)
        prepared = prepare_new(
            self._spec,
            backup,
            settings,
            token=token,
            pair=pair,
            resumption=resumption,
            replica=replica,
            slots=slots,
        )
        self.arena, self._options, self._superusers, self._replaced = prepared

    def _list(self) -> dict[str, str]:
        """The endpoint's own list of settings, with which postgres is about to start."""
        self._settings = check_rules(self._keeper.starting())
        return self._settings

    def _first_door(self) -> Door:
        is_held = self._may_count_again() or bool(self._replaced and self._replaced.chunks)
        return Door.STARTING if is_held else Door.OPEN

    def _may_count_again(self) -> bool:
        """Whether unlogged rows that were saved where this start begins would come back after a crash."""
        match self.decided:
            case Warm(record):
                return record.saved_unlogged
            case Cold():
                return self._states.may_count_again
        return False  # a static endpoint writes nothing

    async def _open_gate(self, address: PostgresAddress) -> None:
        """Lets subscriptions be applied, as soon as none is enabled that the branch only inherited."""
        quieting_id = self._spec.outside_work.quieting_id
        if quieting_id is None:
            return
        if await disable_inherited_subscriptions(address, quieting_id):
            log.info("inherited subscriptions are disabled", quieting_id=quieting_id)
        # PostgreSQL's user must be able to read it: a base backup reads every file that is there.
        write_private(self._spec.places.data_dir / GATE, b"")

    async def _wait_ready(self, process: PostgresProcess) -> None:
        """Raises `ConfigurationFaultError` when a setting is what keeps it from starting."""
        try:
            await process.wait_ready()
        except PostgresStartError as error:
            self._states.start_ended(str(error))
            fault = configuration_fault(process.log_lines(), self._settings)
            if fault is not None:
                raise ConfigurationFaultError(fault) from error
            raise
        self._states.start_ended(None)

    def _make_backpressure(self, proposer: Proposer, arena: Arena, start_lsn: Lsn) -> Backpressure:
        spec = self._spec
        return Backpressure(
            lag_bytes_max=spec.lag_bytes_max,
            start_lsn=start_lsn,
            proposer=proposer,
            arena=arena,
            connect=lambda: PositionClient(
                arena.settings.pageserver_address, spec.tenant_id, spec.timeline_id, arena.settings.token
            ),
            clock=SystemClock(),
        )

    async def _hold_history(self, scope: TaskScope, lsn: Callable[[], Lsn]) -> None:
        """Until the attempt ends. Raises `LeaseRefusedError`."""
        spec = self._spec
        lease = LsnLease(
            LeasedMoment(
                spec.pageserver_http_address,
                spec.tenant_id,
                spec.timeline_id,
                lambda: self._tokens().read_pages,
                lsn,
                spec.mode == "replica",
                spec.lease_holder,
            )
        )
        await lease.acquire()
        if spec.mode == "replica":
            self._lease = lease
        scope.start("lsn lease", lease.run())

    def _start_postgres(self) -> PostgresProcess:
        spec = self._spec
        if self.proposer is not None and self.arena is not None:  # what leaves it is bound by this
            self.arena.set_quorum(self.proposer.commit_lsn)
            self.proposer.board = self.arena
        self._admission = Admission.make(spec.places.run_dir, self._first_door())
        self._hot.forget_buffers()
        environment = spec.build.whole_environment(
            preload_environment(spec.places.arena) | {"LC_ALL": "C.UTF-8"}
        )
        return PostgresProcess.start(
            spec.build.postgres,
            spec.places.data_dir,
            environment,
            spec.places.postgres_log,
            self._options
            + access_arguments(
                host=spec.host,
                port=spec.port,
                socket_dir=str(spec.places.socket_dir),
                data_dir=str(spec.places.data_dir),
                certificate=None if spec.certificate is None else installed_files(spec.places.run_dir),
            ),
        )

    async def _clean_up(self) -> None:
        """Kills what runs in the directory; unless it was closed cleanly, it goes (H2, H3).

        What the system refuses is left to the next start, which does all of it before anything else: a
        directory without a record is used by nobody.
        """
        self._keeper.ended()
        is_dead = False
        try:
            await self._end_postgres()
            is_dead = True
        except (ExcimerError, OSError) as error:
            log.error("what runs in the data directory cannot be ended; the next start tries", error=error)
        if self.proposer is not None:
            self.proposer.close()
            self.proposer.board = None
        if self._lease is not None:
            await self._lease.release()
        if self._admission is not None:
            self._admission.close()
        if self.arena is not None:
            self.arena.set_token("")  # it may stay, and nobody needs this any more
            self.arena.close()
            self.arena = None
        if is_dead:
            await self._finish_directory()

    async def _finish_directory(self) -> None:
        try:
            await asyncio.to_thread(
                self._directory.finish, self._clean_end, self._superusers, never_began=self._never_began()
            )
        except OSError as error:
            log.error("the data directory is not closed; the next start removes it", error=error)

    def _never_began(self) -> bool:
        """Postgres was not started, or has refused to start, or was told to stop before it had."""
        if self._process is None:
            return not self._is_launched
        return self._process.exit_status in EXITS_OF_NO_START

    async def _end_postgres(self) -> None:
        if self._process is not None:
            await self._process.kill()
        places = self._spec.places
        places.local_access.unlink(missing_ok=True)
        await kill_left_behind(places.data_dir)


def _page_relay(spec: ComputeSpec) -> contextlib.AbstractAsyncContextManager[None]:
    """Through which postgres reads pages where services speak TLS; nothing where they do not."""
    if not has_tls():
        return contextlib.nullcontext()
    return relaying_pages(spec.places.page_socket, parse_address(spec.pageserver_address))


def _needed_lsn(replica: Replica) -> Lsn:
    return replica.needed_lsn


class _StepClock:
    """Milliseconds of each step of a start, for the log."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.steps_ms: dict[str, float] = {}

    def step(self, name: str) -> None:
        now = time.monotonic()
        self.steps_ms[f"{name}_ms"] = round((now - self._last) * 1000, 1)
        self._last = now
