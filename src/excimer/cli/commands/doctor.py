"""`excimer doctor`: what on this machine, or of this installation, would not work, and what to do."""

import datetime
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import typer

from excimer.base.address import parse_address
from excimer.base.errors import ExcimerError
from excimer.cli.commands.pg import WITHOUT_TLS
from excimer.cli.errors import EXIT_FAILED
from excimer.cli.installation import (
    CONFIG_NAME,
    Installation,
    Part,
    endpoint_part_name,
    is_free,
    load_installation,
)
from excimer.cli.local_processes import find_process, probe_health
from excimer.cli.service_silence import at_once
from excimer.cli.session import Session, session_of
from excimer.cli.supervision import supervisor_problem
from excimer.service.process_records import ProcessRecord

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()

FREE_SPACE_MIN_BYTES: Final = 2 << 30
OPEN_FILES_MIN: Final = 1024
CERTIFICATE_WARNING: Final = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Literal["ok", "warning", "problem"]
    detail: str


@app.command()
def doctor(context: typer.Context) -> None:
    """Check this machine and the installation; exit code 1 when there is a problem."""
    session = session_of(context)
    findings = list(examine(session))
    session.answer(
        {"findings": [asdict(finding) for finding in findings]}, lambda console: _show(console, findings)
    )
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def examine(session: Session) -> Iterator[Finding]:
    yield Finding("Python", "ok", sys.version.split()[0])
    for check in (
        _check_native,
        _check_nats,
        _check_compiler,
        _check_user,
        _check_confinement,
        _check_open_files,
    ):
        yield _guarded(check)
    yield from _check_builds()
    yield _check_space(session.directory)
    if not (session.directory / CONFIG_NAME).exists():
        yield Finding("installation", "ok", f"none in {session.directory}")
        return
    try:
        installation = load_installation(session.directory)
    except ExcimerError as error:
        yield Finding("installation", "problem", str(error))
        return
    yield _check_keys(installation)
    if installation.config.tls is not None:
        now = datetime.datetime.now(datetime.UTC)
        yield check_certificate(installation.config.tls.certificate, now)
        shown = installation.endpoint_tls
        if shown is not None and shown != installation.config.tls and shown.certificate.exists():
            yield check_certificate(
                shown.certificate,
                now,
                name="endpoints' certificate",
                harm="clients that check it refuse endpoints without their own",
            )
    yield _check_supervisor(installation)
    yield from _check_services(installation)
    yield from _check_endpoints(installation)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (ExcimerError, OSError, ImportError) as error:
        return Finding(check.__name__.removeprefix("_check_"), "problem", str(error))


def _check_native() -> Finding:
    import excimer

    directory = Path(excimer.__file__).parent / "_native"
    sources = sorted(path.stem for path in directory.glob("*.pyx"))
    built = {path.name.partition(".")[0] for path in directory.glob("*.so")}
    missing = [name for name in [*sources, "libhydrate"] if name not in built]
    if missing:
        return Finding("native parts", "problem", f"{', '.join(missing)} not built: run `make setup`")
    return Finding("native parts", "ok", f"{len(built)} built")


def _check_supervisor(installation: Installation) -> Finding:
    problem = supervisor_problem(installation)
    detail = "as it should be" if problem is None else problem
    return Finding("supervisor", "ok" if problem is None else "warning", detail)


def _check_nats() -> Finding:
    from excimer.broker.nats_config import find_nats_server

    return Finding("NATS server", "ok", str(find_nats_server()))


def _check_compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return Finding("C compiler", "warning", "none: needed for a PostgreSQL build that is new here")
    return Finding("C compiler", "ok", compiler)


def _check_user() -> Finding:
    from excimer.io.processes import unprivileged_user

    user = unprivileged_user()
    detail = "we are not root" if user is None else f"PostgreSQL runs as {user.name}, because we are root"
    return Finding("user", "ok", detail)


def _check_confinement() -> Finding:
    from excimer.io.confinement import Confinement, probe_confinement

    confinement = probe_confinement()
    if confinement is Confinement.NONE:
        return Finding(
            "redo workers",
            "warning",
            "nothing keeps them from files that their user can read: the kernel offers neither Landlock "
            "(5.13 or newer) nor user namespaces",
        )
    return Finding("redo workers", "ok", f"confined to their scratch directories by {confinement}")


def _check_open_files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES_MIN:
        return Finding("open files", "warning", f"at most {soft}: raise it with ulimit -n {OPEN_FILES_MIN}")
    return Finding("open files", "ok", f"at most {soft}")


def _check_builds() -> Iterator[Finding]:
    from excimer.postgres import SUPPORTED_VERSIONS, find_builds, remedy

    builds = find_builds()
    for version in reversed(SUPPORTED_VERSIONS):
        found = next((build for build in builds if build.version == version), None)
        if found is None:
            yield Finding(f"PostgreSQL {version}", "ok", f"not here; excimer pg install {version}")
        elif found.features.missing_libraries:
            lacks = ", ".join(found.features.missing_libraries)
            yield Finding(f"PostgreSQL {version}", "warning", f"cannot run here: needs {lacks}")
        elif not found.features.headers:
            yield Finding(
                f"PostgreSQL {version}", "warning", "no server headers: redo workers cannot be built"
            )
        else:
            lacks = ", ".join(found.features.lacks())
            said = f"{found.full_version}, {found.origin}" + (f"; lacks {lacks}" if lacks else "")
            if not found.features.tls:
                said += f"; without TLS: {WITHOUT_TLS}"
            helps = remedy(found)
            if helps is not None:
                said += f"; {helps}"
            yield Finding(f"PostgreSQL {version}", "ok", said)


def _check_space(directory: Path) -> Finding:
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Finding("state directory", "problem", f"{place} is not writable")
    if free < FREE_SPACE_MIN_BYTES:
        return Finding("state directory", "warning", f"only {free >> 20} MiB free at {place}")
    return Finding("state directory", "ok", f"{free >> 30} GiB free at {place}")


def _check_keys(installation: Installation) -> Finding:
    for name in ("private.pem", "public.pem", "admin.token"):
        path = installation.keys_dir / name
        if not path.exists():
            return Finding("keys", "problem", f"{path} is missing: restore it, or excimer init --force")
        if path.stat().st_mode & 0o077:
            return Finding("keys", "warning", f"{path} can be read by others: chmod 600 {path}")
    return Finding("keys", "ok", str(installation.keys_dir))


def check_certificate(
    path: Path,
    now: datetime.datetime,
    *,
    name: str = "certificate",
    harm: str = "services refuse each other",
) -> Finding:
    """By default the services': an installation's is made anew by `excimer start`, an operator's is not."""
    from excimer.cli.certificates import end_of_certificate

    end = end_of_certificate(path)
    if end is None:
        return Finding(name, "problem", f"{path} cannot be read as a PEM certificate")
    on = end.isoformat(timespec="seconds")
    if end <= now:
        return Finding(name, "problem", f"{path} expired on {on}: {harm}")
    if end - now <= CERTIFICATE_WARNING:
        left = (end - now).days
        return Finding(
            name,
            "warning",
            f"{path} expires on {on}, in {left} days: excimer start renews an installation's own, "
            "replace another in its place",
        )
    return Finding(name, "ok", f"{path}, until {on}")


def _check_endpoints(installation: Installation) -> Iterator[Finding]:
    """Those that run. Their settings say where to ask, whether or not a controller runs."""
    paths = sorted(installation.run_dir.glob(f"{endpoint_part_name('*')}.toml"))
    for findings in at_once(lambda path: list(_check_endpoint(installation, path)), paths):
        yield from findings


def _check_endpoint(installation: Installation, path: Path) -> Iterator[Finding]:
    settings = tomllib.loads(path.read_text())
    process = find_process(installation, path.stem, Path(settings["endpoint_dir"]))
    if process is not None:
        yield from _check_health(path.stem, settings["http_listen"], process.pid)


def _check_services(installation: Installation) -> Iterator[Finding]:
    """An installation that is stopped as a whole is well; one that lacks a part is not."""
    parts = installation.service_parts()
    processes = {part.name: find_process(installation, part.name, part.lock_dir) for part in parts}
    some_run = any(processes.values())
    for findings in at_once(
        lambda part: list(_check_part(part, processes[part.name], others_run=some_run)), parts
    ):
        yield from findings


def _check_part(part: Part, process: ProcessRecord | None, *, others_run: bool) -> Iterator[Finding]:
    if process is None:
        if not is_free(parse_address(part.http_address).port):
            yield Finding(part.name, "problem", f"does not run, and its port {part.http_address} is taken")
        elif others_run:
            detail = f"does not run, and others do: excimer logs {part.name}, then excimer start"
            yield Finding(part.name, "problem", detail)
        else:
            yield Finding(part.name, "ok", "does not run")
        return
    yield from _check_health(part.name, part.http_address, process.pid)


def _check_health(part: str, http_address: str, pid: int) -> Iterator[Finding]:
    status, warnings, facts = probe_health(http_address, pid)
    if status == 200:
        yield Finding(part, "ok", f"runs, process {pid}")
    else:
        said = f"says {status}" if status else "does not answer"
        yield Finding(part, "problem", f"process {pid} {said}: excimer logs {part}")
    for warning in warnings:
        yield Finding(part, "problem", warning)
    if limits := facts.get("resource_limits"):
        yield Finding("limits of endpoints", "ok", limits)


def _show(console: "Console", findings: list[Finding]) -> None:
    marks = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "problem": "[red]✗[/red]"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        console.print(f"{marks[finding.verdict]} {finding.check:<{width}} {finding.detail}", highlight=False)
