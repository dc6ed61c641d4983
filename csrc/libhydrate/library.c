/* The library's start: EXCIMER_ARENA names the arena; it acts only inside a program called postgres (or any, with
 * EXCIMER_FORCE set) and takes itself out of the environment there, so that archive_command and its like stay clean.
 * PostgreSQL's own processes are forks and keep it. With EXCIMER_PREFETCH the program's main() is never come to (prefetch.c).
 */
#define _GNU_SOURCE
#include "hydrate.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define EXIT_BAD_ARENA 78

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("EXCIMER_ARENA");
    if (path == NULL || (getenv("EXCIMER_FORCE") == NULL && strcmp(program_invocation_short_name, "postgres") != 0))
        return;
    unsetenv("LD_PRELOAD");
    const char *fault = arena_open(path);
    if (fault == NULL && getenv("EXCIMER_PREFETCH") != NULL)
        serve_prefetch();
    if (fault == NULL)
        return;
    /* Going on would show PostgreSQL an empty cluster. */
    report("the arena %s cannot be used: %s", path, fault);
    _exit(EXIT_BAD_ARENA);
}
