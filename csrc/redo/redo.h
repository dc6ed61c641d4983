/*
 * The redo worker: a stock PostgreSQL that applies WAL records to single pages, one request at a time.
 *
 *   module.c    takes the process over before PostgreSQL would start recovery; the request loop; errors
 *   protocol.c  requests in, answers out, buffered
 *   scratch.c   the two relations that stand in for all relations of the world
 *   replay.c    one request: base page + records -> page
 *   sandbox.c   what the process may still do once it has started
 *   versions.h  what differs between PostgreSQL 14 and 18
 *
 * Not here: which records a page needs and in which order; the page server knows.
 */
#ifndef EXCIMER_REDO_H
#define EXCIMER_REDO_H

#include "postgres.h"

#include "versions.h"

/* Longest request; a longer one means that the two ends have lost each other, and ends the process. */
#define REQUEST_SIZE_MAX (256u << 20)
/* A request that takes longer ends the process, so that it does not outlive a host that was killed. */
#define REQUEST_SECONDS_MAX 300

#define ANSWER_PAGE 0
#define ANSWER_ERROR 1
#define ANSWER_READY 100

/* ---- protocol.c: integers are in the machine's order (little-endian on all that we run on) ---- */

typedef struct RequestHead
{
    uint32 length; /* of what follows this head; a multiple of 8 */
    uint32 op;     /* 'R', 'M', 'S' */
} RequestHead;

typedef struct PageRequest
{
    uint32 spc, db, rel, fork, block;
    uint32 has_base; /* 1: a base page follows, then the records */
    uint32 record_count;
    uint32 zero;
} PageRequest;

typedef struct RecordHead
{
    uint64 start_lsn, end_lsn;
    uint32 length; /* of the raw record that follows, padded to 8 */
    uint32 zero;
} RecordHead;

typedef struct MaskRequest
{
    uint32 rmgr, block; /* the page follows */
} MaskRequest;

extern void protocol_start(void);
/* The next `size` bytes of input, valid until the next call. Flushes answers before it waits. */
extern char *protocol_read(size_t size);
extern void protocol_answer(uint32 status, const void *data, size_t size);
extern void protocol_flush(void);

/* ---- scratch.c ---- */

typedef struct ScratchRelation
{
    Locator locator;
    SMgrRelation smgr;
} ScratchRelation;

extern ScratchRelation scratch_target; /* the page asked for */
extern ScratchRelation scratch_other;  /* every other page that a record mentions */

extern void scratch_create(void);
extern void scratch_store_target(ForkNumber fork, BlockNumber block, const char *page);
extern void scratch_preload_newer(const Locator *locator, ForkNumber fork, BlockNumber block);
extern void scratch_answer_target(ForkNumber fork, BlockNumber block);
extern void scratch_forget_target(void);
extern void scratch_forget_other(void);

/* ---- replay.c ---- */

/*
 * Where the worker is, in a file that the host can read after the worker has died: which request
 * (counted from 1) and which record killed it.
 */
typedef struct Position
{
    uint64 request;
    uint64 record_lsn;
    uint32 rmgr, info;
} Position;

extern Position *position;

extern void replay_start(void);
extern void replay_page(const char *request, size_t size);
extern void replay_mask(const char *request, size_t size);
extern uint64 replay_record_count(void);

/* ---- sandbox.c ---- */

/* What of the sandbox is in force. */
typedef struct Sandbox
{
    int landlock_version; /* 0: Landlock is not in force */
    bool has_own_root;
    bool is_filtered;
} Sandbox;

/* Gives up what a redo worker never needs, as far as this kernel can take it away. */
extern void sandbox_enter(Sandbox *sandbox);

#endif
