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
 */
#include "endpoint.h"

#include "access/xact.h"
#include "replication/logicalworker.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"

static GucEnumCheckHook check_before = NULL;

static bool check_synchronous_commit(int *value, void **extra, GucSource source)
{
    if (IsLogicalWorker() && *value < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
        *value = SYNCHRONOUS_COMMIT_REMOTE_FLUSH;
    return check_before == NULL || check_before(value, extra, source);
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
}
