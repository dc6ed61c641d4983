/* ALTER SYSTEM is acknowledged only when the setting is kept.
 *
 * PostgreSQL writes postgresql.auto.conf.tmp and renames it. The directory is a cache, so the renaming asks the compute
 * manager, which stores the new list at the controller, puts the file in place itself, and answers on the socket
 * beside the data directory (excimer.compute.settings_keeper):
 *
 *   "kept"             the file is in place
 *   "refused: REASON"  the setting is unsafe here, or not understood: EPERM
 *   "failed: REASON"   it cannot be stored now: EIO
 *
 * No answer within the limit is EIO too: then the list may have been changed all the same. The client reads the reason.
 * The calling process holds PostgreSQL's lock on the file, so that one change follows the other.
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <string.h>

#define SETTINGS_FILE "postgresql.auto.conf"

bool is_settings_file(const char *path)
{
    const char *inside = arena.header == NULL ? NULL : path_in_data_dir(path);
    return inside != NULL && strcmp(inside, SETTINGS_FILE) == 0;
}

int keep_settings(void)
{
    return ask_manager("keep\n", "ALTER SYSTEM changes nothing");
}
