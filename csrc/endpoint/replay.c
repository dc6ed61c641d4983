/*
 * A standby's absent blocks come as of what it has replayed. Only PostgreSQL knows how far that is, so libhydrate asks
 * here; its side, and why that LSN is the right one, is csrc/libhydrate/replay.c.
 */
#include "endpoint.h"

#if PG_VERSION_NUM >= 150000
#include "access/xlogrecovery.h"
#else
#include "access/xlog.h"
#endif
#include "miscadmin.h"

/* libhydrate's; absent where the module is loaded without it. */
extern void hydrate_follow_replay(uint64 (*lsn)(void), bool (*is_startup)(void)) __attribute__((weak));

/* 0 before recovery has begun. The postmaster replays nothing, and may not have its shared memory yet. */
static uint64 replayed_lsn(void)
{
    return IsUnderPostmaster ? GetXLogReplayRecPtr(NULL) : 0;
}

static bool is_startup(void)
{
    return MyBackendType == B_STARTUP;
}

void tell_replay(void)
{
    if (hydrate_follow_replay != NULL)
        hydrate_follow_replay(replayed_lsn, is_startup);
}
