/*
 * A background worker like a scheduler of jobs: it is there from the start, and does nothing until there is a job.
 * A job is a file "job" in the data directory; as long as it is there the worker is in a transaction.
 */
#define _GNU_SOURCE
#include "postgres.h"

#include <dlfcn.h>
#include <unistd.h>

#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/latch.h"

#pragma GCC visibility push(default)
PG_MODULE_MAGIC;
void _PG_init(void);
PGDLLEXPORT void job_worker_main(Datum argument);
#pragma GCC visibility pop

#define JOB "job"

static void doze(void)
{
    (void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 20, PG_WAIT_EXTENSION);
    ResetLatch(MyLatch);
    CHECK_FOR_INTERRUPTS();
}

void job_worker_main(Datum argument)
{
    (void) argument;
    BackgroundWorkerUnblockSignals();
    BackgroundWorkerInitializeConnection("postgres", NULL, 0);
    for (;;) {
        doze();
        if (access(JOB, F_OK) != 0)
            continue;
        StartTransactionCommand();
        while (access(JOB, F_OK) == 0)
            doze();
        CommitTransactionCommand();
    }
}

static const char *own_path(void)
{
    Dl_info info;

    return dladdr((void *) job_worker_main, &info) != 0 ? info.dli_fname : "job_worker";
}

void _PG_init(void)
{
    BackgroundWorker worker;

    memset(&worker, 0, sizeof(worker));
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = BGW_NEVER_RESTART;
    strcpy(worker.bgw_name, "job worker");
    strcpy(worker.bgw_type, "job worker");
    strlcpy(worker.bgw_library_name, own_path(), sizeof(worker.bgw_library_name));
    strcpy(worker.bgw_function_name, "job_worker_main");
    RegisterBackgroundWorker(&worker);
}
