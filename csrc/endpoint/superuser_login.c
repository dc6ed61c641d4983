/*
 * An endpoint's manager connects as the bootstrap superuser, by a socket that only the installation's user may use, and
 * without it no commit would become durable. So that role always gets in there, as a superuser, whatever ALTER ROLE has
 * made of it (or of the cluster, before it was imported). Clients on the network do not: for them NOLOGIN counts.
 *
 * What a session may do is read from this backend's own cache of pg_authid, and there the row is changed, between the
 * authentication of the connection and the look at its rights. The table cannot be written so early, on a standby never,
 * and need not be: the row stays what its owner wanted. If an invalidation drops the cached row in between, the
 * connection is refused, and tried again.
 */
#include "endpoint.h"

#include <sys/socket.h>

#include "access/htup_details.h"
#include "catalog/pg_authid.h"
#include "utils/acl.h"
#include "utils/syscache.h"

/*
 * Only the first fields of Port are used, and what follows them may be left out: the headers of GSSAPI and OpenSSL,
 * which the build was made with, need not be on this machine.
 */
#undef ENABLE_GSS
#undef USE_OPENSSL
#undef USE_SSL
#include "libpq/auth.h"
#include "libpq/libpq-be.h"

static ClientAuthentication_hook_type authenticate_before = NULL;

static void let_in(int cache, Datum key)
{
    HeapTuple cached = SearchSysCache1(cache, key);
    Form_pg_authid row;

    if (!HeapTupleIsValid(cached))
        return;
    row = (Form_pg_authid) GETSTRUCT(cached);
    row->rolcanlogin = true;
    row->rolsuper = true;
    ReleaseSysCache(cached);
}

static void authenticate(Port *port, int status)
{
    if (authenticate_before != NULL)
        authenticate_before(port, status);
    if (status != STATUS_OK || port->raddr.addr.ss_family != AF_UNIX ||
        get_role_oid(port->user_name, true) != BOOTSTRAP_SUPERUSERID)
        return;
    let_in(AUTHNAME, PointerGetDatum(port->user_name));
    let_in(AUTHOID, ObjectIdGetDatum(BOOTSTRAP_SUPERUSERID));
}

void guard_superuser_login(void)
{
    authenticate_before = ClientAuthentication_hook;
    ClientAuthentication_hook = authenticate;
}
