"""Makes ready what postgres is started on: its data directory, the arena beside it, its options.

A new directory is laid, or one that the last stop left is used as it is. What depends on the endpoint
(configuration, who may connect, certificates, where pages come from) is written at each start.

Not here: what a new directory must hold (`data_directory`), the arena's bytes (`arena`), whether one that was
kept may be used (`warm_start`).
"""

import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from excimer.base.address import Address
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.compute.admission import ADMISSION_NAME
from excimer.compute.arena import Arena, ArenaFile, ArenaSettings, build_arena
from excimer.compute.client_authentication import installation_users, render_hba, render_ident
from excimer.compute.data_directory import (
    NOTHING_CARRIED,
    plan_data_directory,
    write_data_directory,
    write_private,
)
from excimer.compute.kept_directory import CONTROL_FILE_NAME, DIRECTORY_ID_NAME, new_directory_id
from excimer.compute.outside_work import GATE, module_arguments, preloaded_libraries
from excimer.compute.postgres_settings import fixed_arguments, render_postgres_settings
from excimer.compute.replica_start import ReplicaStart
from excimer.compute.server_certificate import (
    CERTIFICATE_NAME,
    KEY_NAME,
    CertificatePair,
    install_pair,
    remove_pair,
)
from excimer.compute.slot_keeper import slot_arguments
from excimer.compute.slot_wal import ReplacedWal, SlotWal, lay_slot_wal
from excimer.compute.spec import ComputeSpec
from excimer.compute.state_resumption import Resumption
from excimer.compute.superuser_names import kept_superuser_names, superuser_names
from excimer.compute.wal_relay import connection_string
from excimer.compute.warm_start import ShutdownRecord
from excimer.pgformat.auto_conf import AUTO_CONF_NAME, AUTO_CONF_NEW_NAME, render_auto_conf
from excimer.pgformat.basebackup import Basebackup, origins_setting
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.replication_origins import ORIGINS_PATH, count_origins
from excimer.pgformat.standby_start import next_xid_or, raised_limits
from excimer.pgformat.wal_prefix import StandbyPoint, WalPrefix, build_wal_prefix
from excimer.postgres import extension_hint
from excimer.service.tls import has_tls

NOT_KEPT: Final = (
    GATE,
    AUTO_CONF_NEW_NAME,
    "postmaster.pid",
    "standby.signal",
    "recovery.signal",
    "backup_label",
)
"""What would make a start other than the one of a primary that was shut down, if somebody had left it."""
BESIDE: Final = (KEY_NAME, CERTIFICATE_NAME, ADMISSION_NAME)
"""What an older Excimer put into the directory, where base backups find it."""


class Prepared(NamedTuple):
    """A directory on which postgres can be started."""

    arena: Arena
    options: list[str]
    """Of the postgres program."""
    superusers: list[str]
    """What the bootstrap superuser may be called, the likeliest first."""
    replaced: ReplacedWal | None = None
    """What is to be put back once PostgreSQL has started."""


class History(NamedTuple):
    """What the branch's history says that configuration must respect."""

    control: ControlFile
    origin_count: int
    """Replication origins with progress."""
    superusers: list[str]


def prepare_new(
    spec: ComputeSpec,
    backup: Basebackup,
    settings: Mapping[str, str],
    *,
    token: str,
    pair: CertificatePair | None,
    resumption: Resumption | None = None,
    replica: ReplicaStart | None = None,
    slots: SlotWal | None = None,
) -> Prepared:
    """A directory that begins where `backup` does. `settings`: the endpoint's own list, `token`: reads pages.

    There must be none. With a `resumption` PostgreSQL starts as after a clean shutdown; a `replica` goes on
    to follow its primary; `slots` take the place of those that the resumption has.

    Raises `PostgresSettingError`, `UnsafePathError`, OSError.
    """
    control = ControlFile.unpack(backup.control_file, backup.pg_version)
    lsn = Lsn(backup.lsn)
    if resumption is None:
        carried, prefix = NOTHING_CARRIED, _recovery_prefix(spec, backup, control, replica)
    else:
        carried, prefix = resumption.carried, resumption.prefix
    if slots is not None:
        carried = carried.with_slots(slots.files)
    limits = control if replica is None else raised_limits(control, replica.begin.limits)
    history = History(limits, backup.origin_count, superuser_names(backup))
    directory_id = new_directory_id()
    options, configuration = _configure(spec, history, settings)
    configuration.append((DIRECTORY_ID_NAME, directory_id.hex().encode()))
    plan = plan_data_directory(
        backup, prefix, configuration, control.wal_segment_size, hot_standby=spec.is_standby, carried=carried
    )
    write_data_directory(spec.places.data_dir, plan, control.wal_segment_size)
    options += slot_arguments(spec.places.data_dir, backup.pg_version)
    replaced = None
    if slots is not None:
        made = prefix.chunks if resumption is None else []  # after a clean stop all WAL is the real one
        replaced = lay_slot_wal(spec.places.data_dir, slots, made, control.wal_segment_size)
    wal_start_lsn = lsn if resumption is None else resumption.wal_lsn
    if pair is not None:
        install_pair(pair, spec.places.run_dir)
    arena = build_arena(
        spec.places.arena,
        files=[ArenaFile(file.path, file.blocks) for file in plan.lazy_files],
        settings=_page_source(spec, token, not_modified_since=lsn),
        data_dir=spec.places.data_dir,
        wal_segment_size=control.wal_segment_size,
        wal_start_lsn=wal_start_lsn if slots is None else min(wal_start_lsn, slots.start_lsn),
        directory_id=directory_id,
        evicts=spec.cache.is_bounded and replica is None,
    )
    arena.place_pages(plan.inline_runs)
    return Prepared(arena, options, history.superusers, replaced)


def _recovery_prefix(
    spec: ComputeSpec, backup: Basebackup, control: ControlFile, replica: ReplicaStart | None
) -> WalPrefix:
    checkpoint, end_lsn = CheckPoint.unpack(backup.checkpoint), Lsn(backup.lsn)
    previous_lsn, standby = Lsn(backup.prev_lsn), StandbyPoint(end_lsn) if spec.is_standby else None
    if replica is not None:
        previous_lsn = replica.begin.previous_lsn
        standby = StandbyPoint(replica.end_lsn, next_xid_or(replica.begin.oldest_active_xid, checkpoint))
    return build_wal_prefix(
        pg_version=backup.pg_version,
        template=control,
        checkpoint=checkpoint,
        end_lsn=end_lsn,
        prev_lsn=previous_lsn,
        now_s=int(time.time()),
        standby=standby,
    )


def prepare_kept(
    spec: ComputeSpec,
    record: ShutdownRecord,
    settings: Mapping[str, str],
    *,
    token: str,
    pair: CertificatePair | None,
) -> Prepared:
    """The directory of `record`, which has been taken away. Absent blocks are those of its first start.

    PostgreSQL's own files stay as they are. Raises `PostgresSettingError`, CorruptionError, OSError.
    """
    data_dir, version = spec.places.data_dir, spec.build.version
    control = ControlFile.unpack((data_dir / CONTROL_FILE_NAME).read_bytes(), version)
    origins = (data_dir / ORIGINS_PATH).read_bytes() if (data_dir / ORIGINS_PATH).exists() else None
    superusers = kept_superuser_names(data_dir, record.superusers)
    history = History(control, 0 if origins is None else count_origins(origins), superusers)
    options, configuration = _configure(spec, history, settings)
    options += slot_arguments(data_dir, version)
    for name in (*NOT_KEPT, *BESIDE):
        (data_dir / name).unlink(missing_ok=True)
    for name, content in configuration:
        write_private(data_dir / name, content)
    if pair is None:
        remove_pair(spec.places.run_dir)
    else:
        install_pair(pair, spec.places.run_dir)
    arena = Arena.open(spec.places.arena)
    arena.renew(evicts=spec.cache.is_bounded)
    arena.change(_page_source(spec, token, not_modified_since=arena.settings.not_modified_since))
    return Prepared(arena, options, history.superusers)


def _configure(
    spec: ComputeSpec, history: History, settings: Mapping[str, str]
) -> tuple[list[str], list[tuple[str, bytes]]]:
    """Options of the postgres program, and the configuration files with their names."""
    control = history.control
    pg_version = spec.build.version
    is_standby = spec.is_standby
    origins = {origins_setting(pg_version): history.origin_count}
    options = fixed_arguments(control, settings, origins=origins, is_standby=is_standby)
    options += module_arguments(
        spec.module,
        preloaded_libraries(spec.build, settings),
        spec.outside_work,
        is_standby=is_standby,
        extension_hint=extension_hint(spec.build),
        admission_file=spec.places.run_dir / ADMISSION_NAME,
        hot_buffers_file=spec.places.hot_buffers,
    )
    if spec.mode == "replica":
        options += ["-c", f"primary_conninfo={connection_string(spec.places.socket_dir)}"]
    postgresql_conf = render_postgres_settings(
        pg_version=pg_version,
        control=control,
        origins=origins,
        is_standby=is_standby,
        is_replica=spec.mode == "replica",
        shared_buffers_mib=spec.shared_buffers_mib,
    )
    is_remote = not Address(spec.host, spec.port).is_loopback
    hba = render_hba(history.superusers, trusts_local=spec.trusts_local, is_remote=is_remote)
    files = [
        ("postgresql.conf", postgresql_conf),
        (AUTO_CONF_NAME, render_auto_conf(settings)),
        ("pg_hba.conf", hba),
        ("pg_ident.conf", render_ident(history.superusers, installation_users())),
    ]
    return options, [(name, text.encode()) for name, text in files]


def _page_source(spec: ComputeSpec, token: str, *, not_modified_since: Lsn) -> ArenaSettings:
    """Where absent blocks come from, as of when."""
    return ArenaSettings(
        pageserver_address=str(spec.places.page_socket) if has_tls() else spec.pageserver_address,
        tenant_id=spec.tenant_id,
        timeline_id=spec.timeline_id,
        token=token,
        lsn=not_modified_since if spec.is_standby else MAX_LSN,
        not_modified_since=not_modified_since,
    )
