"""What the bootstrap superuser is called, as whom our own user connects.

The name is the branch's (an imported cluster may have any), so it is found anew at each start.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from excimer.base.address import Address
from excimer.base.keys import BLOCK_SIZE_BYTES, GLOBAL_TABLESPACE, Fork, KeyKind, parse_key
from excimer.pgformat.basebackup import Basebackup
from excimer.pgformat.relation_map import parse_relation_map
from excimer.pgformat.role_catalog import AUTHID_OID, bootstrap_superuser_names
from excimer.postgres.cluster import SUPERUSER
from excimer.service.logs import get_logger
from excimer.service.replication_client import connect_replication
from excimer.wire.pg_client import PostgresError, unlimited_session

GLOBAL_MAP_PATH = "global/pg_filenode.map"

log = get_logger(__name__)


def superuser_names(backup: Basebackup) -> list[str]:
    """What the bootstrap superuser may be called, the likeliest first; never empty."""
    names = _printable_names(_authid_pages(backup))
    if not names:
        log.warning("the bootstrap superuser's row is not in the basebackup", assumed=SUPERUSER)
    return names or [SUPERUSER]


def kept_superuser_names(data_dir: Path, known: Iterable[str]) -> list[str]:
    """The same of a directory that was shut down; `known`: as before, the likeliest first.

    Blocks that are not there are zeros, in which there is no row. Raises OSError, `RelationMapError`.
    """
    relation_map = parse_relation_map((data_dir / GLOBAL_MAP_PATH).read_bytes())
    content = (data_dir / "global" / str(relation_map[AUTHID_OID])).read_bytes()
    pages = [content[start : start + BLOCK_SIZE_BYTES] for start in range(0, len(content), BLOCK_SIZE_BYTES)]
    return list(dict.fromkeys([*_printable_names(pages), *known]))


def _printable_names(pages: Iterable[bytes]) -> list[str]:
    return [name for name in bootstrap_superuser_names(pages) if name.isprintable()]


def _authid_pages(backup: Basebackup) -> Iterable[bytes]:
    relation_map = next((content for path, content in backup.files if path == GLOBAL_MAP_PATH), None)
    if relation_map is None:
        return
    file_number = parse_relation_map(relation_map).get(AUTHID_OID)
    for page in backup.pages:
        fields = parse_key(page.key)
        is_ours = (fields.kind, fields.spc, fields.rel) == (
            KeyKind.RELATION_BLOCK,
            GLOBAL_TABLESPACE,
            file_number,
        )
        if is_ours and fields.fork == Fork.MAIN:
            yield page.page


async def find_superuser(names: Sequence[str], socket_dir: str, port: int, pg_version: int) -> str:
    """Of several names, the first that PostgreSQL lets connect; the first of all if it lets none."""
    if len(names) > 1:
        for name in names:
            try:
                client = await connect_replication(
                    Address(socket_dir, port),
                    user=name,
                    application_name="excimer",
                    parameters=unlimited_session(pg_version),
                )
            except PostgresError as error:
                log.info("not the bootstrap superuser", role=name, error=error)
                continue
            client.close()
            return name
    return names[0]
