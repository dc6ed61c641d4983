"""Object stores by URL, through obstore: a local directory, S3 and what speaks it, GCS, Azure.

::

    file:///var/lib/excimer/objects      s3://bucket/prefix      gs://bucket/prefix      az://container/prefix

Credentials and endpoints come from options (obstore's names, such as ``endpoint``, ``region``,
``access_key_id``), else from the usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_KEY``…), else from the machine's own identity.

A call tries again by itself after a 5xx answer or a broken connection, a few times with growing
pauses, and gives up after about `CallLimits.call_s`; a caller that wants to go on waits longer. Reading an
object in one call is for small ones; layers are read by ranges.

Not here: whether a store keeps its promises (`object_store_probe`).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar, cast
from urllib.parse import SplitResult, unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, LocalStore, MemoryStore, from_url

from excimer.base.errors import RefusedError
from excimer.io.object_store import (
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    ObjectStoreDeniedError,
    ObjectStoreError,
)
from excimer.io.object_store_options import (
    OptionError,
    check_endpoint,
    check_options,
    culprit,
    panics_are,
)

if TYPE_CHECKING:
    from obstore.store import S3Config

PART_SIZE_BYTES: Final = 8 * 1024 * 1024
PARTS_IN_FLIGHT_MAX: Final = 3
"""Of one upload: memory is bounded by this many parts."""
DELETE_BATCH_MAX: Final = 1000
RANGE_END_MAX: Final = 1 << 63

ENDPOINT_VARIABLES: Final = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    *("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL"),
)

METADATA_ADDRESS: Final = "169.254.169.254"
"""Whom obstore asks for credentials when nobody has given any."""
DENIALS: Final = (PermissionDeniedError, UnauthenticatedError, PermissionError)
DENIAL_CODES: Final = (
    *("NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("ContainerNotFound", "AuthenticationFailed", "AuthorizationFailure", "AuthenticationRequired"),
)
"""What stores answer to a listing; other requests' answers are told apart by obstore."""
_SERVER_ERROR: Final = re.compile(r"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_REQUEST_ID: Final = re.compile(r" ?RequestId:.*")
"""With which Azure ends its messages."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How long a call may take, and how often it is tried again by itself."""

    connect_s: float = 5.0
    request_s: float = 20.0
    """One request with its body, which is at most a part of an upload or a few MiB of a layer."""
    call_s: float = 20.0
    """No new try of the same call after so long."""
    retries_max: int = 4
    pause_s_first: float = 0.1
    pause_s_max: float = 3.0


class ObstoreObjectStore:
    """Any store that obstore reaches by URL. A local directory is synced to disk after each change."""

    def __init__(
        self, url: str, options: Mapping[str, str] | None = None, limits: CallLimits | None = None
    ) -> None:
        """Connects to nothing yet. Raises RefusedError for what is no URL of a store, or no option of it."""
        self.url = url
        given, limits = dict(options or {}), limits or CallLimits()
        try:
            parts = urlsplit(url)
            self._directory = _directory(parts) if parts.scheme == "file" else None
            check_options(given)
            for name in ENDPOINT_VARIABLES:
                if os.environ.get(name):
                    check_endpoint(f"the environment variable {name}", os.environ[name])
            with panics_are(OptionError):
                self._store = self._open(parts.scheme, given, limits)
        except (BaseError, OSError, ValueError) as error:
            named = isinstance(error, OptionError) and str(error).startswith("the option")
            which = "" if named else culprit(given, lambda fewer: self._open(parts.scheme, fewer, limits))
            raise RefusedError(f"the object store {url} cannot be opened: {which}{_reason(error)}") from error

    def put(self, name: str, data: bytes) -> None:
        def act() -> None:
            obstore.put(self._store, name, data, mode="create", use_multipart=False)
            self._sync(name)

        try:
            self._change(name, "written to", act)
        except AlreadyExistsError as error:
            raise ObjectExistsError(f"{name} exists already in {self.url}") from error

    def put_file(self, name: str, path: Path) -> None:
        def act() -> None:
            obstore.put(
                self._store,
                name,
                path,
                chunk_size=PART_SIZE_BYTES,
                max_concurrency=PARTS_IN_FLIGHT_MAX,
            )
            self._sync(name)

        size = path.stat().st_size  # also tells a missing file from a missing bucket
        self._change(name, "written to", act)
        if (arrived := self.size_bytes(name)) != size:
            raise ObjectStoreError(f"{name} has {arrived} bytes in {self.url} after {size} were written")

    def copy(self, source: str, target: str) -> None:
        def act() -> None:
            obstore.copy(self._store, source, target)
            self._sync(target)

        self._read(source, act)

    def get(self, name: str) -> bytes:
        def act() -> tuple[bytes, int]:
            answer = obstore.get(self._store, name)
            return bytes(answer.bytes()), answer.meta["size"]

        data, size = self._read(name, act)
        if len(data) != size:
            raise ObjectStoreError(f"{self.url} answered {len(data)} bytes of {name}, which has {size}")
        return data

    def get_range(self, name: str, start: int, end: int) -> bytes:
        if not 0 <= start <= end < RANGE_END_MAX:
            raise ValueError(f"bytes {start} to {end} are no range of an object")
        if start == end:  # a request that HTTP cannot express
            return b""
        data = self._read(name, lambda: bytes(obstore.get_range(self._store, name, start=start, end=end)))
        if len(data) != end - start:
            raise ObjectStoreError(f"{self.url} answered {len(data)} bytes of {name} for {end - start}")
        return data

    def size_bytes(self, name: str) -> int | None:
        try:
            return int(self._read(name, lambda: obstore.head(self._store, name)["size"]))
        except ObjectMissingError:
            return None

    def list(self, prefix: str) -> list[ObjectInfo]:
        what = f"{prefix or 'everything'} could not be listed in"
        try:
            with panics_are(ObjectStoreError):
                pages = obstore.list(self._store, prefix=prefix or None)
                found = [ObjectInfo(meta["path"], meta["size"]) for page in pages for meta in page]
        except FileNotFoundError as error:
            if self._directory is None:
                self._fail(error, what)
            return []
        except (BaseError, OSError) as error:
            self._fail(error, what)
        return sorted(found)

    def delete(self, name: str) -> None:
        try:
            with panics_are(ObjectStoreError):
                obstore.delete(self._store, name)
        except FileNotFoundError:
            return
        except TypeError as error:  # what obstore says to a list with a name that cannot be
            raise RefusedError(f"{name!r} cannot be the name of an object") from error
        except (BaseError, OSError, ValueError) as error:
            self._fail(error, f"{name} could not be deleted from")

    def delete_many(self, names: Sequence[str]) -> None:
        if self._directory is not None:
            for name in names:
                self.delete(name)
            return
        for start in range(0, len(names), DELETE_BATCH_MAX):
            batch = list(names[start : start + DELETE_BATCH_MAX])
            try:
                with panics_are(ObjectStoreError):
                    obstore.delete(self._store, batch)
            except FileNotFoundError:  # some stores mind, and then have not done the rest
                for name in batch:
                    self.delete(name)
            except (BaseError, OSError) as error:
                self._fail(error, f"{len(batch)} objects could not be deleted from")

    def _open(self, scheme: str, options: dict[str, str], limits: CallLimits) -> "obstore.store.ObjectStore":
        if self._directory is not None:
            if options:
                raise ValueError("a local directory has no options")
            self._directory.mkdir(parents=True, exist_ok=True)
            return LocalStore(self._directory)
        if scheme == "memory":
            return MemoryStore()
        store = from_url(
            self.url,
            config=cast("S3Config", options),  # or the like of another store: it is checked there
            client_options={
                "connect_timeout": timedelta(seconds=limits.connect_s),
                "timeout": timedelta(seconds=limits.request_s),
                "allow_http": _is_plain_http(options),
            },
            retry_config={
                "max_retries": limits.retries_max,
                "retry_timeout": timedelta(seconds=limits.call_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=limits.pause_s_first),
                    "max_backoff": timedelta(seconds=limits.pause_s_max),
                    "base": 2,
                },
            },
        )
        if isinstance(store, HTTPStore):
            raise ValueError("a web server cannot create an object only if it is absent")
        return store

    def _change(self, name: str, what: str, act: Callable[[], None]) -> None:
        try:
            with panics_are(ObjectStoreError):
                act()
        except AlreadyExistsError:
            raise
        except (BaseError, OSError, ValueError) as error:
            self._fail(error, f"{name} could not be {what}")

    def _read(self, name: str, act: Callable[[], _Result]) -> _Result:
        try:
            with panics_are(ObjectStoreError):
                return act()
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{name} is not in {self.url}") from error
        except (BaseError, OSError, ValueError) as error:
            self._fail(error, f"{name} could not be read from")

    def _fail(self, error: Exception, what: str) -> NoReturn:
        """Raises `ObjectStoreError` of the right kind. Where a name may be new, not found means no bucket."""
        reason = _reason(error)
        message = f"{what} {self.url}: {reason}"
        if isinstance(error, ValueError):  # before anything was asked: "//", "..", a line break
            raise RefusedError(message) from error
        if METADATA_ADDRESS in reason:
            raise ObjectStoreDeniedError(f"{message}; there are no credentials in the environment") from error
        is_bucket = isinstance(error, FileNotFoundError) and self._directory is None
        if is_bucket or isinstance(error, DENIALS) or any(code in reason for code in DENIAL_CODES):
            raise ObjectStoreDeniedError(message) from error
        raise ObjectStoreError(message) from error

    def _sync(self, name: str) -> None:
        """Makes the file and the directories that lead to it durable (obstore renames but does not sync)."""
        if self._directory is None:
            return
        path = self._directory / name
        for place in (path, *path.parents):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if place == self._directory:
                return


def _directory(parts: SplitResult) -> Path:
    """Raises ValueError for a relative one, which would depend on where the process stands."""
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise ValueError("a directory is written file:///absolute/path")
    return Path(path)


def _is_plain_http(options: Mapping[str, str]) -> bool:
    """Whether somebody has asked for an endpoint without TLS."""
    said = [*options.values(), *(os.environ.get(name, "") for name in ENDPOINT_VARIABLES)]
    return any(value.startswith("http://") for value in said)


def _reason(error: Exception) -> str:
    """One line of what obstore says: the server's own code and message if it sent any, else obstore's first
    paragraph, which it follows with its internals.
    """
    first = re.sub(r"\s+", " ", str(error).partition("\n\nDebug")[0]).strip()
    said = _SERVER_ERROR.search(first)
    if said:
        message = _REQUEST_ID.sub("", said[2])
        return f"{said[1]}: {message}" if message else said[1]
    return first or type(error).__name__
