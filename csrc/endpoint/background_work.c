/*
 * A new branch does not act on the outside by itself.
 *
 * Its catalogs are its parent's, so it has the parent's subscriptions and the parent's scheduled jobs. Two settings,
 * which only the compute's manager gives (on the command line, where no ALTER SYSTEM reaches them):
 *
 * excimer.subscriptions_wait: the launcher of logical replication waits before its first look at pg_subscription,
 *     until the manager has looked, disabled what is not this branch's own, and made the file that opens the gate. It
 *     lies in the data directory, which is thrown away (H2): at each start the gate is shut.
 * excimer.extension_workers: off, and background workers that extensions have registered (pg_cron's, say) are not
 *     started. What a session starts for itself is its own affair.
 */
#include "endpoint.h"

#include "access/xact.h"
#include "lib/ilist.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/bgworker_internals.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/guc.h"

#include <unistd.h>

/* Same as excimer.compute.outside_work.GATE. */
#define GATE "excimer_subscriptions_may_start"
#define GATE_POLL_MS 10

static bool subscriptions_wait = false;
static bool extension_workers = true;

void define_background_settings(void)
{
    DefineCustomBoolVariable("excimer.subscriptions_wait",
                             "Subscriptions are applied only when the compute's manager has looked at them.", NULL,
                             &subscriptions_wait, false, PGC_POSTMASTER, GUC_NOT_IN_SAMPLE, NULL, NULL, NULL);
    DefineCustomBoolVariable("excimer.extension_workers", "Background workers of extensions are started.", NULL,
                             &extension_workers, true, PGC_POSTMASTER, GUC_NOT_IN_SAMPLE, NULL, NULL, NULL);
}

static bool is_launcher(const BackgroundWorker *worker)
{
    return strcmp(worker->bgw_function_name, "ApplyLauncherMain") == 0;
}

/*
 * The launcher's first transaction is that of its start-up (InitPostgres), before it reads pg_subscription. Here it can
 * still be interrupted: the postmaster may want to stop.
 */
static void hold_launcher(XactEvent event, void *argument)
{
    (void) argument;
    if (event != XACT_EVENT_PRE_COMMIT || MyBgworkerEntry == NULL || !is_launcher(MyBgworkerEntry))
        return;
    while (access(GATE, F_OK) != 0) {
        (void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, GATE_POLL_MS, PG_WAIT_EXTENSION);
        ResetLatch(MyLatch);
        CHECK_FOR_INTERRUPTS();
    }
}

static bool is_of_extension(const RegisteredBgWorker *registered)
{
    if (strcmp(registered->rw_worker.bgw_library_name, "postgres") == 0)
        return false;
    ereport(LOG, (errmsg("background worker \"%s\" of %s is not started: this branch does not act on the outside",
                         registered->rw_worker.bgw_name, registered->rw_worker.bgw_library_name)));
    return true;
}

/* The postmaster has not given them slots in shared memory yet. */
static void forget_extension_workers(void)
{
#if PG_VERSION_NUM >= 180000
    dlist_mutable_iter at;

    dlist_foreach_modify(at, &BackgroundWorkerList)
    {
        if (is_of_extension(dlist_container(RegisteredBgWorker, rw_lnode, at.cur)))
            dlist_delete(at.cur);
    }
#else
    slist_mutable_iter at;

    slist_foreach_modify(at, &BackgroundWorkerList)
    {
        if (is_of_extension(slist_container(RegisteredBgWorker, rw_lnode, at.cur)))
            slist_delete_current(&at);
    }
#endif
}

void guard_background_work(void)
{
    if (subscriptions_wait)
        RegisterXactCallback(hold_launcher, NULL);
    if (!extension_workers)
        forget_extension_workers();
}
