/*
 * Commits of logical replication workers wait for the quorum, whatever their subscription says.
 *
 * A subscription's synchronous_commit is off unless somebody asked for more, which is safe for a server with a disk:
 * the worker tells its publisher only what its own WAL has flushed, and the publisher keeps the rest. Here the local
 * flush means nothing (the directory is a cache), so the publisher would throw away what the safekeepers never had.
 * The worker tells what it has *committed*, so it is enough that its commits wait as all others do. The same holds for
 * the steps of a first copy of a table, which end with the removal of a slot on the publisher.
 *
 * Workers set the parameter themselves, with the priority of an override. Only its check hook comes after that.
 *
 * PostgreSQL breaks such a wait off when the worker is terminated or its postmaster dies, and takes the transaction as
 * committed. A client gets a warning, or no answer at all; a worker goes on to the next transaction and tells its
 * publisher of both, or its successor does, or its leader. So after each commit of a worker its wait goes on until the
 * quorum really has it, or the postmaster is dead, and the process with it. Who stops a postgres without a quorum waits
 * for its walsender all the same.
 */
#include "endpoint.h"

#include <unistd.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "replication/logicalworker.h"
#include "replication/syncrep.h"
#include "replication/walsender_private.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"

#define QUORUM_POLL_MS 10

static GucEnumCheckHook check_before = NULL;

static bool check_synchronous_commit(int *value, void **extra, GucSource source)
{
    if (IsLogicalWorker() && *value < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
        *value = SYNCHRONOUS_COMMIT_REMOTE_FLUSH;
    return check_before == NULL || check_before(value, extra, source);
}

static bool quorum_has(XLogRecPtr lsn)
{
    bool has;

    LWLockAcquire(SyncRepLock, LW_SHARED);
    has = WalSndCtl->lsn[SYNC_REP_WAIT_FLUSH] >= lsn;
    LWLockRelease(SyncRepLock);
    return has;
}

/*
 * The transaction is committed, so nothing can end it. That the postmaster is dead shows in ProcDiePending only, which
 * no interrupt check looks at by itself.
 */
static void wait_for_quorum(XLogRecPtr lsn)
{
    while (!quorum_has(lsn)) {
        if (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_POSTMASTER_DEATH, QUORUM_POLL_MS, PG_WAIT_EXTENSION) &
            WL_POSTMASTER_DEATH)
            _exit(1); /* nobody is left for whom shared memory would have to be in order */
        ResetLatch(MyLatch);
    }
}

static XLogRecPtr flushed_here(void)
{
#if PG_VERSION_NUM >= 150000
    return GetFlushRecPtr(NULL);
#else
    return GetFlushRecPtr();
#endif
}

static void wait_on(XactEvent event, void *argument)
{
    (void) argument;
    if (!IsLogicalWorker())
        return;
    if (event == XACT_EVENT_COMMIT)
        wait_for_quorum(XactLastCommitEnd);
    else if (event == XACT_EVENT_PREPARE)
        wait_for_quorum(flushed_here());
}

static struct config_generic *find_setting(const char *name)
{
#if PG_VERSION_NUM >= 160000
    return find_option(name, false, false, FATAL);
#else
    struct config_generic **settings = get_guc_variables();
    int count = GetNumConfigOptions();

    for (int index = 0; index < count; index++)
        if (strcmp(settings[index]->name, name) == 0)
            return settings[index];
    return NULL;
#endif
}

void guard_apply_commits(void)
{
    struct config_generic *setting = find_setting("synchronous_commit");
    struct config_enum *synchronous;

    if (setting == NULL || setting->vartype != PGC_ENUM)
        elog(FATAL, "excimer: synchronous_commit is not a setting of this PostgreSQL");
    synchronous = (struct config_enum *) setting;
    check_before = synchronous->check_hook;
    synchronous->check_hook = check_synchronous_commit;
    RegisterXactCallback(wait_on, NULL);
}
