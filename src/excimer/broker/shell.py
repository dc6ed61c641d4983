"""Runs the NATS server: starts it, forwards its log, watches its health, restarts it, stops it."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Never

from excimer.base.errors import RetryableError
from excimer.broker.nats_config import find_nats_server, metrics_of, nats_config, parse_log_line
from excimer.broker.settings import BrokerSettings
from excimer.io.private_files import write_private
from excimer.io.processes import die_with_parent
from excimer.service.disk_watch import DiskWatch
from excimer.service.health import Health
from excimer.service.http_client import HttpClient
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.listen import bind_listen
from excimer.service.logs import get_logger
from excimer.service.plain_metrics import render_plain
from excimer.service.settings import TlsSettings
from excimer.service.tasks import TaskScope
from excimer.service.tls import look_at_files

WATCH_INTERVAL_S: Final = 2.0
START_LIMIT_S: Final = 5.0
STOP_LIMIT_S: Final = 3.0

log = get_logger(__name__)


class NatsServerDiedError(RetryableError):
    """The NATS server ended by itself; it is started again."""


async def serve_broker(settings: BrokerSettings) -> None:
    """The broker's life, until cancelled."""
    with InstanceLock(settings.data_dir, "broker"):
        server = NatsServer(settings)
        server.stop_orphan()
        bind_listen(settings.listen, "broker listen").close()
        async with (
            serving_light_http(settings.http_listen, server.health, server.metrics),
            TaskScope() as scope,
        ):
            scope.supervise("disk", server.disk.run)
            await scope.supervise("nats-server", server.run)


class NatsServer:
    """The child process and what is known of it."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._config_path = settings.data_dir / "nats.conf"
        self._pid_path = settings.data_dir / "nats.pid"
        self._varz: Mapping[str, Any] = {}
        self._starts = 0
        self.health = Health("broker")
        self.disk = DiskWatch(self.health, [settings.data_dir])

    def metrics(self) -> bytes:
        return render_plain([*metrics_of(self._varz, max(0, self._starts - 1)), *self.disk.samples()])

    def stop_orphan(self) -> None:
        """Ends a NATS server left by a broker that was killed, if it is slow to follow it. Blocks.

        We hold the instance lock, so it is nobody else's.
        """
        try:
            pid = int(self._pid_path.read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if os.fsencode(self._config_path) not in arguments:
            return
        log.warning("stopping the NATS server of a broker that was killed", pid=pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        for _ in range(100):
            if not Path(f"/proc/{pid}/exe").exists():
                return
            time.sleep(0.02)

    async def run(self) -> None:
        """One life of the child. Raises `NatsServerDiedError` when it ends by itself."""
        monitor_port = free_port()
        self._write_config(monitor_port)
        self._starts += 1
        process = await asyncio.create_subprocess_exec(
            find_nats_server(),
            "-c",
            str(self._config_path),
            "-P",
            str(self._pid_path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        assert process.stderr is not None
        try:
            async with TaskScope() as scope:
                scope.start("nats-server log", _forward_log(process.stderr))
                scope.start("nats-server watch", self._watch(monitor_port))
                if self._settings.tls is not None:
                    scope.start("nats-server certificates", _reload_certificates(process, self._settings.tls))
                code = await process.wait()
                raise NatsServerDiedError(f"the NATS server ended with code {code}")
        finally:
            self.health.report("nats-server", "the NATS server is not running")
            self._varz = {}
            await _stop(process)

    def _write_config(self, monitor_port: int) -> None:
        write_private(self._config_path, nats_config(self._settings, monitor_port).encode())

    async def _watch(self, monitor_port: int) -> None:
        """Keeps health and figures current."""
        address = f"127.0.0.1:{monitor_port}"
        monitor = HttpClient("the NATS server", address, timeout_s=START_LIMIT_S, is_plain=True)
        while True:
            try:
                await monitor.get("/healthz")
                self._varz = await monitor.get("/varz")
            except RetryableError as error:
                self._varz = {}
                self.health.report("nats-server", str(error))
                await asyncio.sleep(0.02 if not self.health.ready else WATCH_INTERVAL_S / 4)
                continue
            if not self.health.ready:
                self.health.facts["nats_version"] = str(self._varz.get("version", ""))
                log.info("broker ready", listen=self._settings.listen)
            self.health.ready = True
            self.health.report("nats-server", None)
            await asyncio.sleep(WATCH_INTERVAL_S)


async def _reload_certificates(process: asyncio.subprocess.Process, tls: TlsSettings) -> Never:
    """Lets the server read its files when one was replaced; if they are of no use it keeps the old ones."""
    seen = look_at_files(tls)
    while True:
        await asyncio.sleep(WATCH_INTERVAL_S)
        found = look_at_files(tls)
        if found != seen:
            seen = found
            log.info("the NATS server loads its certificate anew")
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGHUP)


async def _forward_log(stream: asyncio.StreamReader) -> None:
    while line := await stream.readline():
        level, message = parse_log_line(line.decode("utf-8", "replace"))
        if message:
            getattr(log, level)("nats-server", message=message)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def free_port() -> int:
    """A port that is free now; whoever takes it in between makes the server's start fail and be repeated."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
