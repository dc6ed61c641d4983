/*
 * Takes over `postgres --single`, loaded by LD_PRELOAD, and serves requests until its input ends.
 *
 * PostgreSQL calls shmem_startup_hook when shared memory is there and nothing else has happened. The hook
 * never returns: recovery does not start, no catalog is read. Shared state still says that recovery is
 * going on, and so the buffer manager flushes no WAL and trusts cached sizes.
 *
 * Preloaded rather than named in shared_preload_libraries, which 14 ignores in single-user mode.
 */
#include "redo.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/shm.h>
#include <unistd.h>

#if PG_VERSION_NUM >= 150000
#include "access/xlogrecovery.h"
#endif
#include "miscadmin.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/pg_shmem.h"
#include "storage/proc.h"
#include "storage/sync.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#define EXIT_OUT_OF_STEP 5

static MemoryContext request_context;
static emit_log_hook_type next_log_hook;
static bool serving;
static uint64 request_count, error_count;

/*
 * Turns PANIC and FATAL into an error answer. Redo raises PANIC for a record that does not fit its page,
 * and every error inside a critical section is one; nothing here is durable, so there is nothing to protect
 * by dying. The host replaces the worker after any error all the same.
 */
static void
log_hook(ErrorData *error)
{
    if (error->elevel >= FATAL && serving && PG_exception_stack != NULL)
    {
        error->elevel = ERROR;
        siglongjmp(*PG_exception_stack, 1);
    }
    if (next_log_hook != NULL)
        next_log_hook(error);
}

/* The module is compiled for one major version; another server's structures would differ. */
static void
check_server_version(void)
{
    int server = atoi(GetConfigOption("server_version_num", false, false));

    if (server / 10000 != PG_VERSION_NUM / 10000)
        elog(FATAL, "the redo worker was compiled for PostgreSQL %d, not %d", PG_VERSION_NUM / 10000, server / 10000);
}

/* What single-user mode would do next, without connecting to a database. */
static void
initialize_process(void)
{
    SetProcessingMode(InitProcessing);
    InitProcess();
#if PG_VERSION_NUM >= 150000
    BaseInit();
#else
    /* In 14 BaseInit itself has called us: the rest of what it does. */
    InitFileAccess();
    InitSync();
    smgrinit();
    InitBufferPoolAccess();
#endif
    CreateAuxProcessResourceOwner();
    InRecovery = true;
    SetProcessingMode(NormalProcessing);
#if PG_VERSION_NUM >= 150000
    RmgrStartup();
#else
    for (int rmid = 0; rmid <= RM_MAX_ID; rmid++)
        if (RmgrTable[rmid].rm_startup != NULL)
            RmgrTable[rmid].rm_startup();
#endif
}

/* The System V segment would outlive a killed worker; removed now, it goes with its last process. */
static void
remove_shared_memory_name(void)
{
    int id = shmget((key_t) UsedShmemSegID, 0, 0);

    if (id >= 0)
        shmctl(id, IPC_RMID, NULL);
}

static void
answer_statistics(void)
{
    char text[256];
    int size = snprintf(text, sizeof text,
                        "requests=" UINT64_FORMAT " records=" UINT64_FORMAT " errors=" UINT64_FORMAT
                        " memory_bytes=%zu version=%d",
                        request_count, replay_record_count(), error_count,
                        (size_t) MemoryContextMemAllocated(TopMemoryContext, true), PG_VERSION_NUM);

    protocol_answer(ANSWER_PAGE, text, size);
}

/* The greeting says what of the sandbox is in force; the host decides whether that is enough. */
static void
lock_in_and_greet(void)
{
    Sandbox sandbox;
    char text[64];
    int size;

    sandbox_enter(&sandbox);
    size = snprintf(text, sizeof text, "landlock=%d own_root=%d filtered=%d", sandbox.landlock_version,
                    sandbox.has_own_root, sandbox.is_filtered);
    protocol_answer(ANSWER_READY, text, size);
    protocol_flush();
}

static void
serve_one(void)
{
    RequestHead head;
    char *body;

    memcpy(&head, protocol_read(sizeof head), sizeof head);
    if (head.length > REQUEST_SIZE_MAX || head.length % 8 != 0)
        _exit(EXIT_OUT_OF_STEP); /* where the next request begins is anyone's guess */
    body = protocol_read(head.length);
    position->request = ++request_count;
    position->record_lsn = 0;
    MemoryContextSwitchTo(request_context);
    switch (head.op)
    {
        case 'R':
            replay_page(body, head.length);
            break;
        case 'M':
            replay_mask(body, head.length);
            break;
        case 'S':
            answer_statistics();
            break;
        default:
            elog(ERROR, "unknown request %u", head.op);
    }
    MemoryContextReset(request_context);
}

/* Answers with the error, and puts things in order as far as that can be done. */
static void
answer_error(void)
{
    ErrorData *error;
    char *text;

    error_context_stack = NULL;
    CritSectionCount = 0;
    HOLD_INTERRUPTS();
    MemoryContextSwitchTo(request_context);
    error = CopyErrorData();
    LWLockReleaseAll();
#if PG_VERSION_NUM < 160000
    AbortBufferIO();
#endif
    UnlockBuffers();
    ReleaseAuxProcessResources(false);
    FlushErrorState();
    QueryCancelHoldoffCount = 0;
    InterruptHoldoffCount = 0;
    if (position->record_lsn != 0)
        text = psprintf("record %X/%X (%s, info 0x%02X): %s", (uint32) (position->record_lsn >> 32),
                        (uint32) position->record_lsn,
                        RMGR_EXISTS(position->rmgr) ? RmgrTable[position->rmgr].rm_name : "unknown manager",
                        position->info, error->message);
    else
        text = error->message;
    protocol_answer(ANSWER_ERROR, text, strlen(text));
    scratch_forget_target();
    scratch_forget_other();
    error_count++;
    MemoryContextReset(request_context);
}

static void
take_over(void)
{
    sigjmp_buf recovery_point;

    check_server_version();
    remove_shared_memory_name();
    protocol_start();
    initialize_process();
    request_context = AllocSetContextCreate(TopMemoryContext, "redo request", ALLOCSET_DEFAULT_SIZES);
    scratch_create();
    replay_start();
    signal(SIGALRM, SIG_DFL); /* see REQUEST_SECONDS_MAX */
    next_log_hook = emit_log_hook;
    emit_log_hook = log_hook;
    lock_in_and_greet();

    if (sigsetjmp(recovery_point, 1) != 0)
        answer_error();
    PG_exception_stack = &recovery_point;
    serving = true;
    for (;;)
        serve_one();
}

__attribute__((constructor)) static void
install_hook(void)
{
    shmem_startup_hook = take_over;
}
