"""A real service process for tests: started, killed, stopped, asked whether it is well."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from excimer.base.address import Address
from excimer.service.settings import Settings, save_settings
from tests.kit.ports import free_port

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10


class ServiceProcess:
    """One service; its ports and directories stay the same over restarts."""

    def __init__(self, service: str, directory: Path, public_pem: bytes) -> None:
        """`directory` is made for it; `service` is its package's name. The settings are the subclass's."""
        directory.mkdir(parents=True, exist_ok=True)
        self.service = service
        self.directory = directory
        self.data_dir = directory / "data"
        self.log = directory / "log"
        self.settings_path = directory / f"{service}.toml"
        self.public_key_path = directory / "public.pem"
        self.public_key_path.write_bytes(public_pem)
        self.http_address = Address("127.0.0.1", free_port())
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, settings: Settings) -> None:
        """In force from the next start on."""
        save_settings(self.settings_path, settings)

    def spawn(self) -> "subprocess.Popen[bytes]":
        """One more process with these settings, not waited for."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"excimer.{self.service}", str(self.settings_path)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=log,
                stderr=log,
            )

    def start(self, *, wait: bool = True) -> None:
        self.process = self.spawn()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Returns when it serves."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{self.http_address}/healthz").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{self.service} is not ready:\n{self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_TIMEOUT_S)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
