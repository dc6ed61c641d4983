/*
 * One request: a base page and the records that change it, in order, give the page.
 *
 * PostgreSQL's own redo functions do the work. Before each record is applied, its block references are
 * rewritten: the page that was asked for goes to the target relation, all others to the other one.
 */
#include "redo.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "catalog/pg_control.h"
#include "port/pg_crc32c.h"
#include "utils/memutils.h"

/* The 1 MB of buffers must not fill up with other pages in the middle of a chain. */
#define RECORDS_BETWEEN_FORGETTING 16
#define POSITION_FILE "excimer_position"

Position *position;

static XLogReaderState *reader;
static bool other_touched;
static uint64 record_count;

#if PG_VERSION_NUM >= 150000
static char *decoded_space;
static size_t decoded_capacity;
#endif

void
replay_start(void)
{
    int fd = open(POSITION_FILE, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (fd < 0 || ftruncate(fd, sizeof(Position)) != 0)
        elog(FATAL, "cannot create %s: %m", POSITION_FILE);
    position = mmap(NULL, sizeof(Position), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (position == MAP_FAILED)
        elog(FATAL, "cannot map %s: %m", POSITION_FILE);
    close(fd);
    memset(position, 0, sizeof(Position));
    reader = XLogReaderAllocate(wal_segment_size, NULL, XL_ROUTINE(.page_read = NULL), NULL);
    if (reader == NULL)
        elog(FATAL, "out of memory");
}

uint64
replay_record_count(void)
{
    return record_count;
}

/* Only what changes pages: other records' redo would remove files or change shared state. */
static bool
changes_pages(const XLogRecord *record)
{
    uint8 info = record->xl_info & ~XLR_INFO_MASK;

    switch (record->xl_rmid)
    {
        case RM_XLOG_ID:
            return info == XLOG_FPI || info == XLOG_FPI_FOR_HINT;
        case RM_HEAP_ID:
        case RM_HEAP2_ID:
        case RM_BTREE_ID:
        case RM_HASH_ID:
        case RM_GIN_ID:
        case RM_GIST_ID:
        case RM_SEQ_ID:
        case RM_SPGIST_ID:
        case RM_BRIN_ID:
        case RM_GENERIC_ID:
            return true;
        default:
            return false;
    }
}

/* A record that was damaged on its way must never reach a page. */
static void
check_record(const XLogRecord *record, uint32 length)
{
    pg_crc32c crc;

    if (length < SizeOfXLogRecord || record->xl_tot_len != length)
        elog(ERROR, "the record's length is %u, but %u bytes were sent", record->xl_tot_len, length);
    INIT_CRC32C(crc);
    COMP_CRC32C(crc, (const char *) record + SizeOfXLogRecord, length - SizeOfXLogRecord);
    COMP_CRC32C(crc, (const char *) record, offsetof(XLogRecord, xl_crc));
    FIN_CRC32C(crc);
    if (!EQ_CRC32C(crc, record->xl_crc))
        elog(ERROR, "the record's checksum is wrong");
    if (!changes_pages(record))
        elog(ERROR, "a record of this kind changes no page");
}

/* Decodes into `reader`; answers its block references and how many there may be. */
static DecodedBkpBlock *
decode(XLogRecord *record, const RecordHead *head, int *count)
{
    char *problem = NULL;
    bool good;

    reader->ReadRecPtr = head->start_lsn;
    reader->EndRecPtr = head->end_lsn;
#if PG_VERSION_NUM >= 150000
    {
        size_t needed = DecodeXLogRecordRequiredSpace(head->length);
        DecodedXLogRecord *decoded;

        if (needed > decoded_capacity)
        {
            decoded_capacity = Max(needed * 2, 1 << 17);
            if (decoded_space != NULL)
                pfree(decoded_space);
            decoded_space = MemoryContextAllocHuge(TopMemoryContext, decoded_capacity);
        }
        decoded = (DecodedXLogRecord *) decoded_space;
        memset(decoded, 0, offsetof(DecodedXLogRecord, blocks));
        good = DecodeXLogRecord(reader, decoded, record, head->start_lsn, &problem);
        decoded->lsn = head->start_lsn;
        decoded->next_lsn = head->end_lsn;
        reader->record = decoded;
        *count = decoded->max_block_id + 1;
        if (good)
            return decoded->blocks;
    }
#else
    {
        /* The reader keeps what it allocates here from record to record. */
        MemoryContext request_context = MemoryContextSwitchTo(TopMemoryContext);

        good = DecodeXLogRecord(reader, record, &problem);
        MemoryContextSwitchTo(request_context);
        *count = reader->max_block_id + 1;
        if (good)
            return reader->blocks;
    }
#endif
    elog(ERROR, "the record cannot be decoded: %s", problem ? problem : "no reason given");
    return NULL;
}

/*
 * Points the block references at the scratch relations. Answers whether the page that was asked for is among
 * them.
 *
 * Heap records that clear bits of the visibility map carry no reference to the map's page: redo finds it
 * through the relation of block 0. So when a page of the map is asked for, block 0 belongs to the target
 * relation too, where its main fork is no more than another page.
 */
static bool
redirect_blocks(DecodedBkpBlock *blocks, int count, const PageRequest *request, const Locator *wanted)
{
    bool found = false;

    for (int index = 0; index < count; index++)
    {
        DecodedBkpBlock *block = &blocks[index];
        bool same_relation, overwritten;

        if (!block->in_use) /* its other fields are not set */
            continue;
        same_relation = LOCATORS_EQUAL(BLOCK_LOCATOR(block), *wanted);
        overwritten = (block->flags & BKPBLOCK_WILL_INIT) || (block->has_image && block->apply_image);
        if (same_relation && block->blkno == request->block && block->forknum == (ForkNumber) request->fork)
        {
            BLOCK_LOCATOR(block) = scratch_target.locator;
            found = true;
            continue;
        }
        if (same_relation && index == 0 && request->fork == VISIBILITYMAP_FORKNUM && block->forknum == MAIN_FORKNUM)
        {
            BLOCK_LOCATOR(block) = scratch_target.locator;
            found = true;
        }
        else
        {
            BLOCK_LOCATOR(block) = scratch_other.locator;
            other_touched = true;
        }
        if (!overwritten)
            scratch_preload_newer(&BLOCK_LOCATOR(block), block->forknum, block->blkno);
    }
    return found;
}

static void
apply(const PageRequest *request, const Locator *wanted, const RecordHead *head, XLogRecord *record)
{
    DecodedBkpBlock *blocks;
    int count;

    position->record_lsn = head->start_lsn;
    position->rmgr = record->xl_rmid;
    position->info = record->xl_info;
    check_record(record, head->length);
    blocks = decode(record, head, &count);
    if (!redirect_blocks(blocks, count, request, wanted))
        elog(ERROR, "the record does not touch this page");
    RmgrTable[record->xl_rmid].rm_redo(reader);
    /*
     * During recovery a change to a page of zeros is noted and skipped: the page may be truncated further
     * on. For us it means that the chain lacks its beginning.
     */
    if (XLogHaveInvalidPages())
        elog(ERROR, "the record changes a page that neither the base nor an earlier record has filled");
    record_count++;
}

/* Checks all lengths before anything is touched; answers where the records begin. */
static const char *
check_request(const char *request_bytes, size_t size)
{
    const PageRequest *request = (const PageRequest *) request_bytes;
    const char *end = request_bytes + size;
    const char *records, *cursor;
    uint64 last_lsn = 0;

    if (size < sizeof(PageRequest) || request->fork > MAX_FORKNUM || request->block > MaxBlockNumber ||
        request->has_base > 1 || size < sizeof(PageRequest) + request->has_base * BLCKSZ)
        elog(ERROR, "malformed request for a page");
    records = cursor = request_bytes + sizeof(PageRequest) + request->has_base * BLCKSZ;
    for (uint32 index = 0; index < request->record_count; index++)
    {
        const RecordHead *head = (const RecordHead *) cursor;

        if ((size_t) (end - cursor) < sizeof(RecordHead) || head->length < SizeOfXLogRecord ||
            (size_t) (end - cursor) - sizeof(RecordHead) < MAXALIGN64((uint64) head->length))
            elog(ERROR, "malformed request for a page: record %u of %u", index + 1, request->record_count);
        if (head->start_lsn < last_lsn || head->end_lsn <= head->start_lsn)
            elog(ERROR, "malformed request for a page: record %u of %u is out of order", index + 1,
                 request->record_count);
        last_lsn = head->end_lsn;
        cursor += sizeof(RecordHead) + MAXALIGN64((uint64) head->length);
    }
    if (cursor != end)
        elog(ERROR, "malformed request for a page: %zu bytes too many", (size_t) (end - cursor));
    return records;
}

void
replay_page(const char *request_bytes, size_t size)
{
    const PageRequest *request = (const PageRequest *) request_bytes;
    const char *cursor = check_request(request_bytes, size);
    Locator wanted = LOCATOR(request->spc, request->db, request->rel);

    scratch_store_target(request->fork, request->block,
                         request->has_base ? request_bytes + sizeof(PageRequest) : NULL);
    for (uint32 index = 0; index < request->record_count; index++)
    {
        const RecordHead *head = (const RecordHead *) cursor;

        /* Decoding keeps pointers into the record but does not write to it. */
        apply(request, &wanted, head, (XLogRecord *) unconstify(char *, cursor + sizeof(RecordHead)));
        cursor += sizeof(RecordHead) + MAXALIGN(head->length);
        if (other_touched && index % RECORDS_BETWEEN_FORGETTING == RECORDS_BETWEEN_FORGETTING - 1)
        {
            scratch_forget_other();
            other_touched = false;
        }
    }
    position->record_lsn = 0;
    scratch_answer_target(request->fork, request->block);
    scratch_forget_target();
    if (other_touched)
        scratch_forget_other();
    other_touched = false;
}

/* For tests: what PostgreSQL itself ignores when it compares a replayed page with the original. */
void
replay_mask(const char *request_bytes, size_t size)
{
    const MaskRequest *request = (const MaskRequest *) request_bytes;
    static PGAlignedBlock page;

    if (size != sizeof(MaskRequest) + BLCKSZ || !RMGR_EXISTS(request->rmgr))
        elog(ERROR, "malformed request to mask a page");
    memcpy(page.data, request_bytes + sizeof(MaskRequest), BLCKSZ);
    if (!PageIsNew((Page) page.data) && RmgrTable[request->rmgr].rm_mask != NULL)
        RmgrTable[request->rmgr].rm_mask(page.data, request->block);
    protocol_answer(ANSWER_PAGE, page.data, BLCKSZ);
}
