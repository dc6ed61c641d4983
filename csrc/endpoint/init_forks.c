/*
 * The init fork of an unlogged index is in WAL, whoever wrote it.
 *
 * Recovery, and the page store, have of an unlogged relation what its init fork says. PostgreSQL's own access methods
 * log that fork's pages. Generic WAL logs nothing of an unlogged relation, its init fork included, so that bloom's (from
 * 16 on) is in no WAL and an endpoint's next cold start finds an index without pages. See
 * findings/unlogged-bloom-index-is-lost-at-recovery.sh.
 *
 * A page of WAL has an LSN. So before a transaction commits, pages without one in the init forks of what it created are
 * logged whole. CREATE INDEX and REINDEX CONCURRENTLY create the index in one transaction and its init fork in a later
 * one, which creates nothing else: in them, what was last created is looked at again.
 */
#include "endpoint.h"

#include "access/xact.h"
#include "access/xloginsert.h"
#include "catalog/storage.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/smgr.h"
#include "tcop/pquery.h"
#include "utils/memutils.h"
#include "utils/portal.h"

#if PG_VERSION_NUM < 160000
typedef RelFileNode RelFileLocator;
#endif
#if PG_VERSION_NUM < 170000
#define INVALID_PROC_NUMBER InvalidBackendId
#endif

static RelFileLocator *created = NULL;
static int created_count = 0;

static void log_page(RelFileLocator relation, BlockNumber block)
{
#if PG_VERSION_NUM >= 150000
    Buffer buffer = ReadBufferWithoutRelcache(relation, INIT_FORKNUM, block, RBM_NORMAL, NULL, true);
#else
    Buffer buffer = ReadBufferWithoutRelcache(relation, INIT_FORKNUM, block, RBM_NORMAL, NULL);
#endif

    LockBuffer(buffer, BUFFER_LOCK_EXCLUSIVE);
    if (PageGetLSN(BufferGetPage(buffer)) == InvalidXLogRecPtr) {
        START_CRIT_SECTION();
        MarkBufferDirty(buffer);
        (void) log_newpage_buffer(buffer, false);
        END_CRIT_SECTION();
    }
    UnlockReleaseBuffer(buffer);
}

static void log_init_fork(RelFileLocator relation)
{
    SMgrRelation storage = smgropen(relation, INVALID_PROC_NUMBER);
    BlockNumber blocks = smgrexists(storage, INIT_FORKNUM) ? smgrnblocks(storage, INIT_FORKNUM) : 0;

    for (BlockNumber block = 0; block < blocks; block++)
        log_page(relation, block);
}

static bool is_building(void)
{
    return ActivePortal != NULL &&
           (ActivePortal->commandTag == CMDTAG_CREATE_INDEX || ActivePortal->commandTag == CMDTAG_REINDEX);
}

static void remember_created(void)
{
    RelFileLocator *found;
    int count = smgrGetPendingDeletes(false, &found);

    if (count == 0 && is_building())
        return;
    if (created != NULL)
        pfree(created);
    created = NULL;
    created_count = 0;
    if (count > 0) {
        created = MemoryContextAlloc(TopMemoryContext, count * sizeof(RelFileLocator));
        memcpy(created, found, count * sizeof(RelFileLocator));
        created_count = count;
        pfree(found);
    }
}

static void before_commit(XactEvent event, void *argument)
{
    (void) argument;
    if (event != XACT_EVENT_PRE_COMMIT && event != XACT_EVENT_PRE_PREPARE)
        return;
    remember_created();
    for (int index = 0; index < created_count; index++)
        log_init_fork(created[index]);
}

void guard_init_forks(void)
{
    RegisterXactCallback(before_commit, NULL);
}
