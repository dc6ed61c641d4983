"""Which tenants are attached here, and with which generation: one small file per tenant.

::

    DATA_DIR/tenants/TENANT.json    {"tenant_id": "…", "generation": 3}

Written whole and synced before the attachment counts. Calls block.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId
from excimer.pageserver.model import TenantRecord

_SUFFIX = ".json"


class DamagedTenantRecordError(CorruptionError):
    """A tenant's record cannot be read."""


class TenantRecords:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def read_all(self) -> list[TenantRecord]:
        """In the order of ids. Raises `DamagedTenantRecordError` that names the file."""
        return [self._read(path) for path in sorted(self._directory.glob(f"*{_SUFFIX}"))]

    def write(self, record: TenantRecord) -> None:
        """Durable on return; the old record stays until then."""
        path = self._path(record.tenant_id)
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        self._sync()

    def remove(self, tenant_id: TenantId) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(tenant_id).unlink()
        self._sync()

    def _path(self, tenant_id: TenantId) -> Path:
        return self._directory / f"{tenant_id}{_SUFFIX}"

    def _read(self, path: Path) -> TenantRecord:
        try:
            return msgspec.json.decode(path.read_bytes(), type=TenantRecord)
        except msgspec.DecodeError as error:
            raise DamagedTenantRecordError(f"{path} is not a tenant's record: {error}") from error

    def _sync(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
