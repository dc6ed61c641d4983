/* User tablespaces are refused when one is made, because a compute could not bring their relations back.
 *
 * PostgreSQL enters one into pg_tblspc as a symbolic link, or as a directory for an in-place tablespace, before it
 * writes any WAL of it; CREATE TABLESPACE then fails with "Operation not supported" and leaves nothing in the history.
 */
#define _GNU_SOURCE
#include "hydrate.h"
#include "interposed.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char TABLESPACES[] = "pg_tblspc/";

static int is_tablespace(const char *path)
{
    const char *inside = arena.header == NULL ? NULL : path_in_data_dir(path);
    return inside != NULL && strncmp(inside, TABLESPACES, sizeof TABLESPACES - 1) == 0;
}

INTERPOSE(int, symlink, const char *target, const char *path)
{
    if (is_tablespace(path)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return system_symlink(target, path);
}

INTERPOSE(int, mkdir, const char *path, mode_t mode)
{
    if (is_tablespace(path)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return system_mkdir(path, mode);
}
