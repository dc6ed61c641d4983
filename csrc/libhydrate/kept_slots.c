/* A change of a replication slot is on PostgreSQL's disk only when it is kept.
 *
 * PostgreSQL saves a slot by renaming, and lets go of rows and WAL that the slot no longer needs only after that:
 *
 *   pg_replslot/NAME/state.tmp -> pg_replslot/NAME/state    it has changed
 *   pg_replslot/NAME.tmp       -> pg_replslot/NAME          it is made
 *   pg_replslot/NAME           -> pg_replslot/NAME.tmp      it is dropped
 *
 * The directory is a cache, so the manager is asked before: it saves all slots as they are going to be
 * (excimer.compute.slot_keeper), and answers as for a setting. Without that the renaming fails with EIO, and PostgreSQL
 * goes on as with a disk that fails: the slot stays as it was.
 *
 * The proposer's slot is of this endpoint alone.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <stdio.h>
#include <string.h>

#define SLOTS "pg_replslot/"
#define OWN_SLOT SLOTS "excimer_proposer"
#define REQUEST_SIZE 256

static const char *path_in_slots(const char *path)
{
    if (arena.header == NULL || path == NULL || (path = path_in_data_dir(path)) == NULL)
        return NULL;
    bool is_other = strncmp(path, SLOTS, sizeof SLOTS - 1) != 0 || strncmp(path, OWN_SLOT, sizeof OWN_SLOT - 1) == 0;
    return is_other || strstr(path, ".tmp/") != NULL ? NULL : path; /* one that is not made yet is nobody's */
}

int keep_slot(const char *from, const char *to)
{
    char request[REQUEST_SIZE];
    const char *source = path_in_slots(from), *target = path_in_slots(to);
    if (source == NULL || target == NULL)
        return 0;
    int size = snprintf(request, sizeof request, "slots %s %s\n", source, target);
    if (size >= (int)sizeof request)
        return 0; /* longer than a slot's name */
    return ask_manager(request, "a replication slot stays as it was");
}
