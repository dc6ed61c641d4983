"""That a tenant exists: a marker object, from `create_tenant` until `delete_tenant`.

Its name says it all; what is in it is for people, and never read.

Not here: a tenant's timelines (`tenant`).
"""

from excimer.base.ids import TenantId
from excimer.io.object_store import ObjectExistsError, ObjectStore
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.manifest_store import tenant_prefix


def create_tenant(store: ObjectStore, tenant_id: TenantId) -> None:
    """Leaves the marker; creating a tenant that exists is fine. Blocks. Raises `ObjectStoreError`."""
    try:
        store.put(f"{tenant_prefix(tenant_id)}/tenant", b"excimer tenant 1\n")
    except ObjectExistsError:
        return


def delete_tenant(context: StorageContext, tenant_id: TenantId) -> None:
    """Removes all objects and local files of a tenant that nobody has attached, the marker last.

    Blocks. Raises `ObjectStoreError`, OSError; a later call goes on where it stopped.
    """
    prefix = tenant_prefix(tenant_id)
    for info in context.store.list(prefix):
        if info.name != f"{prefix}/tenant":
            context.store.delete(info.name)
    context.filesystem.remove_tree(context.local_dir / prefix)
    context.store.delete(f"{prefix}/tenant")
