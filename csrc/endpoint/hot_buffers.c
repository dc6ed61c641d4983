/*
 * Which blocks are in shared buffers when PostgreSQL has been shut down, the most used first: with them the endpoint's next
 * start in an empty directory begins (excimer.compute.hot_collection).
 *
 * The postmaster is the last to go, with shared memory still there and nobody left who could change it, so no lock is taken
 * and nothing runs for it before. pg_prewarm's worker would be a process more, has no order, and is not in every build.
 *
 *     file: one entry after the other, 24 bytes each; a list that is cut short is a shorter list
 */
#include "endpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include "miscadmin.h"
#include "storage/buf_internals.h"
#include "storage/ipc.h"
#include "utils/guc.h"

/* Same as in excimer.compute.hot_collection. */
struct hot_buffer {
    uint32 space;
    uint32 database;
    uint32 relation;
    uint32 fork;
    uint32 block;
    uint32 usage;
};

#define ENTRIES_MAX 262144
#define ENTRIES_AT_ONCE 1024

static char *hot_buffers_file = NULL;
static shmem_startup_hook_type startup_before = NULL;

/* False: nothing is in it. */
static bool entry_of(int number, struct hot_buffer *entry)
{
    BufferDesc *buffer = GetBufferDescriptor(number);
    uint32 state = pg_atomic_read_u32(&buffer->state);

    if ((state & (BM_TAG_VALID | BM_VALID)) != (BM_TAG_VALID | BM_VALID))
        return false;
#if PG_VERSION_NUM >= 160000
    entry->space = buffer->tag.spcOid;
    entry->database = buffer->tag.dbOid;
    entry->relation = buffer->tag.relNumber;
#else
    entry->space = buffer->tag.rnode.spcNode;
    entry->database = buffer->tag.rnode.dbNode;
    entry->relation = buffer->tag.rnode.relNode;
#endif
    entry->fork = (uint32) buffer->tag.forkNum;
    entry->block = buffer->tag.blockNum;
    entry->usage = BUF_STATE_GET_USAGECOUNT(state);
    return true;
}

static bool write_entries(int file, const struct hot_buffer *entries, int count)
{
    ssize_t size = (ssize_t) (sizeof *entries * (size_t) count);

    return write(file, entries, (size_t) size) == size;
}

static void write_list(int file)
{
    struct hot_buffer entries[ENTRIES_AT_ONCE];
    int held = 0, written = 0;

    for (int usage = BM_MAX_USAGE_COUNT; usage >= 0; usage--)
        for (int number = 0; number < NBuffers && written + held < ENTRIES_MAX; number++) {
            if (!entry_of(number, &entries[held]) || entries[held].usage != (uint32) usage || ++held < ENTRIES_AT_ONCE)
                continue;
            if (!write_entries(file, entries, held))
                return;
            written += held;
            held = 0;
        }
    (void) write_entries(file, entries, held);
}

/* Of the postmaster only: its children forget it when they are forked. */
static void leave_list(int code, Datum argument)
{
    int file;

    (void) argument;
    if (code != 0 || IsUnderPostmaster)
        return;
    file = open(hot_buffers_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0)
        return;
    write_list(file);
    close(file);
}

static void shared_memory_is_there(void)
{
    if (startup_before != NULL)
        startup_before();
    if (!IsUnderPostmaster)
        on_shmem_exit(leave_list, (Datum) 0);
}

void keep_hot_buffers(void)
{
    DefineCustomStringVariable("excimer.hot_buffers_file", "Where a shutdown leaves which blocks are in shared buffers.",
                               NULL, &hot_buffers_file, "", PGC_POSTMASTER, GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE, NULL,
                               NULL, NULL);
    if (hot_buffers_file == NULL || hot_buffers_file[0] == '\0')
        return;
    startup_before = shmem_startup_hook;
    shmem_startup_hook = shared_memory_is_there;
}
