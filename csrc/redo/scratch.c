/*
 * Two scratch relations stand in for all relations of the world: redo reads and writes pages through the
 * buffer manager, which wants files below. The target holds the page that was asked for, under its own
 * block number; the other relation holds every other page that a record mentions.
 *
 * All blocks appear to exist: the files are sparse, and the cached size, which is trusted during recovery,
 * says the maximum. So a large block number costs no extension of a file.
 */
#include "redo.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "catalog/pg_tablespace_d.h"
#include "common/relpath.h"

/* Numbers far above what the scratch directory could hold by accident. */
#define SCRATCH_DATABASE 1
#define TARGET_NUMBER 4000000001u
#define OTHER_NUMBER 4000000002u

/*
 * A heap of 2^32 blocks has 9 segments of free space map and 2 of visibility map. Redo touches those
 * through the heap block's number, and since 18 a read past the end of a file is an error.
 */
static const int segments_of_fork[MAX_FORKNUM + 1] = {1, 9, 2, 1};

ScratchRelation scratch_target, scratch_other;

static void
create_sparse_segments(SMgrRelation smgr, ForkNumber fork)
{
    char first[MAXPGPATH];

    /* No strlcpy: a build that found one in its own libc does not declare it, and ours may have none. */
#if PG_VERSION_NUM >= 180000
    snprintf(first, sizeof first, "%s", relpath(SMGR_LOCATOR(smgr), fork).str);
#else
    char *allocated = relpath(SMGR_LOCATOR(smgr), fork);

    snprintf(first, sizeof first, "%s", allocated);
    pfree(allocated);
#endif
    for (int segment = 0; segment < segments_of_fork[fork]; segment++)
    {
        char path[MAXPGPATH + 16];
        int fd;

        if (segment == 0)
            snprintf(path, sizeof path, "%s", first);
        else
            snprintf(path, sizeof path, "%s.%d", first, segment);
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, (off_t) RELSEG_SIZE * BLCKSZ) != 0)
            elog(FATAL, "cannot create the scratch file %s: %m", path);
        close(fd);
    }
}

static void
create_relation(ScratchRelation *relation, Oid number)
{
    relation->locator = LOCATOR(DEFAULTTABLESPACE_OID, SCRATCH_DATABASE, number);
    relation->smgr = smgropen(relation->locator, NO_BACKEND);
    for (int fork = 0; fork <= MAX_FORKNUM; fork++)
    {
        /* Opens segment 0, so that redo's own smgrcreate finds it done. */
        smgrcreate(relation->smgr, fork, true);
        create_sparse_segments(relation->smgr, fork);
        relation->smgr->smgr_cached_nblocks[fork] = MaxBlockNumber;
    }
}

void
scratch_create(void)
{
    create_relation(&scratch_target, TARGET_NUMBER);
    create_relation(&scratch_other, OTHER_NUMBER);
}

/* NULL stores a page of zeros. */
void
scratch_store_target(ForkNumber fork, BlockNumber block, const char *page)
{
    Buffer buffer;

    /* Redo of a truncation would have lowered it. */
    for (int each = 0; each <= MAX_FORKNUM; each++)
        scratch_target.smgr->smgr_cached_nblocks[each] = MaxBlockNumber;
    buffer = READ_BUFFER(scratch_target.locator, fork, block, RBM_ZERO_AND_LOCK);
    if (page != NULL)
        memcpy(BufferGetPage(buffer), page, BLCKSZ);
    else
        memset(BufferGetPage(buffer), 0, BLCKSZ);
    MarkBufferDirty(buffer); /* or an eviction inside a long chain would lose it */
    UnlockReleaseBuffer(buffer); /* not kept pinned: redo takes cleanup locks */
}

/*
 * Puts an empty page whose LSN is the maximum where redo will look for a page that is not ours. Redo then
 * believes that the page has this change already, and leaves it alone, with a valid buffer in hand. A
 * missing block would not do: redo of BRIN asks the invalid buffer for its number, which is silent
 * corruption on 15 and a crash on 18. The buffer stays clean, so that evicting it writes nothing.
 */
void
scratch_preload_newer(const Locator *locator, ForkNumber fork, BlockNumber block)
{
    Buffer buffer = READ_BUFFER(*locator, fork, block, RBM_ZERO_AND_LOCK);
    Page page = BufferGetPage(buffer);

    if (PageGetLSN(page) != PG_UINT64_MAX)
    {
        PageInit(page, BLCKSZ, 0);
        PageSetLSN(page, PG_UINT64_MAX);
    }
    UnlockReleaseBuffer(buffer);
}

void
scratch_answer_target(ForkNumber fork, BlockNumber block)
{
    Buffer buffer = READ_BUFFER(scratch_target.locator, fork, block, RBM_NORMAL);

    protocol_answer(ANSWER_PAGE, BufferGetPage(buffer), BLCKSZ);
    ReleaseBuffer(buffer);
}

static void
forget(ScratchRelation *relation)
{
    /* At most three forks per call: up to 15 the callee has arrays of MAX_FORKNUM (3) elements. */
    static ForkNumber forks[] = {MAIN_FORKNUM, FSM_FORKNUM, VISIBILITYMAP_FORKNUM, INIT_FORKNUM};
    static BlockNumber from_the_start[3] = {0, 0, 0};

    DROP_BUFFERS(relation->smgr, forks, 3, from_the_start);
    DROP_BUFFERS(relation->smgr, forks + 3, 1, from_the_start);
}

void
scratch_forget_target(void)
{
    forget(&scratch_target);
}

void
scratch_forget_other(void)
{
    forget(&scratch_other);
}
