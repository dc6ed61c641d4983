/* What a standby has replayed: its pages are asked for as of there.
 *
 * A block that is absent has not been touched since the directory began, neither by recovery nor by anybody else: who
 * changes a block has it in memory, and what leaves memory is present. So records up to the LSN that is replayed must be
 * in the page that comes, and later ones must not: the startup process applies those to it, because it finds the block
 * where it was put, in the file or in a buffer whose reading it waits for. The LSN is therefore taken after the claim and
 * may be older when the page comes, but is never newer than what recovery will look at (docs/rfcs/0011-replicas.md).
 *
 * Only PostgreSQL knows it, and this library knows no PostgreSQL: the endpoint module (csrc/endpoint/replay.c) tells.
 */
#include "hydrate.h"

static uint64_t (*replayed)(void);
static bool (*replays)(void);

__attribute__((visibility("default"))) void hydrate_follow_replay(uint64_t (*lsn)(void), bool (*is_startup)(void));
__attribute__((visibility("default"))) void hydrate_follow_replay(uint64_t (*lsn)(void), bool (*is_startup)(void))
{
    replayed = lsn;
    replays = is_startup;
}

uint64_t replayed_lsn(void)
{
    return replayed == NULL ? 0 : replayed();
}

bool replays_wal(void)
{
    return replays != NULL && replays();
}
